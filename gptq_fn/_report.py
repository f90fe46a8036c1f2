"""What happened to each linear layer: plain data."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gptq_fn._config import QuantConfig


@dataclass(frozen=True)
class LinearReport:
    """One quantized linear. Errors are ||(W' - Q) X|| / ||W X|| over the calibration inputs X, without unit; the target W' is W
    unless alpha says otherwise."""

    name: str
    bits: int
    group_size: int | None
    shape: tuple[int, int]
    """(out, in)."""
    rows: int
    """Calibration tokens that reached it."""
    dead: int
    """Inputs that were 0 for all of them; their weights became 0."""
    error: float
    rtn_error: float
    """The error that rounding W to nearest would have made."""
    energy: float
    """||W X||^2 over the calibration inputs."""
    damp: float
    """The damping that the factorization needed, relative to the Hessian's mean diagonal."""
    rounded: bool = False
    """Whether it was rounded to nearest, because fewer tokens than the configuration's min_rows reached it."""
    alpha: float = 0.0
    """How much of what rounding before it changed in its inputs the target makes good."""
    restored: float = 0.0
    """By how much the target W' lowers ||W X_float - W' X||^2 for each of the tokens that it was fitted to, relative to ||W X||^2 for
    each token; X_float are the float model's inputs."""
    restored_held_out: float | None = None
    """The same on samples that were held out; far less than `restored` where the others are too few to learn from. None where
    alpha was given."""

    @property
    def loss(self) -> float:
        """||(W' - Q) X||^2 over the calibration inputs, which adds up over linears."""
        return self.error**2 * self.energy


@dataclass(frozen=True)
class Report:
    """The configuration and every quantized linear in forward order."""

    config: QuantConfig
    linears: tuple[LinearReport, ...]

    def worst(self, n: int = 5) -> tuple[LinearReport, ...]:
        """The `n` linears with the largest errors, the worst first."""
        return tuple(sorted(self.linears, key=lambda x: -x.error)[:n])

    @property
    def error(self) -> float:
        """||(W' - Q) X|| / ||W X|| over all linears together."""
        energy = sum(x.energy for x in self.linears)
        return math.sqrt(sum(x.loss for x in self.linears) / energy) if energy else 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits of codes, 16-bit scales and zero points, per quantized weight."""
        weights = sum(x.shape[0] * x.shape[1] for x in self.linears)
        return sum(stored_bits(x.shape, x.bits, x.group_size) for x in self.linears) / max(weights, 1)

    @property
    def rounded(self) -> tuple[LinearReport, ...]:
        """The linears that too few calibration tokens reached, which were rounded to nearest."""
        return tuple(x for x in self.linears if x.rounded)

    @property
    def restored(self) -> tuple[float, float] | None:
        """`restored` and `restored_held_out` on average over the linears whose alpha was chosen, or None where there are none."""
        chosen = [(x.restored, x.restored_held_out) for x in self.linears if x.restored_held_out is not None]
        return (sum(a for a, _ in chosen) / len(chosen), sum(b for _, b in chosen) / len(chosen)) if chosen else None

    def table(self, linears: Iterable[LinearReport] | None = None) -> str:
        """A text table of these linears; of all of them by default."""
        head = ("linear", "bits", "error", "rounding", "damp", "dead", "rows")
        body = [
            (x.name, str(x.bits), f"{x.error:.4f}", f"{x.rtn_error:.4f}", f"{x.damp:.3g}", str(x.dead), str(x.rows))
            for x in (self.linears if linears is None else linears)
        ]
        widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
        lines = [(row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))) for row in (head, *body)]
        return "\n".join("  ".join(line) for line in lines)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data."""
        return asdict(self) | {"config": self.config.as_dict()}


def stored_bits(shape: tuple[int, int], bits: int, group_size: int | None) -> int:
    """Bits of the codes, 16-bit scales and zero points of a linear of this shape (out, in)."""
    out, inputs = shape
    groups = 1 if group_size is None else -(-inputs // group_size)
    return out * (inputs * bits + groups * (16 + bits))
