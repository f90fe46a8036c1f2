"""Writing a checkpoint so that it exists whole or not at all."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from gptq_fn_interop.checkpoint import INDEX, SINGLE

SHARD_BYTES = 4 * 2**30
"""The largest shard, unless one tensor is larger."""


def require_vacant(destination: Path) -> None:
    """Raise FileExistsError if something is at `destination`, unless it is an empty directory."""
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise FileExistsError(f"{destination} exists already and is not empty; choose another directory or remove it.")


@contextmanager
def staged(destination: str | Path) -> Iterator[Path]:
    """A new directory beside `destination` that takes its name when the block ends well, and vanishes when it fails.

    Raises FileExistsError if something is at `destination` already.
    """
    destination = Path(destination)
    require_vacant(destination)
    aside = destination.with_name(f".{destination.name}.unfinished-{os.getpid()}")
    aside.mkdir(parents=True)
    try:
        yield aside
        os.replace(aside, destination)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


class ShardWriter:
    """Tensors into model-0000i-of-0000n.safetensors as they come, then an index; one plain file if one shard is enough."""

    def __init__(self, directory: Path, shard_bytes: int = SHARD_BYTES):
        """Write into `directory`; shards hold up to `shard_bytes` bytes, unless one tensor is larger."""
        self._directory, self._limit = directory, shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self.bytes = 0
        """Of all tensors so far."""

    def add(self, name: str, array: np.ndarray) -> None:
        """Take a tensor; shards that are full are written."""
        if self._pending and sum(a.nbytes for a in self._pending.values()) + array.nbytes > self._limit:
            self._flush()
        self._pending[name] = np.ascontiguousarray(array)
        self.bytes += array.nbytes

    def close(self) -> None:
        """Write what is left, give the shards their final names, and write the index."""
        self._flush()
        total = len(self._shards)
        names = [SINGLE] if total == 1 else [f"model-{i + 1:05}-of-{total:05}.safetensors" for i in range(total)]
        for i, name in enumerate(names):
            os.replace(self._part(i), self._directory / name)
        if total > 1:
            weight_map = {tensor: name for tensors, name in zip(self._shards, names, strict=True) for tensor in tensors}
            write_json(self._directory / INDEX, {"metadata": {"total_size": self.bytes}, "weight_map": weight_map})

    def _part(self, i: int) -> Path:
        return self._directory / f"part-{i}"

    def _flush(self) -> None:
        if self._pending:
            save_file(self._pending, self._part(len(self._shards)), metadata={"format": "pt"})
            self._shards.append(list(self._pending))
            self._pending = {}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object with its keys in their order: the order of rules has a meaning."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
