"""What the commands print to: results, problems and progress."""

from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

out = Console()
problems = Console(stderr=True)


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
