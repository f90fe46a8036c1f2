"""What report.json tells, also when an older version wrote it: what is missing there is None."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptq_fn_interop.report.run import REPORT, SCHEMA

EVALUATION = "evaluation.json"
"""The file beside report.json with what gptq-fn eval measured, if there is one."""


@dataclass(frozen=True)
class Linear:
    """One quantized linear, as `gptq_fn.LinearReport` tells of it."""

    name: str
    bits: int
    group_size: int | None
    shape: tuple[int, int]
    error: float
    rtn_error: float | None
    rows: int | None
    dead: int | None
    energy: float | None
    damp: float | None
    asked: float | None
    """The damping with which the factorization began."""
    rounded: bool
    alpha: float | None
    restored: float | None
    restored_held_out: float | None

    @property
    def raised(self) -> bool:
        """Whether the factorization needed more damping than was asked for."""
        return not self.rounded and self.damp is not None and self.asked is not None and self.damp > self.asked * 1.001

    @property
    def reached(self) -> bool:
        """Whether calibration tokens reached it, so that its error means something."""
        return self.rows != 0


@dataclass(frozen=True)
class Told:
    """A report: the linears in forward order, and JSON of all else."""

    directory: Path
    linears: tuple[Linear, ...]
    config: Mapping[str, Any]
    run: Mapping[str, Any]
    """Of the run as a whole: see `gptq_fn_interop.report.run`; empty in older files."""
    left: tuple[tuple[str, str], ...]
    """What stayed as it was, with the reason."""
    measured: tuple[Mapping[str, Any], ...]
    """What was measured of the model."""
    tensor_bytes: int | None
    """The size of the tensor files beside the report."""

    @property
    def model(self) -> str:
        """What the model is called."""
        return str(self.run.get("model") or self.directory.resolve().name)

    @property
    def asymmetric(self) -> bool:
        """Whether some linear aims at another target than its weight."""
        return any(x.alpha for x in self.linears) or any(x.restored_held_out is not None for x in self.linears)

    def error(self, of: str = "error") -> float | None:
        """||(W' - Q) X|| / ||W X|| over all linears together, or the `rtn_error`; None where the file does not tell."""
        parts = [(error, x.energy) for x in self.linears if (error := getattr(x, of)) is not None and x.energy is not None]
        energy = sum(energy for _, energy in parts)
        if len(parts) < len(self.linears) or not energy:
            return None
        return math.sqrt(sum(error**2 * energy for error, energy in parts) / energy)


def read_report(directory: str | Path, evaluations: Sequence[str | Path] = ()) -> Told:
    """The report in a directory; `evaluations` are files of gptq-fn eval, by default the evaluation.json there, if there is one.

    Raises ValueError or OSError in a sentence.
    """
    directory = Path(directory)
    if not (file := directory / REPORT).is_file():
        raise FileNotFoundError(f"There is no {REPORT} in {directory}; give a directory that gptq-fn quantize wrote.")
    found = _json(file)
    if not isinstance(found, dict) or not isinstance(found.get("linears"), list):
        raise ValueError(f"{file} is not a report of gptq-fn: it holds no list of linears. Quantize again, or restore the file.")
    if (schema := found.get("schema", SCHEMA)) != SCHEMA:
        raise ValueError(f"{file} is of schema {schema!r}, this version of gptq-fn reads schema {SCHEMA}; use the version that wrote it.")
    config = _object(found.get("config"))
    try:
        linears = tuple(_linear(x, config) for x in found["linears"])
        left = tuple((str(name), str(why)) for name, why in found.get("left", ()))
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        what = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file} is damaged: {what}. Quantize again, or restore the file.") from None
    files = [path.stat().st_size for path in directory.glob("*.safetensors")]
    return Told(directory, linears, config, _object(found.get("run")), left, _measured(directory, evaluations), sum(files) or None)


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it is not JSON ({error}). Write it again, or restore it.") from None


def _measured(directory: Path, evaluations: Sequence[str | Path]) -> tuple[Mapping[str, Any], ...]:
    if not evaluations:
        return _measured(directory, [directory / EVALUATION]) if (directory / EVALUATION).is_file() else ()
    measured = []
    for file in map(Path, evaluations):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}; write one with gptq-fn eval --json, or leave --eval out.")
        found = _json(file)
        found = found if isinstance(found, list) else [found]
        if not all(isinstance(x, dict) for x in found):
            raise ValueError(f"{file} holds no evaluation: an object or a list of objects was expected. Write it with gptq-fn eval --json.")
        measured.extend(found)
    return tuple(measured)


def _linear(told: Mapping[str, Any], config: Mapping[str, Any]) -> Linear:
    name, (out, inputs), rows = str(told["name"]), told["shape"], _whole(told.get("rows"))
    return Linear(
        name=name,
        bits=int(told["bits"]),
        group_size=_whole(told.get("group_size")),
        shape=(int(out), int(inputs)),
        error=float(told["error"]),
        rtn_error=_number(told.get("rtn_error")),
        rows=rows,
        dead=_whole(told.get("dead")),
        energy=_number(told.get("energy")),
        damp=_number(told.get("damp")),
        asked=_asked(name, int(inputs), rows, config),
        rounded=bool(told.get("rounded", False)),
        alpha=_number(told.get("alpha")),
        restored=_number(told.get("restored")),
        restored_held_out=_number(told.get("restored_held_out")),
    )


def _asked(name: str, inputs: int, rows: int | None, config: Mapping[str, Any]) -> float | None:
    """The damping that the configuration asks for; where it leaves the choice, that of `gptq_fn.factor`."""
    for rule in config.get("rules") or ():
        if re.match(rule["pattern"], name):
            config = rule["config"] or {}
            break
    if "damp" not in config:
        return None
    if (damp := config["damp"]) is not None:
        return float(damp)
    return None if rows is None else min(1.0, max(0.01, inputs / max(rows, 1)))


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _whole(value: Any) -> int | None:
    return None if value is None else int(value)


# in blocks


@dataclass(frozen=True)
class Cell:
    """The linears of one role in one block: one, or as many as there are experts. `block` is None outside the blocks."""

    role: str
    block: int | None
    linears: tuple[Linear, ...]

    @property
    def name(self) -> str:
        """The name of the linear, or what those of the experts have in common."""
        return self.linears[0].name if len(self.linears) == 1 else _EXPERT.sub(".*", self.linears[0].name)

    def mean(self, of: str = "error") -> float | None:
        """The mean over the linears that calibration tokens reached; None where there are none."""
        found = [value for x in self.linears if x.reached and (value := getattr(x, of)) is not None and math.isfinite(value)]
        return sum(found) / len(found) if found else None

    def largest(self, of: str = "error") -> float | None:
        """The largest of its linears; None where no calibration token reached one or the file does not tell."""
        found = [value for x in self.linears if x.reached and (value := getattr(x, of)) is not None and math.isfinite(value)]
        return max(found, default=None)

    @property
    def rounded(self) -> int:
        """How many were rounded to nearest."""
        return sum(x.rounded for x in self.linears)

    @property
    def raised(self) -> int:
        """How many needed more damping than was asked for."""
        return sum(x.raised for x in self.linears)


_BLOCK = re.compile(r"(?:(.*?)\.)??(\d{1,9})\.(.+)", re.DOTALL)
_EXPERT = re.compile(r"(?<=expert|xperts)\.\d+(?=\.|$)")


def cells_of(linears: Iterable[Linear]) -> tuple[Cell, ...]:
    """The linears by role and block, in forward order; the role tells the stack of blocks where there are several.

    The first part of a name that is a number is that of the block, and what follows the role; numbers of experts are left out of it.
    """
    places: dict[tuple[str, str, int | None], list[Linear]] = {}
    for x in linears:
        found = _BLOCK.fullmatch(x.name)
        stack, block, role = (found[1] or "", int(found[2]), _EXPERT.sub(".*", found[3])) if found else ("", None, x.name)
        places.setdefault((stack, role, block), []).append(x)
    several = len({stack for stack, _, block in places if block is not None}) > 1
    return tuple(
        Cell(f"{stack}.{role}" if several and block is not None else role, block, tuple(found))
        for (stack, role, block), found in places.items()
    )


def in_blocks(cells: Iterable[Cell]) -> list[Cell]:
    """Those of linears that stand in a numbered block."""
    return [cell for cell in cells if cell.block is not None]


def by_role(cells: Iterable[Cell]) -> dict[str, list[Cell]]:
    """The cells of each role."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell.role, []).append(cell)
    return found


def span_of(cells: Iterable[Cell]) -> tuple[int, int]:
    """The numbers of the first and the last block."""
    numbers = [cell.block for cell in cells if cell.block is not None]
    return min(numbers), max(numbers)
