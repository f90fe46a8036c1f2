"""The sections on errors: by role and block, over depth beside rounding to nearest, and the largest."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.charts import Line, Spot, heat_map, in_shades, lines, log_scale, paths
from gptq_fn_interop.report.markup import tag
from gptq_fn_interop.report.parts import FEW, exactly, key, keys, name_of, note, section, table, told_of
from gptq_fn_interop.report.read import Cell, Linear, by_role, in_blocks, span_of
from gptq_fn_interop.report.words import figure, percent, whole


def error_map(cells: Sequence[Cell]) -> Element:
    """The error of every linear, or of the worst of the experts, by role and block."""
    inside, outside = in_blocks(cells), [cell for cell in cells if cell.block is None]
    shade, edges = in_shades(cell.largest() for cell in inside)
    several = any(len(cell.linears) > 1 for cell in inside)
    some = "some " if several else ""
    marks = (
        (f"r: {some}rounded to nearest", any(cell.rounded for cell in inside)),
        (f"d: damping of {some}raised" if several else "d: damping raised", any(cell.raised for cell in inside)),
        ("dashed: 0, or no token reached it", any(not cell.largest() for cell in inside)),
    )

    def spot(cell: Cell) -> Spot:
        worst = cell.largest()
        return Spot(worst, percent(worst), told_of(cell), "r" * bool(cell.rounded) or "d" * bool(cell.raised))

    return section(
        "Error by role and block",
        note(
            "Relative error ||(W' - Q) X|| / ||W X|| over the calibration inputs X, in per cent: how far the outputs of the quantized "
            "linear are from those that it aims at. ",
            "Of the experts of a block the worst is shown. " if several else None,
            "Darker is worse in the light scheme, brighter in the dark one." if inside else "No linear stands in a numbered block.",
        ),
        heat_map("Relative error in per cent by role and block", inside, spot, shade, _legend(edges), [text for text, on in marks if on])
        if inside
        else None,
        note("Outside the blocks: ", "; ".join(map(told_of, outside))) if outside else None,
    )


def _legend(edges: Sequence[float]) -> list[tuple[int, str]]:
    if len(edges) == 1:
        return [(4, f"{percent(edges[0])}%")]
    return [(0, f"< {percent(edges[1])}%"), *((n, f"≥ {percent(edge)}%") for n, edge in enumerate(edges) if n)]


def errors_over_depth(cells: Sequence[Cell]) -> Element | None:
    """A chart for each role, with those of the others behind; None where no role is in several blocks."""
    roles = {role: found for role, found in by_role(in_blocks(cells)).items() if len(found) > 1}
    drawn = {role: _lines(found) for role, found in roles.items()}
    if not any(drawn.values()):
        return None
    blocks = span_of(cell for found in roles.values() for cell in found)
    kinds: dict[str, list[Line]] = defaultdict(list)
    for line in (line for found in drawn.values() for line in found):
        kinds[line.kind].append(line)
    scale = log_scale(value for found in kinds.values() for line in found for _, value, _ in line.points)
    panels = [
        tag(
            "figure",
            tag("figcaption", name_of(role)),
            lines(f"depth-{n}", role, _in_words(role, roles[role]), blocks, scale, found, behind="all-roles"),
        )
        for n, (role, found) in enumerate(drawn.items())
    ]
    return section(
        "Error over depth, beside rounding to nearest",
        note(
            "The same errors from the first block to the last, on one logarithmic scale for all roles. Rounding to nearest is what the "
            "weights alone would give, without calibration."
        ),
        keys(
            key("gptq", "GPTQ, mean of the experts" if kinds["worst"] else "GPTQ"),
            key("worst", "GPTQ, worst expert") if kinds["worst"] else None,
            key("rtn", "rounding to nearest") if kinds["rtn"] else None,
            key("behind", "GPTQ in the other roles"),
        ),
        paths("all-roles", blocks, scale, kinds["gptq"]),
        tag("div", panels, class_="panels"),
    )


def _lines(cells: Sequence[Cell]) -> list[Line]:
    """What is drawn of one role."""
    found = [Line("rtn", _points(cells, lambda cell: cell.mean("rtn_error"))), Line("gptq", _points(cells, Cell.mean), dots=True)]
    if any(len(cell.linears) > 1 for cell in cells):
        found.append(Line("worst", _points(cells, Cell.largest)))
    return [line for line in found if line.points]


def _points(cells: Sequence[Cell], value_of: Callable[[Cell], float | None]) -> list[tuple[int, float, str]]:
    """Of the blocks whose value is known and has a logarithm."""
    known = [(cell, value_of(cell)) for cell in sorted(cells, key=lambda cell: cell.block or 0)]
    return [(cell.block, value, told_of(cell)) for cell, value in known if value and cell.block is not None]


def _in_words(role: str, cells: Sequence[Cell]) -> str:
    known = [(value, cell.block or 0) for cell in cells if (value := cell.largest()) is not None]
    if not known:
        return f"{role}: no errors are known."
    (low, first), (high, last) = min(known), max(known)
    return f"{role}: from {percent(low)} per cent in block {first} to {percent(high)} per cent in block {last}."


def largest_errors(cells: Sequence[Cell]) -> Element:
    """The linears with the largest errors, each expert on its own."""

    def damping(x: Linear) -> str:
        return "not used" if x.rounded else figure(x.damp)

    known = (x for cell in cells for x in cell.linears if x.reached and math.isfinite(x.error))
    worst = sorted(known, key=lambda x: -x.error)[:FEW]
    rows = [(name_of(x.name), exactly(x.error), exactly(x.rtn_error), str(x.bits), whole(x.rows), damping(x)) for x in worst]
    return section("The largest errors", table(("linear", "error", "rounding", "bits", "tokens", "damping"), rows))
