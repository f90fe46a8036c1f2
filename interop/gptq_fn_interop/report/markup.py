"""HTML and SVG as trees of elements: what is put in as text can never become markup."""

from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None | Iterable["Child"]


def tag(name: str, /, *children: Child, **attributes: object) -> Element:
    """An element with these children in order; None stands for nothing.

    Attributes are spelled with underscores, as in `stroke_width`, and with one behind them where Python has the word, as in `class_`.
    """
    made = Element(name, {key.rstrip("_").replace("_", "-"): plain(str(value)) for key, value in attributes.items() if value is not None})
    _fill(made, children)
    return made


def plain(text: str) -> str:
    """The text with every character that cannot be seen as its escape: names from files may hold anything."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in text)


def document(root: Element) -> str:
    """The text of a whole page."""
    return f"<!DOCTYPE html>\n{tostring(root, encoding='unicode', method='html')}\n"


def _fill(made: Element, children: Iterable[Child]) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Element):
            made.append(child)
        elif not isinstance(child, str):
            _fill(made, child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + plain(child)
        else:
            made.text = (made.text or "") + plain(child)
