"""The bit stream of GPTQ checkpoints: codes of 2, 3, 4 or 8 bits in int32 words, lowest bits first.

Code k of a column occupies bits [k * bits, (k + 1) * bits) of the column's stream; bit p lies in word p // 32 at p % 32.
2, 4 and 8 bits divide a word; 32 codes of 3 bits fill three words and two of them cross a boundary. Everything here is
shifts and masks, so it serves NumPy arrays and torch tensors alike: `stack` is `np.stack` or `torch.stack`.
"""

from collections.abc import Callable
from functools import reduce
from operator import or_
from typing import Any


def words_of(count: int, bits: int) -> int:
    """The number of words that `count` codes fill, the last one padded with zeros."""
    return -(-count * bits // 32)


def chunk_of(bits: int) -> tuple[int, int]:
    """The smallest (codes, words) that begin and end together."""
    return (32, 3) if bits == 3 else (32 // bits, 1)


def unpack(words: Any, bits: int, count: int, stack: Callable[..., Any]) -> Any:
    """int32 words [words, ...] -> the first `count` codes [count, ...] as int32.

    Raises ValueError where `count` codes would need another number of words.
    """
    codes_per_chunk, words_per_chunk = chunk_of(bits)
    if words.shape[0] != words_of(count, bits) or words.shape[0] % words_per_chunk:
        raise ValueError(f"{count} codes of {bits} bits fill {words_of(count, bits)} words, but there are {words.shape[0]}.")
    chunks = words.reshape(-1, words_per_chunk, *words.shape[1:])

    def code(i: int) -> Any:
        word, shift = divmod(i * bits, 32)
        fits = min(bits, 32 - shift)  # bits of this code that lie in the first of its words
        low = (chunks[:, word] >> shift) & (2**fits - 1)
        return low if fits == bits else low | ((chunks[:, word + 1] & (2 ** (bits - fits) - 1)) << fits)

    return stack([code(i) for i in range(codes_per_chunk)], 1).reshape(-1, *words.shape[1:])[:count]


def pack(codes: Any, bits: int, stack: Callable[..., Any]) -> Any:
    """int32 codes [count, ...] -> words [count * bits / 32, ...]; `count` must be a whole number of chunks."""
    codes_per_chunk, words_per_chunk = chunk_of(bits)
    if codes.shape[0] % codes_per_chunk:
        raise ValueError(f"{codes.shape[0]} codes of {bits} bits do not fill whole words: they come in chunks of {codes_per_chunk}.")
    chunks = codes.reshape(-1, codes_per_chunk, *codes.shape[1:])

    def part(i: int, word: int) -> Any:
        shift = i * bits - 32 * word
        return chunks[:, i] << shift if shift >= 0 else chunks[:, i] >> -shift

    def word(j: int) -> Any:
        return reduce(or_, (part(i, j) for i in range(codes_per_chunk) if i * bits < 32 * (j + 1) and (i + 1) * bits > 32 * j))

    return stack([word(j) for j in range(words_per_chunk)], 1).reshape(-1, *codes.shape[1:])
