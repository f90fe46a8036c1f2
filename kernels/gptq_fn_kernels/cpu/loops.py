"""Loops over words of codes that numba compiles on their first call, around vector instructions that are written out.

LLVM's own vectorizer finds such loops, too, but peels or abandons them over details: a factor of 3 that any line gains or
loses. Written as vectors they become the machine's instructions, whatever their width.

A code becomes a float without a conversion: it is or-ed into the mantissa of a power of two, where it lies, and the power is
the one for which the code's lowest bit there is worth 1. To subtract the power and the zero point is exact and leaves code - zero.
A mantissa's 23 bits hold half a word's codes; for the other half the word is shifted once.

All is in one file since numba's cache on disk looks only at the file of the function that it compiled.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core import cgutils

BLOCK = 64
"""The outputs whose words lie together."""

_LANES = 16
_FLOATS, _WORDS, _SHORTS, _BYTES = (ir.VectorType(t, _LANES) for t in (ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)))


_intrinsic: Any = extending.intrinsic  # of any type: the callers' arguments are not those of the definitions


def _compiled(function: Callable[..., Any]) -> Any:
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written
        return njit(nogil=True)(function)


@_compiled
def repack(qweight, inputs, k, bits, words):
    """Fills words uint32 [blocks, rows, BLOCK]: code i of a word in row r is that of input inputs[r, i], at bit i * bits.

    qweight is uint32 [words, n], a checkpoint's; inputs int32 [rows, codes], with k for what stays empty.
    """
    n, mask = qweight.shape[1], np.uint32(2**bits - 1)
    for r in range(inputs.shape[0]):
        for i in range(inputs.shape[1]):
            if inputs[r, i] == k:
                continue
            first, shift = divmod(inputs[r, i] * bits, 32)
            spills = shift + bits > 32
            low, high, place = qweight[first], qweight[first + spills], np.uint32(i * bits)
            for block in range(words.shape[0]):
                to = words[block, r]
                for j in range(min(BLOCK, n - block * BLOCK)):
                    code = low[block * BLOCK + j] >> np.uint32(shift)
                    if spills:
                        code |= high[block * BLOCK + j] << np.uint32(32 - shift)
                    to[j] |= (code & mask) << place


@_compiled
def multiply(x, inputs, words, scales, zeros, runs, bits, rows, y, first, last):
    """y[:, outputs of the blocks first to last] = x W^T, for x float32 [m, k] and y float32 [m, n].

    Computes len(rows) rows of x at a time, for which a word is unpacked once.
    """
    tile, k = len(rows), x.shape[1]
    sorted_x = np.zeros((inputs.shape[0], tile, inputs.shape[1]), np.float32)
    total = np.empty((tile, BLOCK), np.float32)
    for start in range(0, x.shape[0], tile):
        here = min(tile, x.shape[0] - start)
        for r in range(inputs.shape[0]):
            for m in range(here):
                for i in range(inputs.shape[1]):
                    sorted_x[r, m, i] = x[start + m, inputs[r, i]] if inputs[r, i] < k else np.float32(0)
        for block in range(first, last):
            total[:] = 0
            for begin, end, g in runs:
                _add_words(total, words[block, begin:end], sorted_x[begin:end], scales[block, g], zeros[block, g], bits, rows)
            for m in range(here):
                for j in range(min(BLOCK, y.shape[1] - block * BLOCK)):
                    y[start + m, block * BLOCK + j] = total[m, j]


@_compiled
def dequantize(inputs, words, scales, zeros, runs, bits, panel, start, first, last):
    """Fills the columns of panel [k + 1, columns] for the blocks first to last; column 0 belongs to block `start`.

    The panel is float32, or uint16 for the bits of bfloat16. What stands in its last row is of no use.
    """
    for block in range(first, last):
        for begin, end, g in runs:
            for r in range(begin, end):
                _write_word(panel, (block - start) * BLOCK, inputs[r], words[block, r], scales[block, g], zeros[block, g], bits)


# vectors


@_intrinsic
def _add_words(_: Any, total: Any, words: Any, x: Any, scale: Any, zero: Any, bits: Any, rows: Any) -> Any:
    """total[m, j] += scale[j] * sum over r, i of x[r, m, i] * (code i of words[r, j] - zero[j]), for each output j of a block.

    Arrays: total float32 [rows, BLOCK], words uint32 [run, BLOCK], x float32 [run, rows, 32 // bits], scale float32 and zero
    uint8 [BLOCK]. `bits` and `rows` are tuples of these lengths: numba compiles once for each type, and a length is part of it.
    """
    per = 32 // bits.count
    pieces = min(max(8 // rows.count, 1), BLOCK // _LANES)  # up to eight sums at a time hide an addition's latency and fit the registers

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        to, first, xs, scales, zeros = (_start(context, b, t, a) for t, a in zip(signature.args[:5], arguments[:5], strict=True))
        run = b.extract_value(context.make_array(words)(context, b, arguments[1]).shape, 0)
        sums = [[cgutils.alloca_once(b, _FLOATS) for _ in range(rows.count)] for _ in range(pieces)]
        with cgutils.for_range(b, _n(BLOCK // _LANES // pieces)) as over:
            places = [b.mul(b.add(b.mul(over.index, _n(pieces)), _n(piece)), _n(_LANES)) for piece in range(pieces)]
            origins = [_origins(b, zeros, j, bits.count) for j in places]
            for sum_m in (sum_m for part in sums for sum_m in part):
                b.store(_floats(0.0), sum_m)
            with cgutils.for_range(b, run) as loop:
                x_r = b.gep(xs, [b.mul(loop.index, _n(rows.count * per))])
                word_r = b.gep(first, [b.mul(loop.index, _n(BLOCK))])
                for j, origin, part in zip(places, origins, sums, strict=True):
                    for i, value in enumerate(_values(b, _load(b, word_r, j, _WORDS), origin, bits.count)):
                        for m, sum_m in enumerate(part):
                            b.store(_add(b, b.load(sum_m), value, _spread(b, b.load(b.gep(x_r, [_n(m * per + i)])))), sum_m)
            for j, part in zip(places, sums, strict=True):
                for m, sum_m in enumerate(part):
                    place = b.add(j, _n(m * BLOCK))
                    _store(b, _add(b, _load(b, to, place, _FLOATS), b.load(sum_m), _load(b, scales, j, _FLOATS)), to, place)
        return context.get_dummy_value()

    return types.void(total, words, x, scale, zero, bits, rows), emit


@_intrinsic
def _write_word(_: Any, panel: Any, column: Any, inputs: Any, word: Any, scale: Any, zero: Any, bits: Any) -> Any:
    """panel[inputs[i], column + j] = scale[j] * (code i of word[j] - zero[j]), for each output j of a block.

    Arrays: panel float32 or uint16 (then bfloat16's bits) [inputs, columns], inputs int32 [32 // bits]; the others as in `_add_words`.
    """

    def emit(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        to, _, places, words, scales, zeros = (_start(context, b, t, a) for t, a in zip(signature.args[:6], arguments[:6], strict=True))
        columns = b.extract_value(context.make_array(panel)(context, b, arguments[0]).shape, 1)
        rows = []
        for i in range(32 // bits.count):
            row = b.zext(b.load(b.gep(places, [_n(i)])), ir.IntType(64))
            rows.append(b.gep(to, [b.add(b.mul(row, columns), arguments[1])]))
        with cgutils.for_range(b, _n(BLOCK // _LANES)) as over:
            j = b.mul(over.index, _n(_LANES))
            factor = _load(b, scales, j, _FLOATS)
            values = _values(b, _load(b, words, j, _WORDS), _origins(b, zeros, j, bits.count), bits.count)
            for row, value in zip(rows, values, strict=True):
                exact = b.fmul(factor, value)
                _store(b, exact if panel.dtype == types.float32 else _bfloat16(b, exact), row, j)
        return context.get_dummy_value()

    return types.void(panel, types.int64, inputs, word, scale, zero, bits), emit


def _powers(bits: int) -> list[float]:
    return [float(2 ** (23 - bits * i)) for i in range(32 // bits // 2)]


def _origins(b: Any, zeros: Any, j: Any, bits: int) -> list[Any]:
    """What a zero point becomes at each place of half a word."""
    zero = b.uitofp(_load(b, zeros, j, _BYTES), _FLOATS)
    return [b.fadd(_floats(power), zero) for power in _powers(bits)]


def _values(b: Any, word: Any, origins: list[Any], bits: int) -> Iterator[Any]:
    """code - zero for each code of the words."""
    for shift in (0, bits * len(origins)):
        shifted = b.lshr(word, _words(shift))
        for i, (power, origin) in enumerate(zip(_powers(bits), origins, strict=True)):
            code = b.and_(shifted, _words((2**bits - 1) << bits * i))
            yield b.fsub(b.bitcast(b.or_(code, b.bitcast(_floats(power), _WORDS)), _FLOATS), origin)


def _bfloat16(b: Any, value: Any) -> Any:
    """The upper 16 bits of float32s, rounded to the nearest and to even."""
    bits = b.bitcast(value, _WORDS)
    odd = b.and_(b.lshr(bits, _words(16)), _words(1))
    return b.trunc(b.lshr(b.add(bits, b.add(odd, _words(0x7FFF))), _words(16)), _SHORTS)


def _add(b: Any, to: Any, p: Any, q: Any) -> Any:
    """to + p * q, rounded once where the machine can: always or never, so that a row's sum does not depend on its neighbours."""
    fused = cgutils.get_or_insert_function(b.module, ir.FunctionType(_FLOATS, [_FLOATS] * 3), f"llvm.fmuladd.v{_LANES}f32")
    return b.call(fused, [p, q, to])


def _spread(b: Any, value: Any) -> Any:
    first = b.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return b.shuffle_vector(first, first, ir.Constant(_WORDS, None))


def _start(context: Any, b: Any, kind: Any, value: Any) -> Any:
    return context.make_array(kind)(context, b, value).data if isinstance(kind, types.Array) else None


def _load(b: Any, start: Any, j: Any, kind: Any) -> Any:
    return b.load(b.bitcast(b.gep(start, [j]), kind.as_pointer()), align=1)


def _store(b: Any, value: Any, start: Any, j: Any) -> None:
    b.store(value, b.bitcast(b.gep(start, [j]), value.type.as_pointer()), align=1)


def _n(number: int) -> Any:
    return ir.Constant(ir.IntType(64), number)


def _words(number: int) -> Any:
    return ir.Constant(_WORDS, [number] * _LANES)


def _floats(number: float) -> Any:
    return ir.Constant(_FLOATS, [number] * _LANES)
