"""A weight in the layout of the Triton kernels, made once from a checkpoint's tensors, on the device where they are."""

from dataclasses import dataclass

import torch

from gptq_fn_kernels.problem import Packed
from gptq_fn_kernels.slots import slots_of
from gptq_fn_kernels.triton.layout import FOR_TRITON, FROM_TRITON, SMALLEST_GROUP, chunk_of, largest_group_of, pack_words, unpack_words
from gptq_fn_kernels.words import pack, unpack

_BLOCK = 2**24
"""Codes packed at a time: their int32 take 64 MiB."""


Parts = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor, torch.Tensor | None]
"""words, high, zeros, scales, gather"""


@dataclass(frozen=True, eq=False)
class TritonWeight:
    """A weight [n, k] whose inputs are held in `width` slots, a whole number of chunks; slots without an input have weight 0."""

    words: torch.Tensor
    """int32 [width / chunk, n, 16], as in `layout`, in Triton's order."""
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


def prepare(packed: Packed) -> TritonWeight:
    """The weight in this layout. Waits for the device: it belongs at load, not on a hot path."""
    held = held_of(packed, largest_group_of(packed.bits))
    zeros = None if packed.symmetric else packed.zeros[held.groups].to(torch.float16)
    scales = packed.scales[held.groups]
    words, high = (None if part is None else part[..., FOR_TRITON] for part in (held.words, held.high))
    assert words is not None
    return TritonWeight(words, high, zeros, scales, held.gather, packed.bits, held.share, packed.k, packed.n)


def restored(weight: TritonWeight) -> torch.Tensor:
    """The qweight that it was prepared from."""
    words, high = (None if part is None else part[..., FROM_TRITON] for part in (weight.words, weight.high))
    assert words is not None
    return from_slots(words, high, weight.gather, weight.bits, weight.k)


def from_slots(words: torch.Tensor, high: torch.Tensor | None, gather: torch.Tensor | None, bits: int, k: int) -> torch.Tensor:
    """The qweight from which `held_of` made these words."""
    slots = torch.arange(k, device=words.device) if gather is None else gather.argsort()[:k]  # those without an input come last
    parts = []
    for start in range(0, words.shape[1], step := max(_BLOCK // (words.shape[0] * chunk_of(bits)), 1)):
        outs = slice(start, start + step)
        codes = unpack_words(words[:, outs], None if high is None else high[:, outs], bits, torch.stack)[:, slots]
        parts.append(pack(codes.T, bits, torch))
    return torch.cat(parts, 1)


@dataclass(frozen=True, eq=False)
class Held:
    """The codes of a weight in their slots, and which group each share of slots has."""

    words: torch.Tensor
    """int32 [width / chunk, n, 16]."""
    high: torch.Tensor | None
    """int16 [width / chunk, n, 16] of codes of 3 bits."""
    groups: torch.Tensor
    """int32 [width / share]."""
    share: int
    gather: torch.Tensor | None
    """int32 [width], None where input i is in slot i."""


def held_of(packed: Packed, largest: int) -> Held:
    """The codes in slots of which at most `largest` share a scale."""
    bits, device = packed.bits, packed.g_idx.device
    slots = slots_of(packed.g_idx.cpu().numpy(), chunk=chunk_of(bits), smallest=SMALLEST_GROUP, largest=largest)
    inputs, groups = torch.from_numpy(slots.inputs).to(device), torch.from_numpy(slots.groups).to(device)
    empty, of_slot = inputs == packed.k, groups.repeat_interleave(slots.share)
    words, high = [], []
    step = max(_BLOCK // len(inputs), 1)
    for start in range(0, packed.n, step):
        outs = slice(start, start + step)
        codes = unpack(packed.qweight[:, outs], bits, packed.k, torch)[torch.where(empty, 0, inputs)]
        # An empty slot holds its group's zero point, so its weight is 0.
        w, h = pack_words(torch.where(empty[:, None], packed.zeros[:, outs][of_slot], codes).T, bits)
        words.append(w)
        high.append(h)
    joined = torch.cat(high, 1).to(torch.int16) if bits == 3 else None
    return Held(torch.cat(words, 1), joined, groups, slots.share, None if slots.gather is None else inputs)
