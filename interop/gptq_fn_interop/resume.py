"""What an unfinished run leaves behind, for another to continue it: what it is a run of, and each complete block.

A directory holds run.json, which tells the run, and for each block the tensors of the checkpoint and, written when these are on
the disk, a record that makes the block complete: the names of its files and the reports of its linears. Activations are not
kept; a run that continues computes them from the blocks.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from gptq_fn import LinearReport, ModelSpec, QuantConfig, Runtime, Samples
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.shards import write_json, write_parts
from gptq_fn_interop.staging import RECORD, complete_blocks, sync
from gptq_fn_interop.tensor_files import StoredTensors, tensors_of

RUN = "run.json"

SAMPLE = 2**16
"""Bytes that are read at the beginning, in the middle and at the end of each file to tell it from others of its size."""

NEUTRAL = ("store", "observe")
"""The means of a run that change nothing in its result."""


class Block(NamedTuple):
    """A block that was quantized before."""

    files: tuple[Path, ...]
    tensors: StoredTensors
    reports: tuple[LinearReport, ...]


def identity(
    checkpoint: Checkpoint, spec: ModelSpec, calib: Samples, config: QuantConfig, runtime: Runtime, shard_bytes: int
) -> dict[str, Any]:
    """Everything that decides which bytes a run writes, as JSON has it: by value, or as a digest where it is large."""
    device = jax.devices()[0]
    means = {f.name: _told(getattr(runtime, f.name)) for f in fields(runtime) if f.name not in NEUTRAL}
    libraries = {name: version(name) for name in ("gptq-fn", "jax", "jaxlib")}
    found = {
        "config": config.as_dict(),
        "source": {"config.json": checkpoint.config, "files": [_of_file(path) for path in checkpoint.files]},
        "description of the model": _digest(repr(spec).encode()),
        "calibration tokens": _digest(*(part for sample in calib for part in _of_array(np.asarray(sample)))),
        "means": {**means, "tokens_per_call": runtime.tokens, "shard_bytes": shard_bytes},
        "machine": {"device": f"{device.platform} {device.device_kind}", "devices": jax.device_count(), **libraries},
    }
    return json.loads(json.dumps(found))


def begin(aside: Path, run: Mapping[str, Any]) -> None:
    """Begin a run in this directory, or make it ready for the unfinished one there to be continued.

    Raises ValueError, telling what differs, where its complete blocks are those of another run than `run`.
    """
    if done := complete_blocks(aside):
        _require_same(aside, json.loads((aside / RUN).read_text("utf-8")), run)
    else:
        _write_whole(aside / RUN, run)
    for path in aside.glob(RECORD.replace("{:05}", "*")):  # of several processes, one may have been ahead of another
        if path.name >= RECORD.format(done):
            path.unlink()


def blocks_of(aside: Path) -> list[Block]:
    """The complete blocks, from the first on."""
    return [_block(aside, i) for i in range(complete_blocks(aside))]


def complete(aside: Path, i: int, tensors: Iterable[tuple[str, np.ndarray]], reports: Iterable[LinearReport], limit: int) -> None:
    """Write the tensors of block `i`, in files of up to `limit` bytes, and then the record that makes the block complete."""
    parts = write_parts(aside, Path(RECORD.format(i)).stem, tensors, limit)
    _write_whole(aside / RECORD.format(i), {"files": [part.name for part in parts], "linears": [asdict(x) for x in reports]})


def files_of(aside: Path, blocks: int) -> list[Path]:
    """The files of all blocks of a run, in order."""
    return [path for i in range(blocks) for path in _block(aside, i).files]


def _block(aside: Path, i: int) -> Block:
    record = json.loads((aside / RECORD.format(i)).read_text("utf-8"))
    files = tuple(aside / name for name in record["files"])
    return Block(files, tensors_of(files), tuple(LinearReport(**{**x, "shape": tuple(x["shape"])}) for x in record["linears"]))


def _write_whole(path: Path, value: Mapping[str, Any]) -> None:
    """An object in a file that is there, on the disk, whole or not at all."""
    aside = path.with_name(f"new-{path.name}")
    write_json(aside, value)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def _require_same(aside: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError where this run would write other bytes than the one before."""
    differing = [
        f"{key} ({', '.join(parts)})" if (parts := _differing(before.get(key), value)) else key
        for key, value in now.items()
        if before.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"The unfinished run in {aside} cannot be continued, for this one differs in its {' and '.join(differing)}. "
            "Give what was given then, or remove that directory to begin anew."
        )


def _differing(before: Any, now: Any) -> list[str]:
    """The parts of these objects that differ, small ones with their values."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return []
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key} {before.get(key)!r} then, {now.get(key)!r} now" if _is_small(before, now, key) else key for key in keys]


def _is_small(before: Mapping[str, Any], now: Mapping[str, Any], key: str) -> bool:
    return not any(isinstance(each.get(key), dict | list) for each in (before, now))


def _of_file(path: Path) -> dict[str, Any]:
    """What tells a safetensors file from others without reading all of it: its size, its header, some of its bytes."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        end = 8 + int.from_bytes(file.read(8), "little")
        file.seek(0)
        parts = [file.read(end)]
        for start in (end, (end + size) // 2, size - SAMPLE):
            file.seek(max(end, start))
            parts.append(file.read(SAMPLE))
    return {"name": path.name, "bytes": size, "sha256": _digest(*parts)}


def _of_array(array: np.ndarray) -> tuple[bytes, bytes]:
    return str(array.shape).encode(), array.astype(np.int64).tobytes()


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def _told(value: Any) -> str:
    """A value in words that are the same in another process, where functions lie elsewhere."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))
