"""What the documentation's site needs beyond its pages: documents from elsewhere in the repository, links among all, formulas.

A hook of MkDocs, named in mkdocs.yml. Links in documents are those of the repository, so that they work where it is browsed, too.
Formulas between dollars become MathML, which browsers show by themselves.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

BORROWED = {
    "index.md": "README.md",
    "building.md": "BUILD.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "kernels.md": "kernels/NOTES.md",
    "examples.md": "examples/README.md",
}
"""Pages of the site -> the documents that they are."""

CODE = re.compile(r"(^```.*?^```$|`[^`\n]*`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S(?:[^$\n]*\S)?)\$", re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """The files of the site with the borrowed pages."""
    for page, document in BORROWED.items():
        if (ROOT / document).exists():
            files.append(File.generated(config, page, content=(ROOT / document).read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """The page with links that lead to pages of the site, and with formulas."""
    here = page.file.src_uri
    document = PurePosixPath(BORROWED.get(here, f"docs/{here}"))
    pages = {document: page for page, document in BORROWED.items()}

    def link(found: re.Match[str]) -> str:
        text, target, place = found[1], found[2], found[3] or ""
        wanted = os.path.normpath(document.parent / target)
        if not (ROOT / wanted).exists():
            return found[0]  # MkDocs says that it is broken
        there = pages.get(wanted, str(PurePosixPath(wanted).relative_to("docs")) if wanted.startswith("docs/") else None)
        if there is None or files.get_file_from_path(there) is None:
            return text  # a file that is no page
        return f"[{text}]({os.path.relpath(there, PurePosixPath(here).parent)}{place})"

    formulas: list[str] = []
    page.meta["formulas"] = formulas

    def formula(found: re.Match[str]) -> str:
        formulas.append(convert(found[1] or found[2], display="block" if found[1] else "inline"))
        return _place(len(formulas) - 1)

    parts = CODE.split(markdown)  # code at odd places; a link's text may be code, so links are looked for in the whole
    parts[::2] = [FORMULA.sub(formula, part) for part in parts[::2]]
    return _outside_fences(LINK, link, "".join(parts))


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """The page with its formulas in their places: as Markdown they would be taken for blocks of HTML."""
    for i, formula in enumerate(page.meta["formulas"]):
        html = html.replace(_place(i), formula)
    return html


def _place(i: int) -> str:
    return f"\u27e6formula {i}\u27e7"


def _outside_fences(pattern: re.Pattern[str], replace: Any, markdown: str) -> str:
    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 2 else pattern.sub(replace, part) for i, part in enumerate(parts))
