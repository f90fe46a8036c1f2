"""How the Triton kernels hold codes: words whose bits fall straight into the registers of a matrix instruction.

Inputs come in chunks, and a chunk of one output is 16 words of 32 bits. Both halves of a word hold `16 / bits` codes,
so one mask takes out a pair of neighbouring inputs, one in each half, which is what a register of two 16-bit floats
wants. Word and field are numbered so that a thread of `mma` or `wgmma` finds the words of its fragment side by side:

    input in its chunk = half * (16 * fields) + field * 16 + eight * 8 + lane * 2 + pair
    word               = lane * 4 + half * 2 + eight             (lane < 4; half, eight and pair < 2)
    bit                = pair * 16 + field * bits

That is the order of the CUDA kernels. Where codes are joined to pairs, Triton (3.6) gives a thread of `mma` four neighbouring
inputs instead of two twice, so of a lane's number the lower bit belongs to the thread's own words, and eight does not:

    word of Triton     = lane // 2 * 8 + eight * 4 + lane % 2 * 2 + half

Codes of 3 bits are cut into their lower 2, held like codes of 2 bits, and their highest, 16 of which fill a short word
that belongs to a word of the lower ones: bit = pair * 8 + field. So every width takes as many bits as it is called.
Everything here is shifts and reshapes of whole numbers, so it serves torch tensors and JAX and NumPy arrays alike.
"""

from functools import reduce
from operator import or_
from typing import Any

WORDS = 16
"""Words of one output in a chunk."""

FOR_TRITON = [8 * high + 4 * low + 2 * half + eight for high in (0, 1) for eight in (0, 1) for low in (0, 1) for half in (0, 1)]
"""The word of `pack_words` that is each of the Triton kernels' words."""

FROM_TRITON = [FOR_TRITON.index(word) for word in range(WORDS)]
"""The other way."""

SMALLEST_GROUP = 16
"""Inputs that a matrix instruction takes at once: they share a scale."""

_GROUPS = 4
"""A chunk has at least as many groups, though their scales be the same: fewer cannot be copied ahead in whole words."""


def largest_group_of(bits: int) -> int:
    """The most inputs that share a scale in this layout."""
    return chunk_of(bits) // _GROUPS


def fields_of(bits: int) -> int:
    """Codes in a half of a word."""
    return 16 // (2 if bits == 3 else bits)


def chunk_of(bits: int) -> int:
    """Inputs in a chunk."""
    return 2 * WORDS * fields_of(bits)


def pack_words(codes: Any, bits: int) -> tuple[Any, Any]:
    """Codes [n, k], k a whole number of chunks -> words [k / chunk, n, 16] and, for 3 bits, the highest bits [k / chunk, n, 16].

    Both have the integers of the codes; of the highest bits only the lower 16 are used: whoever keeps them takes int16.
    """
    n, k = codes.shape
    fields = fields_of(bits)
    parts = codes.reshape(n, k // chunk_of(bits), 2, fields, 2, 4, 2)  # n, chunk, half, field, eight, lane, pair
    words = _joined(parts & 3 if bits == 3 else parts, 2 if bits == 3 else bits, 16)
    return words, _joined(parts >> 2, 1, 8) if bits == 3 else None


def unpack_words(words: Any, high: Any, bits: int, stack: Any) -> Any:
    """What `pack_words` was given, int32 [n, k]; `stack` is `torch.stack` or `jnp.stack`."""
    codes = _fields(words, 2 if bits == 3 else bits, fields_of(bits), 16, stack)
    if high is not None:
        codes = codes | _fields(high, 1, fields_of(bits), 8, stack) << 2
    chunks, n = words.shape[:2]
    # chunk, n, lane, half, eight, field, pair -> n, chunk, half, field, eight, lane, pair
    return _moved(codes.reshape(chunks, n, 4, 2, 2, -1, 2), (1, 0, 3, 5, 4, 2, 6)).reshape(n, -1)


def _joined(parts: Any, bits: int, pair_shift: int) -> Any:
    n, chunks, _, fields = parts.shape[:4]
    word = reduce(or_, (parts[:, :, :, i, :, :, e] << (bits * i + pair_shift * e) for i in range(fields) for e in range(2)))
    return _moved(word, (1, 0, 4, 2, 3)).reshape(chunks, n, WORDS)  # n, chunk, half, eight, lane -> chunk, n, lane, half, eight


def _fields(words: Any, bits: int, fields: int, pair_shift: int, stack: Any) -> Any:
    return stack([(words >> (bits * i + pair_shift * e)) & (2**bits - 1) for i in range(fields) for e in range(2)], -1)


def _moved(a: Any, axes: tuple[int, ...]) -> Any:
    return a.permute(axes) if hasattr(a, "permute") else a.transpose(axes)
