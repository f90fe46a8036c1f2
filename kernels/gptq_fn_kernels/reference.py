"""The backend that does everything: dequantize, then multiply. What the others are held against."""

import torch

from gptq_fn_kernels.problem import Packed, Problem
from gptq_fn_kernels.words import unpack

_BLOCK = 2**19
"""Codes unpacked at a time on a CPU: their int32 fit its cache, which is worth a factor of 7 (2,048 x 8,192 codes of 4 bits)."""


def unsupported(problem: Problem) -> str | None:
    """None for any floating activations."""
    return None if problem.dtype.is_floating_point else f"multiplies floating activations, not {problem.dtype}"


def prepare(packed: Packed) -> Packed:
    """The weight as it is."""
    return packed


def matmul(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    """x [..., k] -> [..., n], with the weight rounded to x's dtype: what a dense layer with the dequantized weight computes."""
    return torch.nn.functional.linear(x, dequantize(packed, x.dtype))


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weight [n, k], rounded once from float32 (or float64, where `dtype` is that)."""
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    scales, zeros, groups = packed.scales.to(exact), packed.zeros.to(exact), packed.g_idx.long()
    weight = torch.empty(packed.k, packed.n, dtype=dtype, device=scales.device)
    rows = max(_BLOCK // packed.n // 32, 1) * 32 if scales.device.type == "cpu" else packed.k
    for start in range(0, packed.k, max(rows, 1)):
        group = groups[start : start + rows]
        words = packed.qweight[start * packed.bits // 32 : -(-(start + len(group)) * packed.bits // 32)]
        codes = unpack(words, packed.bits, len(group), torch.stack)
        weight[start : start + rows] = (codes - zeros[group]) * scales[group]
    return weight.T
