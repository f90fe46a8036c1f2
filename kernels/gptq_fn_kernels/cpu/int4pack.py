"""torch's own 4-bit matmul for CPUs, `aten::_weight_int4pack_mm_for_cpu`, which computes with (code - 8) * scale + zero.

Only its bfloat16 path is vectorized; a bfloat16 layer of 2,048 x 8,192 multiplies one row in a quarter of the dense layer's time.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from gptq_fn_kernels import reference
from gptq_fn_kernels.problem import Packed, Problem
from gptq_fn_kernels.words import unpack

_GROUPS = (256, 128, 64, 32)
"""The group sizes of the operator; larger multiples are served by repeating scales."""

_MANY_ROWS = 512
"""The operator unpacks the weight again for every few rows: from about here on, unpacking it once and multiplying densely is faster."""


@dataclass(frozen=True, eq=False)
class Int4Pack:
    """The operator's weight and scales, and the tensors they were made of."""

    weight: torch.Tensor
    """uint8 [n, width / 2]; `width` is k, padded to a multiple of 32."""
    scales_and_zeros: torch.Tensor
    """bfloat16 [width / group, n, 2]."""
    group: int
    padding: int
    """Inputs to append to the activations."""
    packed: Packed


def unsupported(problem: Problem) -> str | None:
    """None, or why the operator cannot multiply this, or should not."""
    if problem.device != "cpu":
        return f"runs on a CPU, not on {problem.device}"
    if problem.dtype != torch.bfloat16:
        return f"is fast for torch.bfloat16 only; for {problem.dtype} its code is scalar and slower than the reference from few rows on"
    if problem.bits != 4:
        return f"packs 4 bits, not {problem.bits}"
    if not problem.symmetric:
        # The operator adds zero = (8 - z) * scale, rounded to bfloat16: an error that all inputs of a group share.
        # Where activations have a mean, it exceeds the dense layer's error about ninefold.
        return "rounds zero points to torch.bfloat16, so it is accurate for symmetric weights only"
    if problem.group_size is None:
        return "needs groups of consecutive inputs, but g_idx is irregular (act-order without static groups)"
    if problem.group_size % 32 and problem.group_size < problem.k:
        return f"needs a group size divisible by 32, or a single group, got {problem.group_size}"
    if problem.n % 16:
        return f"needs out_features divisible by 16, got {problem.n}"
    return None


def prepare(packed: Packed) -> Int4Pack:
    """The operator's form of a symmetric 4-bit weight with groups of consecutive inputs."""
    width = -(-packed.k // 32) * 32
    assert packed.group_size is not None
    stored = packed.group_size if packed.group_size < packed.k else width
    group = next(size for size in _GROUPS if stored % size == 0 and width % size == 0)
    codes = F.pad(unpack(packed.qweight, 4, packed.k, torch.stack).T, (0, width - packed.k))
    scales = packed.scales[torch.arange(0, width, group) // stored].to(torch.bfloat16)
    return Int4Pack(
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.contiguous(), 1),
        torch.stack([scales, torch.zeros_like(scales)], -1),
        group,
        width - packed.k,
        packed,
    )


def matmul(x: torch.Tensor, prepared: Int4Pack) -> torch.Tensor:
    """x bfloat16 [..., k] -> [..., n]."""
    rows = x.reshape(-1, x.shape[-1])
    if not 0 < len(rows) < _MANY_ROWS:
        return reference.matmul(x, prepared.packed)
    # Appended inputs are zero, so the codes there do not matter.
    padded = F.pad(rows, (0, prepared.padding)).contiguous()
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(padded, prepared.weight, prepared.group, prepared.scales_and_zeros)
    return y.reshape(*x.shape[:-1], -1)
