"""Textbook GPTQ in float64: one column at a time, with the explicit inverse Hessian. Slow and obvious on purpose.

After column i is rounded, the best change of the columns that are left is -(w_i - q_i) / [H^-1]_ii times row i of H^-1
(Frantar et al. 2022, equation 2); then row and column i are eliminated from H^-1 (equation 3). No Cholesky, no blocks.
"""

from typing import NamedTuple

import numpy as np

from gptq_fn import QuantConfig, QuantizedLinear

FACTORS = [1 - i / 25 for i in range(16)]


class Problem(NamedTuple):
    """What the oracle starts from, in stored order: weights with dead columns at 0, and the damped Hessian."""

    w: np.ndarray
    h: np.ndarray
    importance: np.ndarray
    """The diagonal before damping: dead columns are the least important ones."""
    config: QuantConfig


class Solution(NamedTuple):
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    group_of: np.ndarray
    objective: np.ndarray
    strayed: int
    """Decisions of the linear that was followed which differ from those of float64; all of them on ties."""


def problem(w: np.ndarray, xx: np.ndarray, config: QuantConfig, damp: float) -> Problem:
    """Dead columns get weight 0 and the mean diagonal; then damping relative to that mean."""
    w, h = np.array(w, np.float64), np.array(xx, np.float64)
    importance = np.diag(h)
    dead = importance == 0
    mean = importance[~dead].mean()
    w[:, dead] = 0
    damped = h + np.diag(np.where(dead, mean, 0) + damp * mean)
    return Problem(w, damped, importance, config)


def processing_order(diagonal: np.ndarray, config: QuantConfig) -> list[int]:
    """Natural; or the largest diagonal first; or so inside each group, and the group with the largest one first."""
    n = len(diagonal)
    size = config.group_size or n
    if config.order == "natural":
        return list(range(n))
    if config.order == "act":
        return sorted(range(n), key=lambda i: (-diagonal[i], i))
    groups = [list(range(start, min(start + size, n))) for start in range(0, n, size)]
    groups.sort(key=lambda group: (-max(diagonal[i] for i in group), group[0]))
    return [i for group in groups for i in sorted(group, key=lambda i: (-diagonal[i], i))]


def groups(order: list[int], config: QuantConfig) -> np.ndarray:
    """The group of each stored column: where it is stored, or where act-order puts it."""
    n = len(order)
    size = config.group_size or n
    if config.order == "act" and not config.static_groups:
        return np.array([order.index(i) // size for i in range(n)])
    return np.arange(n) // size


class Elimination(NamedTuple):
    """What rounding column i at its turn does to the columns that are left, for each column in stored order."""

    row: np.ndarray
    """Row i of the inverse Hessian of column i and those behind it, zero for those before."""
    pivot: np.ndarray
    """Its diagonal: 1 over this is what a squared error of column i adds to the objective."""


def eliminate(h: np.ndarray, order: list[int]) -> Elimination:
    inverse, row = np.linalg.inv(h), np.zeros_like(h)
    for i in order:
        row[i] = inverse[i]
        inverse = inverse - np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return Elimination(row, np.diag(row).copy())


def factors(config: QuantConfig) -> list[float]:
    """Those of a search, in the order of preference; minmax tries only the whole range."""
    if config.grid == "minmax":
        return [1.0]
    return [*FACTORS, *(-f for f in FACTORS)] if config.either_sign else FACTORS


def grid(w: np.ndarray, config: QuantConfig, factor: float, nudge: tuple[float, float] = (0.0, 0.0)) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of each row over `factor` times its range; `nudge` moves both before they are rounded."""
    top = 2**config.bits - 1
    low, high = np.minimum(w.min(1), 0) * factor, np.maximum(w.max(1), 0) * factor
    if config.sym:
        high = np.sign(factor) * np.maximum(np.abs(low), np.abs(high))
        low = -high
    scale = ((high - low) / top * (1 + nudge[0])).astype(np.float16).astype(np.float64)
    scale[scale == 0] = 1
    if config.sym:
        return scale, np.full_like(scale, 2 ** (config.bits - 1))
    return scale, np.clip(np.round(-low / scale + nudge[1]), 0, top)


def levels(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    """Where between the first and the last code the weights lie, before rounding."""
    return np.clip(w / scale + zero, 0, 2**bits - 1)


def rounding_error(w: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int) -> np.ndarray:
    scale, zero = scale[..., None], zero[..., None]
    return (scale * (np.round(levels(w, scale, zero, bits)) - zero) - w) ** 2


class Entered(NamedTuple):
    """A group when its first column's turn comes."""

    w: np.ndarray
    """[out, columns] in the order of their turns."""
    row: np.ndarray
    """Of the elimination, for these columns."""
    pivot: np.ndarray


def cost(scale: np.ndarray, zero: np.ndarray, group: Entered, config: QuantConfig, lean: float = 0.0) -> np.ndarray:
    """What the search of `config` makes least, of grids [..., out]; weights lie `lean` levels higher where they are rounded."""
    w, row, pivot = group
    if config.grid != "loop":
        return (rounding_error(w, scale, zero, config.bits) / (pivot if config.grid == "hid" else 1)).sum(-1)
    left, total = np.broadcast_to(w, (*scale.shape, w.shape[1])).copy(), np.zeros_like(scale)
    for j, p in enumerate(pivot):
        error = left[..., j] - scale * (np.round(levels(left[..., j] + lean * scale, scale, zero, config.bits)) - zero)
        left[..., j + 1 :] -= (error / p)[..., None] * row[j, j + 1 :]
        total += error**2 / p
    return total


class Nearest:
    """Decides as float64 does."""

    strayed = 0

    def __init__(self, config: QuantConfig):
        self.config = config

    def grid(self, group: int, entered: Entered) -> tuple[np.ndarray, np.ndarray]:
        tried = [grid(entered.w, self.config, factor) for factor in factors(self.config)]
        best = np.argmin([cost(*g, entered, self.config) for g in tried], axis=0)  # the first of equals
        scale, zero = np.transpose(tried, (1, 0, 2))
        rows = np.arange(len(entered.w))
        return scale[best, rows], zero[best, rows]

    def codes(self, column: int, level: np.ndarray) -> np.ndarray:
        return np.round(level)


class Following(Nearest):
    """Decides as `q` did, after making sure that float64 could have decided so, but for rounding `slack` near a tie.

    So a tie that falls otherwise, and all that follows from it, is no difference; anything else is.
    """

    def __init__(self, config: QuantConfig, q: QuantizedLinear, slack: float):
        super().__init__(config)
        self.found = [np.asarray(a, np.float64) for a in (q.codes, q.scale, q.zero)]
        self.slack = slack

    def grid(self, group: int, entered: Entered) -> tuple[np.ndarray, np.ndarray]:
        config, slack, w = self.config, self.slack, entered.w
        _, scale, zero = self.found
        scale, zero = scale[:, group], zero[:, group]
        nudges = [(s, z) for s in (-1e-5, 0.0, 1e-5) for z in (-slack, 0.0, slack)]  # 1e-5 is far below float16's step
        tried = np.array([[grid(w, config, factor, nudge) for nudge in nudges] for factor in factors(config)])
        possible = (np.abs(tried[:, :, 0] - scale) < 1e-9 * np.abs(scale)) & (tried[:, :, 1] == zero)
        assert possible.any((0, 1)).all(), f"group {group}: no factor gives the grid of rows {np.nonzero(~possible.any((0, 1)))[0]}"
        leans = (-slack, 0.0, slack) if config.grid == "loop" else (0.0,)  # there a tie changes all that follows
        cheapest = np.max([cost(tried[:, :, 0], tried[:, :, 1], entered, config, lean) for lean in leans], axis=0).max(1).min(0)
        ours = np.min([cost(scale, zero, entered, config, lean) for lean in leans], axis=0)
        step = slack * scale**2 * (w.shape[1] if config.grid == "mse" else (1 / entered.pivot).sum())
        if config.grid != "minmax":
            wrong = np.nonzero(ours > cheapest * (1 + slack) + step)[0]
            assert not wrong.size, f"group {group}: better grids exist for rows {wrong}: {ours[wrong]}, {cheapest[wrong]}"
        free = super().grid(group, entered)
        self.strayed += int(((free[0] != scale) | (free[1] != zero)).sum())
        return scale, zero

    def codes(self, column: int, level: np.ndarray) -> np.ndarray:
        code = self.found[0][:, column]
        off = np.abs(level - code)
        assert (off <= 0.5 + self.slack).all(), (
            f"column {column}, row {off.argmax()}: level {level[off.argmax()]:.6f} became code {code[off.argmax()]:.0f}"
        )
        self.strayed += int((np.round(level) != code).sum())
        return code


def gptq(problem: Problem, decide: Nearest | None = None) -> Solution:
    """The quantized weight in stored order, and each row's (w - q) H (w - q)^T."""
    w, h, importance, config = problem
    decide = decide or Nearest(config)
    order = processing_order(importance, config)
    group_of = groups(order, config)
    out, n = w.shape
    count = int(group_of.max()) + 1
    scale, zero = np.zeros((out, count)), np.zeros((out, count))
    turns = eliminate(h, order)

    def choose(g: int, w: np.ndarray) -> None:
        mine = [i for i in order if group_of[i] == g]
        scale[:, g], zero[:, g] = decide.grid(g, Entered(w[:, mine], turns.row[np.ix_(mine, mine)], turns.pivot[mine]))

    if config.static_groups:
        for g in range(count):
            choose(g, w)
    current = w.copy()
    codes, q = np.zeros((out, n)), np.zeros((out, n))
    entered: set[int] = set()
    for i in order:
        g = group_of[i]
        if g not in entered and not config.static_groups:
            choose(g, current)
        entered.add(g)
        codes[:, i] = decide.codes(i, levels(current[:, i], scale[:, g], zero[:, g], config.bits))
        q[:, i] = scale[:, g] * (codes[:, i] - zero[:, g])
        current -= np.outer((current[:, i] - q[:, i]) / turns.pivot[i], turns.row[i])
    lost = w - q
    return Solution(codes, scale, zero, group_of, np.einsum("oi,ij,oj->o", lost, h, lost), decide.strayed)
