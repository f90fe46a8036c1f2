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


class _Waiting:
    """What stands for arrays in a file, which is removed with the last reference to this."""

    def __init__(self, path: Path, arrays: Any, pool: ThreadPoolExecutor):
        """Writing begins when a thread of `pool` is free."""
        leaves, self._tree = jax.tree.flatten(arrays)
        self._leaves: list[_Leaf] = []
        self._path, end = path, 0
        for leaf in leaves:
            shards = leaf.addressable_shards
            offsets = {shard.device: end + n * shards[0].data.nbytes for n, shard in enumerate(shards)}
            self._leaves.append(_Leaf(leaf.shape, leaf.dtype, leaf.sharding, shards[0].data.shape, offsets, leaf.committed))
            end += len(shards) * shards[0].data.nbytes
        self._written = pool.submit(_write, path, leaves)
        weakref.finalize(self, _let_go, path, self._written)

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
    """Activations wait in files of `directory`, which is made when it is needed; each is removed when its arrays are let go of.

    Files are written by another thread while the next arrays are computed. What goes wrong in it is raised by the next step. It
    removes a file that it is writing when the arrays are let go of, once it is written.
    """
    directory, numbers = Path(directory), count()
    pool = ThreadPoolExecutor(1, "activations")

    def put(arrays: Any) -> _Waiting:
        directory.mkdir(parents=True, exist_ok=True)
        return _Waiting(directory / f"activations-{next(numbers)}", arrays, pool)

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


def _let_go(path: Path, written: Future[None]) -> None:
    """Have a file removed that nobody waits for: now, or by the thread that is writing it. One not begun is never written."""
    written.cancel()
    written.add_done_callback(partial(_remove, path))


def _remove(path: Path, written: Any) -> None:
    """Remove a file, whether it could be written or not."""
    with suppress(OSError):
        path.unlink()
