"""A report as one page of HTML that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any
from xml.etree.ElementTree import Element

from gptq_fn_interop.report.errors import error_map, errors_over_depth, largest_errors
from gptq_fn_interop.report.fallbacks import fallbacks
from gptq_fn_interop.report.markup import document, tag
from gptq_fn_interop.report.parts import breaking, exactly, name_of, note, pairs, section, table
from gptq_fn_interop.report.predictions import predictions
from gptq_fn_interop.report.read import Cell, Told, cells_of, in_blocks
from gptq_fn_interop.report.sizes import sizes, totals
from gptq_fn_interop.report.target import target
from gptq_fn_interop.report.words import figure, per_cent, size_of, time_of, value_of, whole

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser may do for the page: nothing but to show it, whatever the names in a checkpoint say."""

CHOSEN = {
    "group_size": "a whole row",
    "damp": "inputs / tokens, from 0.01 to 1",
    "alpha": "the best on samples held out",
    "refine": "not at all",
}
"""What it means that an option of QuantConfig has no value."""


def page(told: Told) -> str:
    """The HTML of a report."""
    cells = cells_of(told.linears)
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{told.model}: how it was quantized"),
        tag("style", files("gptq_fn_interop.report").joinpath("page.css").read_text("utf-8")),
    )
    body = tag(
        "body",
        tag("header", tag("h1", breaking(told.model)), tag("p", _summary(told, cells), class_="soft"), _tiles(told)),
        tag(
            "main",
            error_map(cells),
            errors_over_depth(cells),
            largest_errors(cells),
            fallbacks(told, cells),
            target(told, cells),
            sizes(told, cells),
            predictions(told),
            tag("div", _options(told), _run(told), class_="columns"),
            _all(cells),
        ),
        tag("footer", note("Made from report.json by gptq-fn report. It loads nothing and holds no calibration text.")),
    )
    return document(tag("html", head, body, lang="en"))


def _summary(told: Told, cells: Sequence[Cell]) -> str:
    blocks = len({cell.block for cell in in_blocks(cells)})
    version = _part(told, "versions").get("gptq-fn")
    return f"{len(told.linears):,} linears in {blocks} blocks, quantized with GPTQ by gptq_fn{f' {version}' if version else ''}."


def _tiles(told: Told) -> Element:
    weights, bits = totals(told.linears)
    of, error, rounding = "all linears", told.error(), told.error("rtn_error")
    if error is None:  # an old file, without the energies of the outputs
        every = Cell("all", None, told.linears)
        of, error, rounding = "mean of the linears", every.mean(), every.mean("rtn_error")
    raised = f"{sum(x.raised for x in told.linears):,}" if any(x.asked is not None for x in told.linears) else "unknown"
    tiles: list[tuple[str, str, str]] = [
        (f"relative error, {of}", per_cent(error), f"rounding to nearest: {per_cent(rounding)}"),
        ("bits a weight", f"{bits / max(weights, 1):.2f}", "scales and zero points counted"),
        ("quantized weights", size_of(bits / 8), f"{16 * weights / max(bits, 1):.1f} times smaller than in 16 bits"),
        ("rounded to nearest", f"{sum(x.rounded for x in told.linears):,}", f"of {len(told.linears):,} linears, for want of tokens"),
        ("damping raised", raised, f"dead inputs in {sum(bool(x.dead) for x in told.linears):,} linears"),
        *(("perplexity", figure(x["perplexity"]), f"on {value_of(x.get('data'), 'text')}") for x in told.measured if "perplexity" in x),
        ("time", time_of(told.run.get("seconds")), value_of(told.run.get("device"), "device unknown")),
    ]
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value), tag("dd", more)) for name, value, more in tiles], class_="tiles")


def _options(told: Told) -> Element:
    usual = {name: value for name, value in told.config.items() if name != "rules"}
    rules = [(name_of(rule["pattern"]), tag("span", _change(rule["config"], usual))) for rule in told.config.get("rules") or ()]
    return tag(
        "div",
        tag("h2", "Options"),
        pairs([(name, _option(name, value)) for name, value in {**_part(told, "options"), **usual}.items()]),
        [tag("h3", f"Rules: {len(rules)}"), table(("linears that match", "get"), rules)] if rules else None,
    )


def _change(config: Mapping[str, Any] | None, usual: Mapping[str, Any]) -> str:
    if config is None:
        return "nothing: they stay as they are"
    changed = [f"{name} {_option(name, x)}" for name, x in config.items() if name != "rules" and usual.get(name) != x]
    return ", ".join(changed) or "the same"


def _option(name: str, value: Any) -> str:
    return value_of(value, CHOSEN.get(name, "none"))


def _run(told: Told) -> Element:
    calibration, versions = _part(told, "calibration"), _part(told, "versions")
    return tag(
        "div",
        tag("h2", "Calibration data"),
        pairs([(name, value_of(calibration.get(name), "unknown")) for name in ("data", "samples", "tokens", "seed")]),
        tag("h2", "Run"),
        pairs(
            [
                ("float model", value_of(told.run.get("model"), "unknown")),
                ("time", time_of(told.run.get("seconds"))),
                ("device", value_of(told.run.get("device"), "unknown")),
                ("devices", value_of(told.run.get("devices"), "unknown")),
                *((name, value_of(version)) for name, version in (versions or {"versions": "unknown"}).items()),
            ]
        ),
    )


def _part(told: Told, name: str) -> Mapping[str, Any]:
    """A part of what is told of the run; empty in older files."""
    found = told.run.get(name)
    return found if isinstance(found, dict) else {}


def _all(cells: Sequence[Cell]) -> Element:
    several = any(len(cell.linears) > 1 for cell in cells)
    worst = ("worst",) if several else ()
    head = ("linear", "bits", "out x in", "error", *worst, "rounding", "tokens", "damping", "dead", "alpha", "rounded")
    rows = []
    for cell in cells:
        shapes, rows_of = {x.shape for x in cell.linears}, [x.rows for x in cell.linears if x.rows is not None]
        alpha = cell.mean("alpha")
        rows.append(
            (
                name_of(cell.name if len(cell.linears) == 1 else f"{cell.name} ({len(cell.linears)})"),
                ", ".join(sorted({str(x.bits) for x in cell.linears})),
                " x ".join(map(str, min(shapes))) if len(shapes) == 1 else "several",
                exactly(cell.mean()),
                *(exactly(cell.largest()) for _ in worst),
                exactly(cell.mean("rtn_error")),
                whole(min(rows_of, default=None)),
                figure(cell.largest("damp")),
                whole(cell.largest("dead")),
                "unknown" if alpha is None else f"{alpha:.2f}",
                f"{cell.rounded:,}",
            )
        )
    experts = "Experts of a block share a row: mean and worst error, the fewest tokens, the largest damping and number of dead inputs."
    return section(
        "All linears",
        note(experts) if several else None,
        tag("details", tag("summary", f"{len(rows):,} rows"), table(head, rows)),
    )
