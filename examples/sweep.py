"""What each linear of a model loses at how many bits: one calibration, many settings, one picture."""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from rich.console import Console

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb

sys.path.insert(0, str(Path(__file__).parent))
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.cli_sweep import table
from gptq_fn_interop.console import progress
from gptq_fn_interop.stream import quantize_checkpoint
from gptq_fn_interop.sweep import sweep
from models import float_model, fresh

from gptq_fn import QuantConfig, Report

GAP = 0.35
"""Where the shades of a role begin, from white at 0 to its colour at 1."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a directory or a model on the hub; SmolLM2-135M-Instruct by default")
    parser.add_argument("--data", default="pydoc", help="text to calibrate on")
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of 512 tokens")
    parser.add_argument("--build", type=Path, default=Path(__file__).parent.parent / "build", help="where results go")
    args = parser.parse_args()

    source = float_model(args.model, args.build)
    folder = fresh(args.build / f"{source.name}-sweep")
    calib = tokens(args.data, source, samples=args.samples, length=512)
    hessians = folder / "hessians"
    with progress("Calibrating: quantizing blocks") as advance:
        quantize_checkpoint(source, folder / "quantized", calib, hessians=hessians, progress=advance)

    configs = [QuantConfig(bits=bits, group_size=size) for size in args.group_size for bits in args.bits]
    with progress("Solving from Hessians") as advance:
        reports = sweep(source, hessians, configs, progress=advance)
    Console().print(table(reports))
    draw(reports, source.name, folder / "sweep.png")
    print(f"The picture is {folder / 'sweep.png'}, the Hessians are in {hessians}")


def draw(reports: Sequence[Report], title: str, path: Path) -> None:
    """A panel for each role: the error of each of its linears against its bits, darker the deeper it lies; one for the roles' medians."""
    roles: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for report in sorted(reports, key=lambda x: x.bits_per_weight):
        for x in report.linears:
            roles[role_of(x.name)][x.name].append((Report(report.config, (x,)).bits_per_weight, x.error))
    colours = dict(zip(roles, (plt.get_cmap("tab10")(n % 10)[:3] for n in range(len(roles))), strict=True))
    columns = min(4, len(roles) + 1)
    rows = -(-(len(roles) + 1) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), sharex=True, sharey=True, squeeze=False)
    *panels, overview = axes.flat[: len(roles) + 1]
    for panel, (role, linears) in zip(panels, roles.items(), strict=True):
        for depth, points in enumerate(linears.values()):
            panel.plot(*zip(*points, strict=True), color=shade(colours[role], depth, len(linears)), linewidth=0.9)
        panel.set_title(role, color=colours[role], fontsize=10)
        settings = list(zip(*linears.values(), strict=True))
        middle = [(points[0][0], sorted(error for _, error in points)[len(points) // 2]) for points in settings]
        overview.plot(*zip(*middle, strict=True), color=colours[role], label=role, marker="o", markersize=3)
    overview.set_title("median of each role", fontsize=10)
    overview.legend(fontsize=7, loc="upper right")
    for panel in axes.flat:
        panel.set(yscale="log")
        panel.grid(alpha=0.3)
        panel.set_visible(panel in panels or panel is overview)
    figure.supxlabel("bits a weight, scales and zero points included")
    figure.supylabel("error  ||(W - Q) X|| / ||W X||")
    figure.suptitle(f"{title}: each linear, light at the first block and dark at the last")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def role_of(name: str) -> str:
    """The name without the numbers of its block and expert, and without what comes before."""
    return re.split(r"\.\d+\.", name)[-1] if re.search(r"\.\d+\.", name) else name


def shade(colour: Any, depth: int, depths: int) -> tuple[float, ...]:
    """The colour, light for the first depth and itself for the last."""
    part = GAP + (1 - GAP) * (depth / max(1, depths - 1))
    return tuple(1 - part * (1 - channel) for channel in to_rgb(colour))


if __name__ == "__main__":
    main()
