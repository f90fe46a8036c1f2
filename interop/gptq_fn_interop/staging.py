"""Making a directory beside its destination, so that the destination is there whole or not at all."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from errno import ENOLCK, ENOSYS, ENOTSUP
from pathlib import Path

RECORD = "block-{:05}.json"
"""The file that makes a block of an unfinished run complete."""

LOCK, RESULT = "lock", "result"
KEPT = (LOCK, "run.json", "block-*")
"""What of an unfinished run serves the one that continues it."""


def unfinished(destination: str | Path) -> Path:
    """The directory beside `destination`, or beside what it leads to if it is a link, in which it is made."""
    destination = Path(destination).resolve()
    return destination.with_name(f".{destination.name}.unfinished")


def complete_blocks(aside: Path) -> int:
    """How many blocks, from the first on, an unfinished run has completed."""
    done = 0
    while (aside / RECORD.format(done)).exists():
        done += 1
    return done


def require_vacant(destination: str | Path, *, resume: bool = False) -> None:
    """Raise FileExistsError if something is at `destination`, unless it is an empty directory, and OSError where none can be made.

    Unless `resume`, also if an unfinished run of it has complete blocks.
    """
    destination = Path(destination)
    place = destination.resolve()
    above = next(path for path in place.parents if path.exists())
    if not above.is_dir():
        raise NotADirectoryError(f"{destination} cannot be made, since {above} is a file; choose another directory.")
    if not os.access(above, os.W_OK):
        raise PermissionError(f"{destination} cannot be made, since nothing may be written into {above}; choose another directory.")
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already and is not empty; choose another directory or remove it.")
    if place == Path.cwd() or place.is_mount():
        taken = "the current directory" if place == Path.cwd() else "where a file system is mounted"
        raise FileExistsError(f"{destination} is {taken}, whose place no new directory can take; name one inside it.")
    if not resume and (done := complete_blocks(aside := unfinished(destination))):
        raise FileExistsError(
            f"{aside} holds an unfinished run with {done} complete block{'s' * (done > 1)}. "
            "Continue it with --resume (in Python resume=True), or remove that directory to begin anew."
        )


def require_outside(destination: str | Path, path: str | Path, what: str) -> None:
    """Raise ValueError if `path` lies in `destination`, which has to stay vacant until it is complete. `what` says what goes there."""
    if Path(path).resolve().is_relative_to(Path(destination).resolve()):
        raise ValueError(f"{what} {path}: {destination} has to stay empty until the model in it is complete; choose a place outside.")


def require_writable(path: Path, what: str) -> None:
    """Raise ValueError if no file of this path can be written. `what` says which file it is."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{what} {path}: it is a directory, or there is none to write it into; name a file in a directory that is there.")


@contextmanager
def claimed(destination: str | Path, *, resume: bool = False) -> Iterator[Path]:
    """The directory beside `destination`, for one process at a time; what an unfinished run completed is in it where `resume`.

    At the end of the block it is removed; if the block fails, unless there are complete blocks in it. Raises
    FileExistsError as `require_vacant` does, and BlockingIOError where another run holds it.
    """
    destination, aside = Path(destination), unfinished(destination)
    require_vacant(destination, resume=resume)
    lock = _locked(aside)
    try:
        require_vacant(destination, resume=resume)  # again: another run may just have ended
        kept = {path for pattern in KEPT for path in aside.glob(pattern)} if complete_blocks(aside) else {aside / LOCK}
        for path in {*aside.iterdir()} - kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield aside
    except BaseException:
        if not complete_blocks(aside):
            shutil.rmtree(aside, ignore_errors=True)
        raise
    else:
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def staged(destination: str | Path) -> Iterator[Path]:
    """A new directory that takes the name of `destination` when the block ends well, and vanishes when it fails.

    Raises as `claimed` does.
    """
    with claimed(destination) as aside, taking_its_place(aside, destination) as result:
        yield result


@contextmanager
def taking_its_place(aside: Path, destination: str | Path) -> Iterator[Path]:
    """A new directory in `aside`, whose files are on the disk before it takes the name of `destination` at the end of the block."""
    result = aside / RESULT
    result.mkdir()
    yield result
    for path in (*result.rglob("*"), result):
        sync(path)
    destination = Path(destination).resolve()  # a link to a directory that is to be made, or is empty, stays a link
    os.replace(result, destination)
    sync(destination.parent)


def sync(path: Path) -> None:
    """Wait until what was written to a file or directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link(path: Path, to: Path) -> None:
    """The same file under a second name, or a copy where the file system has no second names."""
    try:
        os.link(path, to)
    except OSError:
        shutil.copyfile(path, to)


def _locked(aside: Path) -> int:
    """The handle of the lock file in this directory, which is made. Raises BlockingIOError where another run holds it."""
    while True:
        aside.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # the run before is just removing its directory
            handle = os.open(aside / LOCK, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise BlockingIOError(
                    f"Another run is writing to {aside.parent / aside.name[1:].removesuffix('.unfinished')}; "
                    "wait for its end, or choose another directory."
                ) from None
            except OSError as error:
                if error.errno not in (ENOLCK, ENOSYS, ENOTSUP):  # a file system without locks
                    raise
            if (aside / LOCK).exists() and os.path.samestat(os.stat(aside / LOCK), os.fstat(handle)):
                return handle
            os.close(handle)
