"""The gptq-fn report command."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from gptq_fn_interop.console import flowing, out
from gptq_fn_interop.report import PAGE, draw_figures, read_report, write_page


@flowing
def report(
    directory: Annotated[Positional[Path], arg(metavar="DIRECTORY")],
    to: Path | None = None,
    evaluations: Annotated[tuple[Path, ...], arg(name="eval")] = (),
    figures: Path | None = None,
    form: Annotated[Literal["png", "pdf", "svg"], arg(name="format")] = "png",
) -> None:
    """Make one HTML page of what report.json tells of a run; it needs no network.

    Args:
        directory: What gptq-fn quantize wrote.
        to: The file to write, by default report.html in the directory.
        evaluations: Files that gptq-fn eval --json wrote of the model, by default evaluation.json in the directory, if there is one.
        figures: Also draw figures for papers, with matplotlib, into this directory.
        form: Of the figures.
    """
    told = read_report(directory, evaluations)
    drawn = () if figures is None else draw_figures(told, figures, form)
    out.print(f"{write_page(told, to or directory / PAGE)}: open it in a browser.", highlight=False)
    for path in drawn:
        out.print(str(path), highlight=False)
