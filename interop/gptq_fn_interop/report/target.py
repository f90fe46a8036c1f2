"""The section on the asymmetric target: alpha, and what it restores on calibration samples and on those held out."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.charts import Line, linear_scale, lines
from gptq_fn_interop.report.markup import tag
from gptq_fn_interop.report.parts import key, keys, name_of, note, section, table
from gptq_fn_interop.report.read import Cell, Linear, Told, by_role, in_blocks
from gptq_fn_interop.report.words import per_cent


def target(told: Told, cells: Sequence[Cell]) -> Element | None:
    """None where every linear aims at its weight."""
    if not told.asymmetric:
        return None
    rows = []
    for role, found in by_role(cells).items():
        linears = [x for cell in found for x in cell.linears]
        alphas, restored, held = (_known(linears, of) for of in ("alpha", "restored", "restored_held_out"))
        mean = f"{sum(alphas) / len(alphas):.2f}" if alphas else "unknown"
        between = f"{min(alphas):.2f} to {max(alphas):.2f}" if alphas else "unknown"
        rows.append((name_of(role), mean, between, _mean(restored, "unknown"), _mean(held, "none held out")))
    return section(
        "The asymmetric target",
        note(
            "Linears make good what rounding before them changed in their inputs: the target W' lies the share alpha of the way from W to "
            "what fits the outputs of the float model best. Restored is by how much that lowers ||W X_float - W' X||^2, relative to "
            "||W X||^2; on samples held out it tells whether the calibration data sufficed. Errors above are of this target, those of "
            "rounding to nearest of W."
        ),
        _over_depth(in_blocks(cells)),
        table(("role", "alpha, mean", "alpha, range", "restored", "on samples held out"), rows),
    )


def _over_depth(cells: Sequence[Cell]) -> list[Element]:
    """What is restored over depth; nothing where that is one block or unknown."""
    blocks: dict[int, list[Linear]] = defaultdict(list)
    for cell in cells:
        blocks[cell.block or 0].extend(cell.linears)
    learned, held = _means(blocks, "restored"), _means(blocks, "restored_held_out")
    if len(blocks) < 2 or not learned:
        return []
    drawn = [Line("gptq", learned, dots=True), *([Line("rtn", held, dots=True)] if held else [])]
    scale = linear_scale(value for line in drawn for _, value, _ in line.points)
    words = "The mean over the linears of each block, of what the target restores on calibration samples and on those held out."
    chart = lines("target", "What the target restores", words, (min(blocks), max(blocks)), scale, drawn)
    return [
        keys(key("gptq", "restored on calibration samples"), key("rtn", "on samples held out") if held else None),
        tag("div", chart, class_="panels"),
    ]


def _means(blocks: Mapping[int, Sequence[Linear]], of: str) -> list[tuple[int, float, str]]:
    known = [(n, found) for n, linears in sorted(blocks.items()) if (found := _known(linears, of))]
    return [(n, sum(found) / len(found), f"block {n}: {_mean(found, '')}") for n, found in known]


def _known(linears: Sequence[Linear], of: str) -> list[float]:
    return [value for x in linears if (value := getattr(x, of)) is not None and math.isfinite(value)]


def _mean(values: Sequence[float], missing: str) -> str:
    return per_cent(sum(values) / len(values)) if values else missing
