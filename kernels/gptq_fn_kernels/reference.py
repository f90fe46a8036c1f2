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


def gradient(grad: torch.Tensor, packed: Packed) -> torch.Tensor:
    """grad [..., n] of a product -> grad @ weight [..., k] of its activations, with the weight unpacked anew.

    Compiled it is an operator, for compilers would take the weight for the one that the forward pass has unpacked, and keep it until here.
    """
    call = _operator if torch.compiler.is_compiling() else _gradient
    return call(grad, packed.qweight, packed.zeros, packed.scales, packed.g_idx, packed.bits)


def dequantize(packed: Packed, dtype: torch.dtype = torch.float32, qweight: torch.Tensor | None = None) -> torch.Tensor:
    """The weight [n, k], rounded once from float32 (or float64, where `dtype` is that); of this qweight where one is given."""
    return _unpacked(packed.qweight if qweight is None else qweight, packed.zeros, packed.scales, packed.g_idx, packed.bits, dtype)


def _unpacked(
    qweight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    scales, groups = scales.to(torch.float64 if dtype == torch.float64 else torch.float32), g_idx.long()
    k, n = len(groups), scales.shape[1]

    def rows(start: int, stop: int) -> torch.Tensor:
        group, words = groups[start:stop], qweight[start * bits // 32 : -(-stop * bits // 32)]
        return (unpack(words, bits, stop - start, torch) - zeros[group]) * scales[group]

    step = max(_BLOCK // n // 32, 1) * 32
    if step >= k or scales.device.type != "cpu" or torch.compiler.is_compiling():  # compilers find blocks of their own
        return rows(0, k).to(dtype).T
    weight = torch.empty(k, n, dtype=dtype)
    for start in range(0, k, step):
        stop = min(start + step, k)
        weight[start:stop] = rows(start, stop)
    return weight.T


def _gradient(
    grad: torch.Tensor, qweight: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor, g_idx: torch.Tensor, bits: int
) -> torch.Tensor:
    return grad @ _unpacked(qweight, zeros, scales, g_idx, bits, grad.dtype)


_LIBRARY = torch.library.Library("gptq_fn", "FRAGMENT")
_LIBRARY.define("gradient(Tensor grad, Tensor qweight, Tensor zeros, Tensor scales, Tensor g_idx, int bits) -> Tensor")
_LIBRARY.impl("gradient", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake(
    "gptq_fn::gradient", lambda grad, qweight, zeros, scales, g_idx, bits: grad.new_empty((*grad.shape[:-1], len(g_idx))), lib=_LIBRARY
)
_operator = torch.ops.gptq_fn.gradient.default
