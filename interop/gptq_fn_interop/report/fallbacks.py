"""The section on what did not go as asked: dampings, linears rounded to nearest, dead inputs, and what was left."""

from collections.abc import Sequence
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.markup import tag
from gptq_fn_interop.report.parts import Row, first_few, name_of, note, section, table
from gptq_fn_interop.report.read import Cell, Told, by_role
from gptq_fn_interop.report.words import figure, value_of, whole


def fallbacks(told: Told, cells: Sequence[Cell]) -> Element:
    """What there is of each kind in a table, and a sentence where there is nothing."""
    rounded = sorted((x for x in told.linears if x.rounded), key=lambda x: x.rows or 0)
    raised = sorted((x for x in told.linears if x.raised), key=lambda x: -(x.damp or 0))
    dead = sorted((x for x in told.linears if x.dead), key=lambda x: -(x.dead or 0) / max(x.shape[1], 1))
    few = f"fewer than {value_of(told.config['min_rows'])}" if "min_rows" in told.config else "too few"
    kinds: list[tuple[str, str, str, Sequence[str], Sequence[Row]]] = [
        (
            "Rounded to nearest",
            f"Linears that {few} calibration tokens reached.",
            f"None was rounded to nearest because {few} calibration tokens reached it.",
            ("linear", "tokens"),
            [(name_of(x.name), whole(x.rows)) for x in rounded],
        ),
        (
            "Damping raised",
            "Factorizations that failed with the damping asked for, which was doubled until they did not.",
            "None needed more damping than was asked for."
            if any(x.asked is not None for x in told.linears)
            else "Whether damping had to be raised is unknown.",
            ("linear", "asked", "needed"),
            [(name_of(x.name), figure(x.asked), figure(x.damp)) for x in raised],
        ),
        (
            "Dead inputs",
            "Inputs that were 0 for every calibration token; their weights became 0.",
            "None has inputs that were 0 for every calibration token.",
            ("linear", "dead", "of inputs"),
            [(name_of(x.name), whole(x.dead), whole(x.shape[1])) for x in dead],
        ),
        (
            "Left as they were",
            "What of the blocks was not quantized, and why.",
            "",
            ("linear", "why"),
            [(name_of(name), tag("span", why)) for name, why in told.left],
        ),
    ]
    return section(
        "Damping and fallbacks",
        tag("p", " ".join([_damping(told), *(none for _, _, none, _, rows in kinds if none and not rows)])),
        [
            [
                tag("h3", f"{title}: {len(rows):,} linears"),
                note(what),
                _experts(cells) if title == "Rounded to nearest" else None,
                first_few(head, rows),
            ]
            for title, what, _, head, rows in kinds
            if rows
        ],
    )


def _damping(told: Told) -> str:
    found = sorted(x.damp for x in told.linears if x.damp is not None and not x.rounded)
    if not found:
        return "The damping is not known."
    asked = told.config.get("damp", "unknown")
    by = "inputs / tokens, from 0.01 to 1," if asked is None else str(asked)
    used = f"{figure(found[0])} to {figure(found[-1])}, median {figure(found[len(found) // 2])}"
    if found[0] == found[-1]:
        used = f"{figure(found[0])} for all"
    return f"Damping, relative to the mean of the Hessian's diagonal: {by} was asked for; used were {used}."


def _experts(cells: Sequence[Cell]) -> Element | None:
    """How many tokens reached the experts."""
    rows = []
    for role, found in by_role(cell for cell in cells if len(cell.linears) > 1).items():
        linears = [x for cell in found for x in cell.linears]
        tokens, rounded = sorted(x.rows or 0 for x in linears), sum(x.rounded for x in linears)
        rows.append((name_of(role), f"{rounded:,} of {len(linears):,}", *map(whole, (tokens[0], tokens[len(tokens) // 2], tokens[-1]))))
    return table(("experts", "rounded", "fewest tokens", "median", "most"), rows) if rows else None
