"""Reports: what a run tells of itself in report.json, and the page and figures that are made from it."""

import os
from pathlib import Path

from gptq_fn_interop.report.read import Told, read_report
from gptq_fn_interop.report.run import Origin

PAGE = "report.html"
"""What the page is called beside the report."""

__all__ = ["PAGE", "Origin", "Told", "draw_figures", "read_report", "write_page"]


def write_page(told: Told, path: str | Path) -> Path:
    """The path of the HTML page that is written there, whole or not at all. Raises OSError."""
    from gptq_fn_interop.report.page import page

    path, text = Path(path), page(told)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name the file to write, as {path / PAGE}.")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.unfinished")
    try:
        aside.write_text(text, "utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def draw_figures(told: Told, directory: str | Path, form: str = "png") -> tuple[Path, ...]:
    """The paths of the figures that are drawn into this directory: see `gptq_fn_interop.report.figures`. Raises ValueError or OSError."""
    from gptq_fn_interop.report import figures

    return figures.draw(told, Path(directory), form)
