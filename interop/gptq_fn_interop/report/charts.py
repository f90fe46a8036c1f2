"""Charts for the page: heat maps as tables, lines as SVG. Both take their colours from page.css, light or dark."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.markup import tag
from gptq_fn_interop.report.read import Cell, by_role, span_of

SHADES = 8
"""Steps of a heat map's colours."""

MOST_WITH_NUMBERS = 34
"""Columns of a heat map up to which its cells are wide enough for numbers."""

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 190, 38, 8, 8, 22
"""Of a chart of lines, and its margins, in CSS pixels where it is shown in its own size."""


class Spot(NamedTuple):
    """A cell of a heat map. `mark` is a letter beside the number, `title` tells all when the pointer rests on it."""

    value: float | None
    text: str
    title: str
    mark: str = ""


class Line(NamedTuple):
    """A line over blocks, (block, value, what to tell of it); `kind` is its class in page.css."""

    kind: str
    points: Sequence[tuple[int, float, str]]
    dots: bool = False


def in_shades(values: Iterable[float | None]) -> tuple[Callable[[float], int], list[float]]:
    """Which shade a value has, and where each begins: in equal ratios up to the largest, from where a twentieth is smaller."""
    found = sorted(value for value in values if value is not None and math.isfinite(value) and value > 0) or [1.0]
    low, high = found[len(found) // 20], found[-1]
    if high <= low * 1.0001:
        return (lambda _: SHADES // 2), [low]
    edges = [low * (high / low) ** (n / SHADES) for n in range(SHADES)]
    return (lambda value: max(0, sum(value >= edge for edge in edges) - 1)), edges


def heat_map(
    caption: str,
    cells: Sequence[Cell],
    spot_of: Callable[[Cell], Spot],
    shade: Callable[[float], int],
    legend: Iterable[tuple[int, str]],
    explained: Sequence[str] = (),
) -> Element:
    """A table of the cells, roles by blocks from left to right, that scrolls in its own box where it is wider than the page."""
    first, last = span_of(cells)
    held = {cell.block: None for cell in sorted(cells, key=lambda cell: cell.block or 0)}
    columns = range(first, last + 1) if last - first < 2 * len(held) else held
    dense = len(columns) > MOST_WITH_NUMBERS
    every = 10 if len(columns) > 60 else 5 if dense else 1
    head = [tag("th", tag("span", str(n), class_="unseen" if (n or 0) % every else None), scope="col") for n in columns]
    body = []
    for role, mine in by_role(cells).items():
        spots = {cell.block: spot_of(cell) for cell in mine}
        body.append(tag("tr", tag("th", role, scope="row"), [_cell(spots.get(n), f"{role}, block {n}", shade) for n in columns]))
    table = tag(
        "table",
        tag("caption", caption, class_="unseen"),
        tag("thead", tag("tr", tag("th", "block", scope="col"), head)),
        tag("tbody", body),
    )
    swatches = [tag("span", text, class_=f"swatch h{n}") for n, text in legend]
    return tag(
        "figure",
        tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption),
        tag("figcaption", tag("span", swatches, class_="swatches"), [tag("span", text) for text in explained]),
        class_="heat dense" if dense else "heat",
    )


def _cell(spot: Spot | None, where: str, shade: Callable[[float], int]) -> Element:
    if spot is None:
        return tag("td", tag("span", "none", class_="unseen"), class_="absent", title=f"{where}: not quantized")
    known = spot.value is not None and math.isfinite(spot.value)
    number = tag("span", spot.text if known else "?", class_="number")
    return tag(
        "td",
        number,
        tag("b", spot.mark) if spot.mark else None,
        class_=f"h{shade(spot.value)}" if known and spot.value else "hu",
        title=spot.title,
    )


class Scale(NamedTuple):
    """From values to heights in a chart: logarithmic or not."""

    low: float
    high: float
    log: bool

    def at(self, value: float) -> float:
        """The height, 0 at the bottom and 1 at the top."""
        if self.log:
            value = max(value, self.low)
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Three to seven round values."""
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
            step *= next(n for n in (1, 2, 5, 10) if (self.high - self.low) / (n * step) <= 6)
            return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for digits in ((1, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
            found = [n * 10.0**d for d in decades for n in digits if self.low <= n * 10.0**d <= self.high]
            if len(found) <= 6:
                break
        return found[:: -(-len(found) // 6)] if found else [self.low, self.high]


def log_scale(values: Iterable[float]) -> Scale:
    """A scale for positive values, with some room."""
    found = [value for value in values if value > 0 and math.isfinite(value)]
    return Scale(min(found, default=0.01) / 1.15, max(found, default=0.1) * 1.15, True)


def linear_scale(values: Iterable[float]) -> Scale:
    """A scale from 0 or below to 0 or above, with some room."""
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found, default=0.0), max(found, default=1.0)
    room = 0.08 * (max(high, 0.0) - min(low, 0.0)) or 0.01
    return Scale(min(low - room, 0.0) if low < 0 else 0.0, max(high + room, 0.0), False)


def lines(
    name: str, title: str, told: str, blocks: tuple[int, int], scale: Scale, drawn: Sequence[Line], *, behind: str | None = None
) -> Element:
    """A chart of lines over blocks, from the first to the last of `blocks`; `told` says in words what they show.

    `name` is its id. `behind` is the id of a path in the same measures, as `paths` makes them, to draw in the background.
    """
    place = _placing(blocks, scale)
    rules = [
        [
            tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}", class_="rule"),
            tag("text", f"{_short(100 * tick)}%", x=LEFT - 5, y=f"{y + 3.5:.1f}", text_anchor="end"),
        ]
        for tick in scale.ticks()
        for y in [place(blocks[0], tick)[1]]
    ]
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if (blocks[1] - blocks[0]) / n <= 8)
    numbers = [
        tag("text", str(n), x=f"{place(n, scale.high)[0]:.1f}", y=HEIGHT - 6, text_anchor="middle")
        for n in range(-(-blocks[0] // every) * every, blocks[1] + 1, every)
    ]
    return tag(
        "svg",
        tag("title", title, id=f"{name}-title"),
        tag("desc", told, id=f"{name}-desc"),
        rules,
        numbers,
        tag("use", href=f"#{behind}") if behind else None,
        [_line(line, place) for line in drawn],
        id=name,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
    )


def paths(name: str, blocks: tuple[int, int], scale: Scale, drawn: Sequence[Line]) -> Element:
    """The path of all these lines, to stand in the background of other charts under this id."""
    place = _placing(blocks, scale)
    path = tag("path", id=name, d="".join(_path([place(n, value) for n, value, _ in line.points]) for line in drawn), class_="behind")
    return tag("svg", tag("defs", path), width=0, height=0, aria_hidden="true", class_="unseen")


def _placing(blocks: tuple[int, int], scale: Scale) -> Callable[[int, float], tuple[float, float]]:
    first, last = blocks
    wide, high = WIDTH - LEFT - RIGHT - 8, HEIGHT - TOP - BOTTOM

    def place(n: int, value: float) -> tuple[float, float]:
        return LEFT + 4 + wide * ((n - first) / (last - first) if last > first else 0.5), TOP + high * (1 - scale.at(value))

    return place


def _line(line: Line, place: Callable[[int, float], tuple[float, float]]) -> list[Element]:
    at = [(place(n, value), told) for n, value, told in line.points]
    path = tag("path", d=_path([point for point, _ in at]), class_=line.kind)
    if not line.dots:
        return [path]
    dots = [tag("circle", tag("title", told), cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.2, class_=line.kind) for (x, y), told in at]
    return [path, *dots]


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "".join(f"{'L' if n else 'M'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(points))


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 10 else f"{value:.2g}"
