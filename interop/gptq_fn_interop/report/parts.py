"""What the sections of the page are made of."""

import re
from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.markup import Child, tag
from gptq_fn_interop.report.read import Cell
from gptq_fn_interop.report.words import per_cent

FEW = 12
"""Rows of a table of the most remarkable linears."""

Row = Sequence[Child]


def section(title: str, *children: Child) -> Element:
    """A section of the page."""
    return tag("section", tag("h2", title), *children)


def note(*children: Child) -> Element:
    """A paragraph that explains."""
    return tag("p", *children, class_="note")


def table(head: Sequence[str], rows: Iterable[Row]) -> Element:
    """A table whose first column holds words, and that scrolls in its own box where it is too wide. Spans hold words, too."""

    def cell(n: int, child: Child) -> Element:
        kind = child.get("class", "words") if isinstance(child, Element) and child.tag == "span" else None if n else "words"
        return tag("td", child, class_=kind)

    heads = [tag("th", name, scope="col", class_="right" if n else None) for n, name in enumerate(head)]
    body = [tag("tr", [cell(n, child) for n, child in enumerate(row)]) for row in rows]
    made = tag("table", tag("thead", tag("tr", heads)), tag("tbody", body), class_="data")
    return tag("div", made, class_="scroll", tabindex=0, role="region", aria_label=f"table: {', '.join(head)}")


def first_few(head: Sequence[str], rows: Sequence[Row]) -> list[Element]:
    """A table of the first rows, and the number of those left out."""
    return [table(head, rows[:FEW]), *([note(f"and {len(rows) - FEW:,} more")] if len(rows) > FEW else [])]


def pairs(of_them: Iterable[tuple[str, str]]) -> Element:
    """Names with their values."""
    return tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in of_them], class_="pairs")


def name_of(name: str) -> Element:
    """The name of a linear."""
    return tag("span", breaking(name), class_="name")


def breaking(name: str) -> Child:
    """A name that may break behind its dots and slashes."""
    first, *others = re.split(r"(?<=[./])", name)
    return first, [(tag("wbr"), part) for part in others]


def exactly(value: float | None) -> Child:
    """An error in per cent, with the number of the file behind it."""
    return "unknown" if value is None else tag("data", per_cent(value), value=repr(value))


def key(kind: str, text: str) -> Element:
    """What a line of this kind stands for."""
    return tag("li", tag("svg", tag("line", x1=0, y1=5, x2=30, y2=5, class_=kind), viewBox="0 0 30 10", aria_hidden="true"), text)


def keys(*of_them: Element | None) -> Element:
    """What the lines of a chart stand for."""
    return tag("ul", of_them, class_="key")


def told_of(cell: Cell) -> str:
    """What there is to tell of a cell when the pointer rests on it."""
    mean, rounding = cell.mean(), cell.mean("rtn_error")
    parts = [f"{cell.name}: {per_cent(mean)}"]
    if len(cell.linears) > 1:
        parts = [f"{cell.name}: {len(cell.linears)} experts, mean {per_cent(mean)}, worst {per_cent(cell.largest())}"]
    parts.append(f"rounding to nearest {per_cent(rounding)}")
    if cell.rounded:
        parts.append(f"{cell.rounded} rounded to nearest")
    if cell.raised:
        parts.append(f"damping raised in {cell.raised}")
    return ", ".join(parts)
