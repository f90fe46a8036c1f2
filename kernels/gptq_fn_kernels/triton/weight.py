"""A weight in the layout of the Triton kernels, made once from a checkpoint's tensors, on the device where they are."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from gptq_fn_kernels.problem import Packed
from gptq_fn_kernels.triton.layout import SMALLEST_GROUP, chunk_of, largest_group_of, pack_words
from gptq_fn_kernels.words import unpack

_BLOCK = 2**24
"""Codes packed at a time: their int32 take 64 MiB."""


Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]
"""words, high, zeros, scales, gather"""


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """A weight [n, k] whose inputs are held in `width` slots, a whole number of chunks; slots without an input have weight 0."""

    words: torch.Tensor
    """int32 [width / chunk, n, 16], as in `layout`."""
    high: torch.Tensor | None
    """int16 [width / chunk, n, 16]: the highest bits of codes of 3 bits."""
    zeros: torch.Tensor | None
    """float16 [width / group, n], whole numbers, or None where all are the middle code."""
    scales: torch.Tensor
    """[width / group, n]."""
    gather: torch.Tensor | None
    """int32 [width]: the input in each slot, k where there is none; None where input i is in slot i."""
    bits: int
    group: int
    """Slots that share a scale: a power of two from 16 to a quarter of a chunk."""
    k: int
    n: int

    @property
    def parts(self) -> Parts:
        """The tensors, in the order of the kernels' arguments."""
        return self.words, self.high, self.zeros, self.scales, self.gather

    @property
    def width(self) -> int:
        """The number of slots."""
        return self.words.shape[0] * chunk_of(self.bits)


class _Slots(NamedTuple):
    """Where inputs are held."""

    inputs: torch.Tensor
    """int64 [width]: the input of each slot, k for none."""
    groups: torch.Tensor
    """int64 [width / group]: the checkpoint's group of each group of slots."""
    group: int


def prepare(packed: Packed) -> TritonWeight:
    """The weight in this layout. Waits for the device: it belongs at load, not on a hot path."""
    inputs, groups, group = _slots(packed)
    empty, of_slot = inputs == packed.k, groups.repeat_interleave(group)[: len(inputs)]
    words, high = [], []
    step = max(_BLOCK // len(inputs), 1)
    for start in range(0, packed.n, step):
        outs = slice(start, start + step)
        codes = unpack(packed.qweight[:, outs], packed.bits, packed.k, torch.stack)[torch.where(empty, 0, inputs)]
        # An empty slot holds its group's zero point, so its weight is 0.
        w, h = pack_words(torch.where(empty[:, None], packed.zeros[:, outs][of_slot], codes).T, packed.bits)
        words.append(w)
        high.append(h)
    return TritonWeight(
        torch.cat(words, 1),
        torch.cat(high, 1).to(torch.int16) if packed.bits == 3 else None,
        None if packed.symmetric else packed.zeros[groups].to(torch.float16),
        packed.scales[groups],
        None if bool((inputs[: packed.k] == torch.arange(packed.k, device=inputs.device)).all()) else inputs.to(torch.int32),
        packed.bits,
        group,
        packed.k,
        packed.n,
    )


def _slots(packed: Packed) -> _Slots:
    """Inputs sorted by group. Where a group's inputs do not fill whole 16s of slots, it begins at a new 16."""
    device, chunk = packed.g_idx.device, chunk_of(packed.bits)
    of, order = packed.g_idx.long().sort(stable=True)
    at = torch.arange(packed.k, device=device)
    counts = torch.bincount(of, minlength=len(packed.scales))
    size = max(int(counts[0]), 1)
    if bool((of == at // size).all()) and (size >= packed.k or size % SMALLEST_GROUP == 0):
        group = min(largest_group_of(packed.bits), size & -size if size < packed.k else chunk)
    else:
        group = SMALLEST_GROUP
        room = -(-counts // group) * group
        at = at + (room.cumsum(0) - room - counts.cumsum(0) + counts)[of]
    width = -(-(int(at[-1]) + 1) // chunk) * chunk
    inputs = torch.full((width,), packed.k, device=device)
    inputs[at] = order
    groups = torch.zeros(-(-width // group), dtype=torch.int64, device=device)
    groups[at // group] = of
    return _Slots(inputs, groups, group)
