"""The section on bits and bytes: what codes take, and what scales and zero points take beside them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from xml.etree.ElementTree import Element

from gptq_fn import stored_bits
from gptq_fn_interop.report.charts import SHADES, Spot, heat_map
from gptq_fn_interop.report.markup import tag
from gptq_fn_interop.report.parts import Row, note, section, table
from gptq_fn_interop.report.read import Cell, Linear, Told, in_blocks
from gptq_fn_interop.report.words import size_of


def sizes(told: Told, cells: Sequence[Cell]) -> Element:
    """By scheme, and where there are several, by role and block."""
    schemes: dict[tuple[int, int | None], list[Linear]] = defaultdict(list)
    for x in told.linears:
        schemes[x.bits, x.group_size].append(x)
    rows = [
        _scheme(f"{bits} bits, {f'groups of {group_size}' if group_size else 'one group a row'}", schemes[bits, group_size])
        for bits, group_size in sorted(schemes, key=lambda scheme: (scheme[0], scheme[1] or math.inf))
    ]
    if len(schemes) > 1:
        rows.append(_scheme("all", told.linears))
    weights, bits = totals(told.linears)
    codes = _codes(told.linears)
    parts = [("codes", codes / 8, "h4"), ("scales and zero points", (bits - codes) / 8, "h7")]
    shares = {name: size / max(bits / 8, 1) for name, size, _ in parts}
    said = "; ".join(f"{name} {size_of(size)} ({shares[name]:.1%})" for name, size, _ in parts)
    bar = [tag("span", class_=kind, style=f"width:{shares[name]:.2%}", title=f"{name}: {size_of(size)}") for name, size, kind in parts]
    beside = None if told.tensor_bytes is None else f"The tensor files beside the report have {size_of(told.tensor_bytes)} in all."
    return section(
        "Bits and bytes",
        tag("div", bar, class_="bar", role="img", aria_label=said),
        note(
            f"Left to right: {said}. Scales take 16 bits, a zero point as many as a code. "
            f"In 16 bits these weights take {size_of(2 * weights)}. ",
            beside,
        ),
        table(("scheme", "linears", "weights", "codes", "scales, zero points", "bits a weight"), rows),
        _bits_map(in_blocks(cells)) if len(schemes) > 1 else None,
    )


def totals(linears: Iterable[Linear]) -> tuple[int, int]:
    """Weights, and the bits in which they are stored, scales and zero points included."""
    shapes = [(x.shape, x.bits, x.group_size) for x in linears]
    return sum(math.prod(shape) for shape, _, _ in shapes), sum(stored_bits(*each) for each in shapes)


def _codes(linears: Iterable[Linear]) -> int:
    return sum(math.prod(x.shape) * x.bits for x in linears)


def _scheme(name: str, linears: Sequence[Linear]) -> Row:
    weights, bits = totals(linears)
    codes = _codes(linears)
    return name, f"{len(linears):,}", f"{weights:,}", size_of(codes / 8), size_of((bits - codes) / 8), f"{bits / max(weights, 1):.3f}"


def _bits_map(cells: Sequence[Cell]) -> Element | None:
    if not cells:
        return None
    values = sorted({bits_a_weight(cell) for cell in cells})
    steps: Mapping[float, int] = {value: round((SHADES - 1) * n / max(len(values) - 1, 1)) for n, value in enumerate(values)}

    def spot(cell: Cell) -> Spot:
        return Spot(bits_a_weight(cell), f"{bits_a_weight(cell):.1f}", f"{cell.name}: {bits_a_weight(cell):.3f} bits a weight")

    shown = values if len(values) <= SHADES else [values[0], values[-1]]
    legend = [(steps[value], f"{value:.2f}") for value in shown]
    return heat_map("Bits a weight by role and block", cells, spot, lambda value: steps[value], legend, ("bits a weight",))


def bits_a_weight(cell: Cell) -> float:
    """Bits a weight of a cell, scales and zero points included."""
    weights, bits = totals(cell.linears)
    return round(bits / max(weights, 1), 3)
