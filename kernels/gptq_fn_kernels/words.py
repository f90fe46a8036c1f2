"""The bit stream of GPTQ checkpoints: codes of 2, 3, 4 or 8 bits in int32 words, lowest bits first.

Code k of a column occupies bits [k * bits, (k + 1) * bits) of the column's stream; bit p lies in word p // 32 at p % 32.
2, 4 and 8 bits divide a word; 32 codes of 3 bits fill three words and two of them cross a boundary. Everything here is
shifts and masks, so it serves arrays of several libraries alike: `xp` is the one that the arrays are of, numpy, torch or jax.numpy.
"""

from functools import reduce
from operator import or_
from typing import Any


def words_of(count: int, bits: int) -> int:
    """The number of words that `count` codes fill, the last one padded with zeros."""
    return -(-count * bits // 32)


def chunk_of(bits: int) -> tuple[int, int]:
    """The smallest (codes, words) that begin and end together."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def unpack(words: Any, bits: int, count: int, xp: Any) -> Any:
    """int32 words [words, ...] -> the first `count` codes [count, ...] as int32.

    Raises ValueError where `count` codes would need another number of words.
    """
    codes_per_chunk, words_per_chunk = chunk_of(bits)
    if words.shape[0] != words_of(count, bits):
        raise ValueError(f"{count} codes of {bits} bits fill {words_of(count, bits)} words, but there are {words.shape[0]}.")
    chunks = _filled(words, words_per_chunk, xp).reshape(-1, words_per_chunk, *words.shape[1:])

    def code(i: int) -> Any:
        word, shift = divmod(i * bits, 32)
        fits = min(bits, 32 - shift)  # bits of this code that lie in the first of its words
        low = (chunks[:, word] >> shift) & (2**fits - 1)
        return low if fits == bits else low | ((chunks[:, word + 1] & (2 ** (bits - fits) - 1)) << fits)

    return xp.stack([code(i) for i in range(codes_per_chunk)], 1).reshape(-1, *words.shape[1:])[:count]


def pack(codes: Any, bits: int, xp: Any) -> Any:
    """int32 codes [count, ...] -> words [words_of(count, bits), ...]; behind the last code they are 0."""
    codes_per_chunk, words_per_chunk = chunk_of(bits)
    chunks = _filled(codes, codes_per_chunk, xp).reshape(-1, codes_per_chunk, *codes.shape[1:])

    def part(i: int, word: int) -> Any:
        shift = i * bits - 32 * word
        return chunks[:, i] << shift if shift >= 0 else chunks[:, i] >> -shift

    def word(j: int) -> Any:
        return reduce(or_, (part(i, j) for i in range(codes_per_chunk) if i * bits < 32 * (j + 1) and (i + 1) * bits > 32 * j))

    words = xp.stack([word(j) for j in range(words_per_chunk)], 1).reshape(-1, *codes.shape[1:])
    return words[: words_of(codes.shape[0], bits)]


def _filled(x: Any, size: int, xp: Any) -> Any:
    """x [count, ...] with zeros behind, up to a multiple of `size`."""
    missing = -x.shape[0] % size
    return xp.concatenate([x, xp.broadcast_to(xp.zeros_like(x[:1]), (missing, *x.shape[1:]))]) if missing else x
