"""The gptq-fn sweep command."""

import csv
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from gptq_fn import QuantConfig, Report
from gptq_fn_interop.cli_quantize import parse_rule, require_matching
from gptq_fn_interop.console import flowing, out, progress
from gptq_fn_interop.staging import require_writable

COLUMNS: tuple[str, ...] = (
    "linear",
    "bits",
    "group_size",
    "damp",
    "order",
    "bits_per_weight",
    "error",
    "rtn_error",
    "energy",
    "loss",
    "rows",
    "rounded",
)
"""Of a CSV file: a row for each linear of each setting."""


@flowing
def sweep(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    hessians: Path,
    bits: tuple[Literal[2, 3, 4, 8], ...] = (2, 3, 4, 8),
    group_size: tuple[int | None, ...] = (128,),
    damp: tuple[float | None, ...] = (None,),
    order: tuple[Literal["natural", "act", "group"], ...] = ("group",),
    sym: bool = True,
    grid: Literal["minmax", "mse", "hid", "loop"] = "mse",
    rule: Annotated[tuple[str, ...], arg(metavar="'REGEX => skip | key=value,...'")] = (),
    save: Annotated[Path | None, arg(name="out")] = None,
) -> None:
    """Quantize with many settings from the Hessians of one run, without writing a model: errors against bits, linear by linear.

    Hessians are those that gptq-fn quantize SOURCE DESTINATION --keep-hessians DIRECTORY wrote, and carry that run's rounding errors.

    Args:
        source: The model's directory, or its name on the hub.
        hessians: The directory with its Hessians.
        bits: Of one code. Every value is combined with every one of the next options.
        group_size: Consecutive inputs that share a scale; None means that a whole row does.
        damp: Relative to the mean of a Hessian's diagonal; None means inputs / rows, from 0.01 to 1.
        order: Of the columns: as stored, by importance, or by importance inside and among groups.
        sym: Symmetric grids, or a zero point for each group.
        grid: How a group's scale is chosen.
        rule: Exceptions by name, as in gptq-fn quantize; what the kept run left alone has to be left alone.
        save: Write every linear of every setting to this file, FILE.json or FILE.csv.
    """
    from gptq_fn_interop import sweep
    from gptq_fn_interop.hub import local
    from gptq_fn_interop.stream import open_source

    if save is not None and save.suffix not in (".json", ".csv"):
        raise ValueError(f"--out {save}: what is written is JSON or CSV; name a file that ends in .json or .csv.")
    if save is not None:
        require_writable(save, "--out")
    settings = product(bits, group_size, damp, order)
    bases = [QuantConfig(bits=b, group_size=g, damp=d, order=o, sym=sym, grid=grid) for b, g, d, o in settings]
    configs = [replace(base, rules=tuple(parse_rule(text, base) for text in rule)) for base in bases]
    directory = local(source)
    for config in configs[:1]:  # all have these rules
        require_matching(config.rules, open_source(directory, config)[1])
    with progress("Solving from Hessians") as advance:
        reports = sweep.sweep(directory, hessians, configs, progress=advance)
    out.print(table(reports))
    if save is not None:
        _save(save, reports)
        out.print(f"Every linear of every setting is in {save}.", highlight=False)


def table(reports: Sequence[Report]) -> Table:
    """A row for each setting: what differs between them, what it costs, what it loses, and the linears that lose most."""
    settings = {
        "bits": [str(report.config.bits) for report in reports],
        "groups": ["row" if report.config.group_size is None else str(report.config.group_size) for report in reports],
        "damp": ["auto" if report.config.damp is None else f"{report.config.damp:g}" for report in reports],
        "order": [report.config.order for report in reports],
    }
    shown = {key: cells for key, cells in settings.items() if key in ("bits", "groups") or len(set(cells)) > 1}
    found = Table(*shown, "bits a weight", "error", "worst linears")
    for cells, report in zip(zip(*shown.values(), strict=True), reports, strict=True):
        worst = "\n".join(f"{short(x.name)} {x.error:.3f}" for x in report.worst(2))
        found.add_row(*cells, f"{report.bits_per_weight:.2f}", f"{report.error:.4f}", worst)
    return found


def short(name: str) -> str:
    """The name of a linear from the number of its block on; all of it where there is none."""
    return re.sub(r"^\D*(?=\d+\.)", "", name)


def _save(path: Path, reports: Sequence[Report]) -> None:
    if path.suffix == ".json":
        settings = [{**report.as_dict(), "bits_per_weight": report.bits_per_weight, "error": report.error} for report in reports]
        path.write_text(json.dumps({"settings": settings}, indent=1) + "\n", "utf-8")
        return
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for report in reports:
            for x in report.linears:
                alone = Report(report.config, (x,))
                told = {"linear": x.name, "order": report.config.order, "bits_per_weight": alone.bits_per_weight, "loss": x.loss}
                writer.writerow(asdict(x) | told)
