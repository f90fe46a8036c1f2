"""Activations that wait on disk: files of raw bytes, one for each pytree."""

import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptq_fn import Store


class _Leaf(NamedTuple):
    """An array without its values, the shape of a part of it, and where in the file the part of each device begins."""

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: Any
    part: tuple[int, ...]
    offsets: dict[Any, int]
    committed: bool
    """Whether it has to stay on its devices; one that has not is on JAX's default device."""


class _Folder:
    """A directory that is made when it is needed. One that was made is removed with the last reference to this, if it is empty."""

    def __init__(self, path: Path):
        self._path = path

    def made(self) -> Path:
        """The directory, which is there now."""
        if not self._path.exists():
            self._path.mkdir(parents=True, exist_ok=True)
            weakref.finalize(self, _remove_folder, self._path)
        return self._path


class _Waiting:
    """What stands for arrays in a file, which is removed with the last reference to this."""

    def __init__(self, folder: _Folder, name: str, arrays: Any, pool: ThreadPoolExecutor):
        """Writing begins when a thread of `pool` is free."""
        leaves, self._tree = jax.tree.flatten(arrays)
        self._leaves: list[_Leaf] = []
        self._path, end = folder.made() / name, 0
        for leaf in leaves:
            shards = leaf.addressable_shards
            offsets = {shard.device: end + n * shards[0].data.nbytes for n, shard in enumerate(shards)}
            self._leaves.append(_Leaf(leaf.shape, leaf.dtype, leaf.sharding, shards[0].data.shape, offsets, leaf.committed))
            end += len(shards) * shards[0].data.nbytes
        self._written = pool.submit(_write, self._path, leaves)
        weakref.finalize(self, _let_go, folder, self._path, self._written)

    def block_until_ready(self) -> "_Waiting":
        """Wait until the file is written, as `jax.block_until_ready` does. Raises OSError where it cannot be."""
        self._written.result()
        return self

    def arrays(self) -> Any:
        """The arrays, on the devices they came from. Raises OSError where the file cannot be written or read."""
        self.block_until_ready()
        with open(self._path, "rb") as file:
            return jax.tree.unflatten(self._tree, [_read(file, leaf) for leaf in self._leaves])


def on_disk(directory: str | Path) -> Store:
    """Activations wait in files of `directory`; each is removed when its arrays are let go of.

    The directory is made when it is needed, and then removed when the store and all arrays are let go of, unless something else is in it.
    Files are written by another thread while the next arrays are computed. What goes wrong in it is raised by the next step. It
    removes a file that it is writing when the arrays are let go of, once it is written.
    """
    folder, numbers = _Folder(Path(directory)), count()
    pool = ThreadPoolExecutor(1, "activations")

    def put(arrays: Any) -> _Waiting:
        return _Waiting(folder, f"activations-{next(numbers)}", arrays, pool)

    return Store(put, _Waiting.arrays)


def _write(path: Path, leaves: list[jax.Array]) -> None:
    with open(path, "wb") as file:
        for leaf in leaves:
            for shard in leaf.addressable_shards:
                file.write(np.ascontiguousarray(shard.data).reshape(-1).view(np.uint8).data)


def _read(file: Any, leaf: _Leaf) -> jax.Array:
    parts = []
    for device, offset in leaf.offsets.items():
        part = np.empty(leaf.part, leaf.dtype)
        file.seek(offset)
        if file.readinto(part.reshape(-1).view(np.uint8).data) < part.nbytes:
            raise OSError(f"{file.name} is shorter than what was written to it; the disk may be full or faulty.")
        if not leaf.committed:
            return jax.device_put(part)
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def _let_go(folder: _Folder, path: Path, written: Future[None]) -> None:
    """Have a file removed that nobody waits for: now, or by the thread that is writing it. One not begun is never written."""
    written.cancel()
    written.add_done_callback(partial(_remove, folder, path))


def _remove(_: _Folder, path: Path, written: Any) -> None:
    """Remove a file, whether it could be written or not, and with the last one its directory."""
    with suppress(OSError):
        path.unlink()


def _remove_folder(path: Path) -> None:
    with suppress(OSError):  # something else is in it
        path.rmdir()
