"""In which order a packed weight holds its inputs: sorted by group, so that neighbours share a scale."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Slots:
    """Places for `k` inputs, a whole number of chunks of them. `share` neighbours have one scale."""

    inputs: np.ndarray
    """int32 [width]: the input of each slot, k where there is none."""
    groups: np.ndarray
    """int32 [width / share]: the group of each of these shares of slots."""
    share: int
    k: int

    @property
    def gather(self) -> np.ndarray | None:
        """`inputs`, or None where input i is in slot i."""
        return None if (self.inputs[: self.k] == np.arange(self.k)).all() else self.inputs


def slots_of(group_of: np.ndarray, *, chunk: int, smallest: int, largest: int) -> Slots:
    """Slots for inputs of these groups [k], of which every share has `smallest` * 2^i slots, at most `largest`; they fill whole chunks.

    The largest share that leaves no slot empty between groups is taken, else `smallest`.
    """
    order = np.argsort(group_of, kind="stable").astype(np.int32)
    of = group_of[order]
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    share = largest
    while share > smallest and (starts % share).any():
        share //= 2
    counts = np.diff(starts, append=len(of))
    room = -(-counts // share) * share
    at = np.arange(len(of)) + np.repeat(np.cumsum(room) - room - starts, counts)
    width = -(-int(room.sum()) // chunk) * chunk
    inputs, groups = np.full(width, len(of), np.int32), np.zeros(width // share, np.int32)
    inputs[at] = order
    groups[at // share] = of
    return Slots(inputs, groups, share, len(of))
