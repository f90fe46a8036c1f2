"""safetensors files: what their headers tell, one tensor at a time read from them, and new ones written through to the disk.

A file is the length of its header (8 bytes, little-endian), the header in JSON, and the bytes of the tensors.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - teaches NumPy bfloat16
import numpy as np
from safetensors import SafetensorError, safe_open

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "BOOL": "bool"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
    **{"U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8"},
}
"""What safetensors calls the dtypes of NumPy and ml_dtypes."""

READ = tuple(DTYPES.values())


class Entry(NamedTuple):
    """What the header of a file tells of a tensor."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    """As NumPy calls it, or as safetensors does where NumPy has no such dtype."""
    offset: int
    """Where in the file its bytes begin."""

    @property
    def nbytes(self) -> int:
        """Size in bytes. Only for dtypes that can be read."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def headers(path: Path) -> dict[str, Entry]:
    """What the header of a safetensors file tells. Raises ValueError in a sentence for a file that is damaged."""
    try:
        with safe_open(path, framework="numpy"):
            pass  # it has checked the header against itself and against the size of the file
        with open(path, "rb") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            told: dict[str, Any] = json.loads(file.read(start - 8))
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} is not a readable safetensors file: {reason}. It is damaged, or not copied completely.") from None
    told.pop("__metadata__", None)
    return {
        name: Entry(path, tuple(x["shape"]), DTYPES.get(kind := str(x["dtype"]), kind), start + x["data_offsets"][0])
        for name, x in told.items()
    }


def read(name: str, entry: Entry) -> np.ndarray:
    """The tensor called `name` that `entry` tells of; its memory is the caller's.

    Raises ValueError for a dtype that NumPy does not have and for a file that has become shorter, OSError where reading fails.
    """
    if entry.dtype not in READ:
        raise ValueError(f"{name} in {entry.path} is stored as {entry.dtype}; tensors of {', '.join(READ)} can be read.")
    array = np.empty(entry.shape, entry.dtype)
    with open(entry.path, "rb") as file:  # not mapped: a file that shrinks would crash the process, and pages would stay
        file.seek(entry.offset)
        if file.readinto(_bytes(array)) < array.nbytes:
            raise ValueError(f"{entry.path} ends before {name} does: it was cut off since it was opened. Copy it again.")
    return array


class StoredTensors(Mapping[str, np.ndarray]):
    """The tensors that entries tell of, each read when it is asked for."""

    def __init__(self, entries: Mapping[str, Entry]):
        """No tensor is read."""
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        """The tensor of this name. Raises as `read` does."""
        return read(name, self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def tensors_of(paths: Sequence[Path]) -> StoredTensors:
    """The tensors of these files. Raises ValueError for one that is damaged."""
    return StoredTensors({name: entry for path in paths for name, entry in headers(path).items()})


def write(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write these tensors to a file. Raises OSError."""
    _write(path, {name: (array.shape, str(array.dtype)) for name, array in tensors.items()}, tensors.__getitem__)


def join(paths: Sequence[Path], path: Path) -> None:
    """Write the tensors of files to one, with one tensor in memory at a time. Raises OSError."""
    found = tensors_of(paths)
    _write(path, {name: (entry.shape, entry.dtype) for name, entry in found.entries.items()}, found.__getitem__)


def _write(path: Path, kinds: Mapping[str, tuple[tuple[int, ...], str]], tensor_of: Callable[[str], np.ndarray]) -> None:
    """Wider dtypes come first, so that every tensor lies at a multiple of its item size, on which readers rely."""
    stored = {np.dtype(name): code for code, name in DTYPES.items()}
    ordered = sorted(kinds, key=lambda name: (-np.dtype(kinds[name][1]).itemsize, name))
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        shape, dtype = kinds[name]
        begin, end = end, end + Entry(path, shape, dtype, 0).nbytes
        told[name] = {"dtype": stored[np.dtype(dtype)], "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(told, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb", buffering=0) as file:
        _put(file, len(header).to_bytes(8, "little") + header)
        for name in ordered:
            _put(file, _bytes(np.ascontiguousarray(tensor_of(name))))
        os.fsync(file.fileno())


def _put(file: Any, content: bytes | memoryview) -> None:
    """Write all of it: Linux takes 2 GiB at a time. Raises OSError, with the file's name."""
    left = memoryview(content)
    while len(left):
        try:
            left = left[file.write(left) :]
        except OSError as error:  # tells no file
            raise OSError(error.errno, error.strerror, str(file.name)) from error


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
