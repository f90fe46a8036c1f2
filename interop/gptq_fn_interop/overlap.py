"""Reading ahead and writing behind: one other thread each, and one piece of work at a time in it."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def ahead(tasks: Iterable[Callable[[], T]]) -> Iterator[Iterator[T]]:
    """The results of the tasks in order. While one result is in use the next task runs, and no other.

    What a task raises is raised where its result is asked for.
    """
    left = iter(tasks)
    under_way: list[Future[T]] = []
    with ThreadPoolExecutor(1, "ahead") as pool:

        def begin() -> None:
            if (task := next(left, None)) is not None:
                under_way.append(pool.submit(task))

        def results() -> Iterator[T]:
            while under_way:
                found = under_way.pop().result()
                begin()
                yield found
                del found  # before the next one is waited for

        begin()
        yield results()


@contextmanager
def behind() -> Iterator[Callable[[Callable[[], object]], None]]:
    """What runs tasks in another thread, in order, and waits while one is under way: at most one holds its memory.

    What a task raises is raised by the next call, or at the end of the block.
    """
    with ThreadPoolExecutor(1, "behind") as pool:
        under_way: list[Future[object]] = []

        def later(task: Callable[[], object]) -> None:
            while under_way:
                under_way.pop().result()
            under_way.append(pool.submit(task))

        yield later
        while under_way:
            under_way.pop().result()
