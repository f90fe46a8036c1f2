"""A weight in the layout of the CUDA kernels, made once from a checkpoint's tensors, on the device where they are.

Words are the Triton tier's (`triton/layout.py`), so that a thread of `mma` or `wgmma` finds its fragment in 16 bytes. What a chunk of
inputs has of scales and zero points lies together for each output, so that a block of outputs takes one copy of each from a chunk.
"""

from dataclasses import dataclass

import torch

from gptq_fn_kernels.problem import Packed
from gptq_fn_kernels.triton.layout import chunk_of
from gptq_fn_kernels.triton.weight import from_slots, held_of

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""words, grid, gather"""


@dataclass(frozen=True, eq=False)
class CudaWeight:
    """A weight [n, k] whose inputs are held in `width` slots, a whole number of chunks; slots without an input have weight 0."""

    words: torch.Tensor
    """int32 [width / chunk, n, 16], as in `triton/layout.py`."""
    grid: torch.Tensor
    """float16 or bfloat16 [width / chunk, n, groups of a chunk, 1 or 2]: the scale, and the zero point unless all are the middle code.

    A zero point is a whole number in float16 whatever the scales are: its bits lie in a tensor of bfloat16."""
    gather: torch.Tensor | None
    """int32 [width]: the input in each slot, k where there is none; None where input i is in slot i."""
    bits: int
    k: int
    n: int

    @property
    def parts(self) -> Parts:
        """The tensors."""
        return self.words, self.grid, self.gather


def prepare(packed: Packed) -> CudaWeight:
    """The weight in this layout. Waits for the device: it belongs at load, not on a hot path."""
    chunk = chunk_of(packed.bits)
    held = held_of(packed, chunk)
    groups = held.groups.reshape(-1, chunk // held.share)
    parts = [_narrowed(packed.scales)]
    if not packed.symmetric:
        parts.append(packed.zeros.to(torch.float16).view(parts[0].dtype))
    grid = torch.stack([part[groups].transpose(1, 2) for part in parts], -1).contiguous()
    return CudaWeight(held.words, grid, held.gather, packed.bits, packed.k, packed.n)


def restored(weight: CudaWeight) -> torch.Tensor:
    """The qweight that it was prepared from."""
    return from_slots(weight.words, None, weight.gather, weight.bits, weight.k)


def _narrowed(scales: torch.Tensor) -> torch.Tensor:
    """In float16, or in bfloat16 where float16 would not hold them with all its bits."""
    if scales.dtype in (torch.float16, torch.bfloat16):
        return scales
    sizes, held = scales.abs(), torch.finfo(torch.float16)
    fits = ((sizes <= held.max) & ((sizes >= held.smallest_normal) | (sizes == 0))).all()
    return scales.to(torch.float16 if fits else torch.bfloat16)
