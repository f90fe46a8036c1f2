"""Hessians of a run, kept on disk: from one calibration, many results.

A directory holds a safetensors file for each Hessian, of the linears that are solved from it, and hessians.json, which tells
the model. What is kept is the mean of a Hessian and its transpose, of which the upper triangle, folded into a rectangle,
takes half the room: 411 MB in float32 for 14,336 inputs.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_fn import Hessian
from gptq_fn_interop.checkpoint import Checkpoint, read_json
from gptq_fn_interop.processes import by_first, first
from gptq_fn_interop.shards import write_json
from gptq_fn_interop.tensor_files import READ, Entry, headers, read, write

MODEL, SUFFIX = "hessians.json", ".safetensors"
AHEAD = 2
"""Hessians that may wait to be written, each in memory."""

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Keys of a config.json that do not tell what a model computes."""


class Keeper:
    """Writes Hessians to files by a thread: a function of the names of linears and the Hessian that they share, as Runtime.observe is."""

    def __init__(self, directory: Path, thread: ThreadPoolExecutor):
        """Write to `directory`. Where processes share a run, the first one writes."""
        self._directory, self._thread = directory, thread
        self._written: list[Future[None]] = []

    def __call__(self, names: Sequence[str], h: Hessian) -> None:
        """Have this Hessian written. Raises OSError where an earlier one could not be."""
        folded, rows = fold(h.xx), int(h.rows)
        if first():
            if len(self._written) >= AHEAD:
                self._written[-AHEAD].result()
            path = self._directory / f"{names[0]}{SUFFIX}"
            self._written.append(self._thread.submit(_write, path, folded, names, rows))

    def settle(self) -> None:
        """Wait until every Hessian so far is on the disk. Raises OSError where one could not be written."""
        for written in [*self._written]:
            written.result()


@contextmanager
def keep_hessians(source: str | Path, directory: str | Path, *, resume: bool = False) -> Iterator[Keeper]:
    """What keeps every Hessian of a run in `directory`, as Runtime(observe=...); `source` is the directory of the model.

    Files appear when they are complete, the last ones when the block ends. Raises FileExistsError where something is in
    `directory`, unless `resume` says that it is of the same run, ValueError for Hessians of another model, and OSError where
    a file cannot be written.
    """
    directory, model = Path(directory), _identity(Checkpoint(source))
    by_first(lambda: _claim(directory, source, model, resume=resume))
    with ThreadPoolExecutor(1, "hessians") as thread:
        keeper = Keeper(directory, thread)
        yield keeper
        keeper.settle()


def _claim(directory: Path, source: str | Path, model: Mapping[str, Any], *, resume: bool) -> None:
    """Make the directory one of Hessians of this model."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; Hessians are kept in a directory.")
    if directory.is_dir() and any(directory.iterdir()):
        if not resume:
            raise FileExistsError(f"{directory} exists already and is not empty; choose another directory for Hessians or remove it.")
        _require_model(directory, source, model)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / MODEL, model)


def _write(path: Path, folded: Float[Array, "rows columns"], names: Sequence[str], rows: int) -> None:
    """A file of one Hessian, which has its name when it is complete."""
    aside = path.with_name(f"{path.name}.unfinished")
    told = np.frombuffer(json.dumps(names).encode(), np.uint8)
    try:
        write(aside, {"upper": np.asarray(folded), "rows": np.asarray(rows, np.int32), "names": told})
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"The Hessian of {names[0]} cannot be written to {path.parent}: {error.strerror or error}.") from error


@jax.jit
def fold(xx: Float[Array, "n n"]) -> Float[Array, "rows n+1"]:
    """The upper triangle of the mean of `xx` and its transpose: row i beside row n - 1 - i, which has as much as row i lacks."""
    n, half = len(xx), -(-len(xx) // 2)
    xx = 0.5 * xx + 0.5 * xx.T
    row, column = jnp.arange(half)[:, None], jnp.arange(n + 1)[None]
    return jnp.where(column > row, jnp.pad(xx[:half], ((0, 0), (1, 0))), jnp.pad(xx[::-1, ::-1][:half], ((0, 0), (0, 1))))


@jax.jit
def unfold(folded: Float[Array, "rows n+1"]) -> Float[Array, "n n"]:
    """The symmetric matrix whose upper triangle `fold` made this of."""
    half, n = len(folded), folded.shape[1] - 1
    upper = jnp.concatenate([folded[: n - half, 1:], folded[::-1, :-1][:, ::-1]])
    row, column = jnp.arange(n)[:, None], jnp.arange(n)[None]
    return jnp.where(column >= row, upper, upper.T)


class KeptHessians(Mapping[tuple[str, ...], Hessian]):
    """The Hessians in a directory by the names of the linears that are solved from each; each is read when it is asked for.

    Raises FileNotFoundError or ValueError, in a sentence, for what is no such directory and for damaged files.
    """

    def __init__(self, directory: str | Path):
        """Open the headers of the files; no Hessian is read."""
        self.directory = Path(directory)
        _read_model(self.directory)
        self._files = dict(_told(path) for path in sorted(self.directory.glob(f"*{SUFFIX}")))
        self._group_of = {name: names for names in self._files for name in names}

    def of(self, name: str) -> tuple[str, ...]:
        """The linears that share a Hessian with the linear called `name`. Raises ValueError where none was kept for it."""
        if name not in self._group_of:
            raise ValueError(
                f"{self.directory} has no Hessian of {name}: the run that kept them left it alone, or was cut off, or the file was lost. "
                "Keep Hessians of a complete run that quantizes it, or leave it alone by a rule."
            )
        return self._group_of[name]

    def require(self, names: Iterable[str]) -> None:
        """Raise ValueError, as `of` does, where there is no Hessian of one of these linears."""
        for name in names:
            self.of(name)

    def require_model(self, source: Checkpoint) -> None:
        """Raise ValueError unless the Hessians are those of this checkpoint."""
        _require_model(self.directory, source.directory, _identity(source))

    def __getitem__(self, names: tuple[str, ...]) -> Hessian:
        """The Hessian that these linears share."""
        found = self._files[names]
        return Hessian(unfold(jnp.asarray(read("upper", found["upper"]))), jnp.asarray(read("rows", found["rows"])))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _told(path: Path) -> tuple[tuple[str, ...], dict[str, Entry]]:
    """The linears of a file, and its tensors. Raises ValueError for a file that is damaged or holds something else."""
    found = headers(path)
    if {name: entry.dtype for name, entry in found.items()} != {"upper": "float32", "rows": "int32", "names": "uint8"}:
        raise ValueError(f"{path} is not a file of a Hessian: something else wrote it. Remove it, or name the directory that was kept.")
    return tuple(json.loads(read("names", found["names"]).tobytes())), found


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a model from others: its config, and a digest of all names, shapes and first values of its tensors."""
    entries = []
    for path in checkpoint.files:
        with open(path, "rb") as file:
            for name, entry in headers(path).items():
                file.seek(entry.offset)
                first = file.read(min(256, entry.nbytes)) if entry.dtype in READ else b""
                entries.append((name, entry.dtype, entry.shape, first.hex()))
    config = {key: value for key, value in checkpoint.config.items() if key not in VOLATILE}
    return {"version": 1, "tensors": hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest(), "config": config}


def _read_model(directory: Path) -> dict[str, Any]:
    if not (directory / MODEL).exists():
        raise FileNotFoundError(f"{directory} holds no Hessians: it has no {MODEL}, which gptq-fn quantize --keep-hessians writes.")
    found = read_json(directory / MODEL)
    if found.get("version") != 1:
        raise ValueError(f"{directory / MODEL} is of version {found.get('version')!r}; version 1 can be read. Keep Hessians again.")
    return found


def _require_model(directory: Path, source: str | Path, model: Mapping[str, Any]) -> None:
    kept = _read_model(directory)
    if kept != model:
        before, now = kept.get("config", {}), model["config"]
        keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        reason = f"the configs differ in {', '.join(keys[:5])}" if keys else "the configs are equal, but the weights are not"
        raise ValueError(f"The Hessians in {directory} are those of another model than {source}: {reason}.")
