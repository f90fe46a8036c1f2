"""The fragments of the matrix instructions, and what TMA and the matrix units find in shared memory."""

from dataclasses import dataclass

import numpy as np

from ptx.lanes import floats


@dataclass(frozen=True)
class Map:
    """Where a tensor [rows, columns] of 16 bits is in memory, and the box that is copied of it, in 128-byte rows that are swizzled."""

    address: int
    shape: tuple[int, int]
    stride: int
    """Bytes from one row to the next."""
    box: tuple[int, int]


def swizzled(address: np.ndarray) -> np.ndarray:
    """Where 128-byte swizzling puts what would be at this address of shared memory."""
    return address ^ (address >> 7 & 7) << 4


def box_places(at: int, box: tuple[int, int]) -> np.ndarray:
    """[rows, columns] addresses of the elements of a box that lies at `at` of shared memory."""
    rows, columns = box
    assert columns * 2 == 128, "a row is as wide as the swizzle"
    assert at % 1024 == 0, f"a swizzled box lies at a multiple of 1,024, found {at}"
    return swizzled(at + np.arange(rows)[:, None] * 128 + np.arange(columns)[None, :] * 2)


def left(words: np.ndarray, kind: str) -> np.ndarray:
    """The left operand [16, 16] of a warp's four registers [4, 32]."""
    halves = words.view(np.uint16).reshape(2, 2, 8, 4, 2)
    return floats(halves.transpose(1, 2, 0, 3, 4).reshape(16, 16), kind)


def right(words: np.ndarray, kind: str) -> np.ndarray:
    """The right operand [16, 8] of its two [2, 32]."""
    halves = words.view(np.uint16).reshape(2, 8, 4, 2)
    return floats(halves.transpose(0, 2, 3, 1).reshape(16, 8), kind)


def sums_of(words: np.ndarray) -> np.ndarray:
    """The sums [16, n] of a warp's registers [n / 2, 32]."""
    return words.view(np.float32).reshape(-1, 2, 2, 8, 4).transpose(1, 3, 0, 4, 2).reshape(16, -1)


def words_of(sums: np.ndarray) -> np.ndarray:
    """The registers of sums."""
    n = sums.shape[1]
    return np.ascontiguousarray(sums.reshape(2, 8, n // 8, 4, 2).transpose(2, 0, 4, 1, 3)).reshape(n // 2, 32).view(np.uint32)


def operand_places(descriptor: int, n: int) -> np.ndarray:
    """[n, 16] addresses in shared memory of a warpgroup's right operand, whose inputs lie side by side."""
    start, pitch, layout = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4, descriptor >> 62
    assert layout == 1, "swizzled over 128 bytes"
    rows = np.arange(n)
    return swizzled(start + (rows // 8 * pitch + rows % 8 * 128)[:, None] + np.arange(16)[None, :] * 2)
