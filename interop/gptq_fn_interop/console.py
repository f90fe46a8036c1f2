"""What the commands print to: results, problems and progress."""

import _thread
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any, TypeVar

from docstring_parser import parse_from_object
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console(markup=False)  # for paths may have brackets
problems = Console(stderr=True, markup=False)

Command = TypeVar("Command", bound=Callable[..., None] | type)


def flowing(command: Command) -> Command:
    """The command, or a class of options, with the help of each option in one paragraph that terminals can wrap.

    Lines of a docstring's Args that begin with a quote, as those that tell what each value means, stay lines. Fields that a class
    inherits are told as their own docstrings do, unless its Args tell of them.
    """
    told = inspect.cleandoc(command.__doc__ or "")
    bases = getattr(command, "__mro__", ())[1:-1]  # none of a function
    for field in (field for base in bases for field in parse_from_object(base).params):
        told = told.replace("\nArgs:\n", f"\nArgs:\n    {field.arg_name}: {' '.join((field.description or '').split())}\n")
    command.__doc__ = re.sub(r'\n {8,}(?!")', " ", told)
    return command


@contextmanager
def insisting() -> Iterator[None]:
    """An interrupt that Python ignores, since it runs a finalizer or a callback of the garbage collector just then, comes again."""
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if not issubclass(found.exc_type, KeyboardInterrupt):
            return before(found)
        again = Timer(0.1, _thread.interrupt_main)  # when the finalizer is done
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextmanager
def progress(title: str, *, shown: bool = True):
    """A progress bar with an estimate, if it is to be shown; yields a function of (done, total) and, if it changes, the title."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=problems, disable=not shown) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int, said: str = title) -> None:
            bar.update(task, completed=done, total=total, description=said)

        yield advance
