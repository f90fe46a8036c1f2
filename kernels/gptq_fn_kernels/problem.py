"""What a matmul has to work with: a weight as a checkpoint stores it, and the description by which backends are chosen."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from gptq_fn_kernels.words import unpack, words_of

BITS = (2, 3, 4, 8)


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [n, k] in a GPTQ checkpoint's tensors: `weight[j, i] = scales[g, j] * (code[i, j] - zero[g, j])`, `g = g_idx[i]`.

    The tensors are used as they are and must not change afterwards: properties that read them do so once.
    Raises ValueError where shapes or dtypes do not belong together.
    """

    qweight: torch.Tensor
    """int32 [k * bits / 32, n]: the codes, packed along the inputs."""
    qzeros: torch.Tensor
    """int32 [groups, n * bits / 32]: the zero points, packed along the outputs."""
    scales: torch.Tensor
    """[groups, n], of any floating dtype."""
    g_idx: torch.Tensor
    """int [k]: the group of each input."""
    bits: int
    zero_offset: Literal[0, 1]
    """What was subtracted from the zero points before they were packed: 1 in files of format v1 ("gptq"), 0 in v2."""

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"Codes have 2, 3, 4 or 8 bits, not {self.bits}.")
        if self.zero_offset not in (0, 1):
            raise ValueError(f"zero_offset is 1 for files of format v1 and 0 for v2, not {self.zero_offset}.")
        if self.qweight.dtype != torch.int32 or self.qzeros.dtype != torch.int32:
            raise ValueError(f"qweight and qzeros are words of torch.int32, not {self.qweight.dtype} and {self.qzeros.dtype}.")
        if not self.scales.is_floating_point() or self.g_idx.is_floating_point():
            raise ValueError(f"scales are floating and g_idx whole numbers, not {self.scales.dtype} and {self.g_idx.dtype}.")
        groups, n = self.scales.shape
        for name, expected in (("qweight", (words_of(self.k, self.bits), n)), ("qzeros", (groups, words_of(n, self.bits)))):
            found = tuple(getattr(self, name).shape)
            if found != expected:
                raise ValueError(
                    f"{name} is {found} but must be {expected} for {self.k} inputs (g_idx), {groups} groups and {n} outputs (scales) "
                    f"at {self.bits} bits. Check the bits, and that no tensor is transposed."
                )

    @property
    def k(self) -> int:
        """The number of inputs."""
        return self.g_idx.shape[0]

    @property
    def n(self) -> int:
        """The number of outputs."""
        return self.scales.shape[1]

    @cached_property
    def zeros(self) -> torch.Tensor:
        """int32 [groups, n]: the zero points. A v1 field of all ones stands for zero: nothing stores 2^bits."""
        stored = unpack(self.qzeros.T, self.bits, self.n, torch).T
        return (stored + self.zero_offset) & (2**self.bits - 1)

    @cached_property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return bool((self.zeros == 2 ** (self.bits - 1)).all())

    @cached_property
    def group_size(self) -> int | None:
        """The number of consecutive inputs that share a group (the last may have fewer), or None where g_idx is irregular.

        Raises ValueError where g_idx names a group that does not exist.
        """
        first, last, groups = int(self.g_idx.min()), int(self.g_idx.max()), self.scales.shape[0]
        if first < 0 or last >= groups:
            raise ValueError(f"g_idx reaches from {first} to {last} but there are {groups} groups; the checkpoint is damaged.")
        size = int((self.g_idx == self.g_idx[0]).sum())
        regular = torch.arange(self.k, device=self.g_idx.device) // size
        return size if bool((self.g_idx == regular).all()) else None


@dataclass(frozen=True)
class Problem:
    """Everything a backend may base its decision on, as plain data."""

    bits: int
    k: int
    n: int
    group_size: int | None
    """None where an input's group does not follow from its position (act-order without static groups)."""
    symmetric: bool
    dtype: torch.dtype
    """Of the activations, and so of the result."""
    device: str
    """A device type: "cpu", "cuda", ..."""


def problem_of(packed: Packed, dtype: torch.dtype) -> Problem:
    """The problem of multiplying activations of `dtype` with this weight."""
    return Problem(packed.bits, packed.k, packed.n, packed.group_size, packed.symmetric, dtype, packed.qweight.device.type)
