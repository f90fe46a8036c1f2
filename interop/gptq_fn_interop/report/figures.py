"""Figures of a report for papers, drawn with matplotlib, which is imported when they are drawn."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptq_fn_interop.report.charts import MOST_WITH_NUMBERS
from gptq_fn_interop.report.markup import plain
from gptq_fn_interop.report.read import Cell, Told, by_role, cells_of, in_blocks, span_of
from gptq_fn_interop.report.sizes import bits_a_weight
from gptq_fn_interop.report.words import percent

STYLE: Mapping[str, Any] = {
    "text.parse_math": False,  # names come from files
    "font.size": 9,
    "axes.axisbelow": True,
    "grid.alpha": 0.3,
    "savefig.dpi": 200,
    "savefig.bbox": "tight",
    "svg.hashsalt": "gptq_fn",
}

DATES: Mapping[str, Mapping[str, None]] = {"png": {}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
"""What is left out of a file of each form, so that the same report gives the same bytes."""

MARKERS = "osD^vP*X"


def draw(told: Told, directory: Path, form: str = "png") -> tuple[Path, ...]:
    """The files error_map, error_over_depth and, where bits differ, bits_map of this form, drawn into the directory.

    Raises ValueError where there is no matplotlib, or no linear in a numbered block; OSError where files cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise ValueError("Figures are drawn with matplotlib, which is not installed: pip install 'gptq-fn[report]'.") from None
    cells = in_blocks(cells_of(told.linears))
    if not cells:
        raise ValueError(f"No linear of {told.directory} stands in a numbered block, so there is no depth to draw; leave the figures out.")
    makers: dict[str, Callable[[Sequence[Cell]], Any]] = {"error_map": _error_map, "error_over_depth": _error_over_depth}
    if len({bits_a_weight(cell) for cell in cells}) > 1:
        makers["bits_map"] = _bits_map
    directory.mkdir(parents=True, exist_ok=True)
    found = []
    style: Any = dict(STYLE)
    with mpl.rc_context(style):
        for name, make in makers.items():
            found.append(directory / f"{name}.{form}")
            make(cells).savefig(found[-1], metadata=dict(DATES[form]))
    return tuple(found)


def _error_map(cells: Sequence[Cell]) -> Any:
    from matplotlib.colors import LogNorm

    found = sorted(100 * value for cell in cells if (value := cell.largest())) or [1.0]
    low = found[len(found) // 20]  # as on the page
    norm = LogNorm(low, max(found[-1], 1.01 * low))
    return _map(cells, lambda cell: None if (x := cell.largest()) is None else 100 * x, norm, "relative error, per cent")


def _bits_map(cells: Sequence[Cell]) -> Any:
    from matplotlib.colors import Normalize

    found = [bits_a_weight(cell) for cell in cells]
    low, high = min(found), max(found)
    return _map(cells, bits_a_weight, Normalize(low - (high - low) / 8, high), "bits a weight")


def _map(cells: Sequence[Cell], value_of: Callable[[Cell], float | None], norm: Any, label: str) -> Any:
    """Roles by blocks, with numbers where there is room for them."""
    import numpy as np
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    roles, (first, last) = by_role(cells), span_of(cells)
    values = np.full((len(roles), last - first + 1), np.nan)
    for row, mine in enumerate(roles.values()):
        for cell in mine:
            values[row, (cell.block or 0) - first] = np.nan if (value := value_of(cell)) is None else value
    wide = values.shape[1]
    figure = Figure(figsize=(min(max(0.3 * wide, 4) + 1.5, 12), 0.27 * len(roles) + 1))
    axes = figure.add_subplot()
    image = axes.imshow(values, aspect="auto", cmap="Blues", norm=norm, extent=(first - 0.5, last + 0.5, len(roles) - 0.5, -0.5))
    axes.set_yticks(range(len(roles)), [plain(role) for role in roles])
    axes.set_xlabel("block")
    axes.set_facecolor("0.9")  # of what was not quantized
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.015)
    if isinstance(norm, LogNorm):
        _plain_numbers(bar.ax.yaxis)
    if wide <= MOST_WITH_NUMBERS:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                colour = "white" if norm(value) > 0.6 else "black"
                axes.text(first + column, row, percent(value / 100), ha="center", va="center", fontsize=6, color=colour)
    return figure


def _error_over_depth(cells: Sequence[Cell]) -> Any:
    """A line for each role, and below them rounding to nearest, on one logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6))
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, of, title in ((left, "error", "GPTQ"), (right, "rtn_error", "rounding to nearest")):
        for n, (role, mine) in enumerate(by_role(cells).items()):
            known = sorted((cell.block or 0, 100 * value) for cell in mine if (value := cell.mean(of)))
            x, y = [block for block, _ in known], [value for _, value in known]
            axes.plot(x, y, marker=MARKERS[n % len(MARKERS)], markersize=3, linewidth=1, label=plain(role))
        axes.set(title=title, xlabel="block", yscale="log")
        axes.grid()
    _plain_numbers(left.yaxis)
    left.set_ylabel("relative error, per cent")
    figure.legend(*left.get_legend_handles_labels(), loc="center left", bbox_to_anchor=(0.91, 0.5), frameon=False, fontsize=8)
    return figure


def _plain_numbers(axis: Any) -> None:
    """Put 1, 2 and 5 times powers of ten on a logarithmic axis, as such."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
