"""The files of a checkpoint: tensors into parts as they come, and parts into shards with an index, or into one file."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptq_fn_interop.checkpoint import INDEX, SINGLE
from gptq_fn_interop.tensor_files import headers, join, write

SHARD_BYTES = 4 * 2**30
"""The largest shard, unless one tensor is larger."""


def write_parts(directory: Path, stem: str, tensors: Iterable[tuple[str, np.ndarray]], limit: int = SHARD_BYTES) -> list[Path]:
    """The files, in order, to which these tensors are written: of up to `limit` bytes each, unless one tensor is larger.

    Only the tensors of one file are in memory. Raises OSError.
    """
    parts: list[Path] = []
    pending: dict[str, np.ndarray] = {}

    def flush() -> None:
        parts.append(directory / f"{stem}-{len(parts)}.safetensors")
        write(parts[-1], pending)
        pending.clear()

    for name, array in tensors:
        if pending and sum(a.nbytes for a in pending.values()) + array.nbytes > limit:
            flush()
        pending[name] = array
    if pending:
        flush()
    return parts


def assemble(parts: Sequence[Path], directory: Path, limit: int = SHARD_BYTES) -> None:
    """Make the parts the tensors of the checkpoint in `directory`: one file if they fit `limit`, else a shard each, with an index.

    The parts are in the same file system, and are gone afterwards. Raises OSError.
    """
    held = [headers(part) for part in parts]
    size = sum(entry.nbytes for entries in held for entry in entries.values())
    if len(parts) > 1 and size <= limit:
        join(parts, directory / SINGLE)
        for part in parts:
            part.unlink()
        return
    names = [SINGLE] if len(parts) == 1 else [f"model-{i + 1:05}-of-{len(parts):05}.safetensors" for i in range(len(parts))]
    for part, name in zip(parts, names, strict=True):
        os.replace(part, directory / name)
    if len(parts) > 1:
        weight_map = {tensor: name for entries, name in zip(held, names, strict=True) for tensor in entries}
        write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object with its keys in their order: the order of rules has a meaning."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
