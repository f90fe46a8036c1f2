"""What arithmetic does to 32 lanes, whose registers are arrays of bits."""

import operator
import re
from collections.abc import Callable
from functools import cache

import numpy as np

Lanes = np.ndarray
Meaning = tuple[Callable[..., Lanes], tuple[str, ...]]
"""Of the operands' values, and their types."""

_BITS = {"8": np.uint8, "16": np.uint16, "32": np.uint32, "64": np.uint64}
_NAMED = {"pred": np.bool_, "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32}
_COMPARED = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert, "neg": np.negative}
_PLAIN = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "min": np.minimum, "max": np.maximum}


def dtype_of(kind: str) -> np.dtype:
    """Of a type of PTX's."""
    if kind in _NAMED:
        return np.dtype(_NAMED[kind])
    unsigned = np.dtype(_BITS[kind[1:]])
    return np.dtype(f"i{unsigned.itemsize}") if kind[0] == "s" else unsigned


@cache
def meaning(op: str) -> Meaning | None:
    """What the instruction computes, or None where it does more than that."""
    name, *how, kind = op.split(".")
    bits = 8 * dtype_of(kind).itemsize if kind in _NAMED or re.fullmatch(r"[subf]\d+", kind) else 0
    if kind in ("f16x2", "bf16x2") and name != "cvt":
        return _pairs({**_PLAIN, "fma": lambda a, b, c: a * b + c}[name], kind), (kind,) * (3 if name == "fma" else 2)
    if name == "mov":
        return (lambda a: a), (kind,)
    if name == "setp":
        return _COMPARED[how[0]], (kind, kind)
    if name == "selp":
        return (lambda a, b, p: np.where(p, a, b)), (kind, kind, "pred")
    if name == "cvt":
        return _conversion(how[-1], kind)
    if name in ("mul", "mad") and how and how[0] in ("wide", "hi"):
        return _wide(name, how[0], kind, bits)
    if name == "mad":
        return (lambda a, b, c: a * b + c), (kind,) * 3
    if name == "fma":
        return (lambda a, b, c: (a.astype(float) * b + c).astype(np.float32)), (kind,) * 3
    if name == "shl":
        return (lambda a, n: np.where(n < bits, a << np.minimum(n, bits - 1).astype(a.dtype), 0).astype(a.dtype)), (kind, "u32")
    if name == "shr":
        rest = (lambda a: a >> a.dtype.type(bits - 1)) if kind[0] == "s" else np.zeros_like
        return (lambda a, n: np.where(n < bits, a >> np.minimum(n, bits - 1).astype(a.dtype), rest(a))), (kind, "u32")
    if name == "div":
        return _quotient, (kind, kind)
    if name == "rem":
        return (lambda a, b: a - _quotient(a, b) * b), (kind, kind)
    if name == "lop3":
        return _lop3, ("b32",) * 4
    if name == "prmt":
        return _prmt, ("b32",) * 3
    if name == "bfi":
        return _bfi, ("b32",) * 4
    if name in _LOGIC:
        return _LOGIC[name], (kind,) * (1 if name in ("not", "neg") else 2)
    if name in _PLAIN:
        return _PLAIN[name], (kind, kind)
    return None


def brains(f: Lanes) -> Lanes:
    """float64 -> the bits of bfloat16, rounded once to the nearest, ties to even."""
    bits = np.asarray(f, np.float64).view(np.uint64)
    cut = np.uint64(45)
    rounded = (bits + (bits >> cut & np.uint64(1)) + np.uint64(2**44 - 1)) >> cut << cut
    return (rounded.view(np.float64).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def floats(bits: Lanes, kind: str) -> Lanes:
    """The bits of float16 or bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def _halves(f: Lanes, kind: str) -> Lanes:
    return brains(f) if kind == "bf16" else np.asarray(f).astype(np.float16).view(np.uint16)


def _pairs(f: Callable[..., Lanes], kind: str) -> Callable[..., Lanes]:
    """What f does to each half of words, in exact arithmetic rounded once."""

    def both(*words: Lanes) -> Lanes:
        return _halves(f(*(floats(word.view(np.uint16), kind[:-2]).astype(float) for word in words)), kind[:-2]).view(np.uint32)

    return both


def _conversion(to: str, of: str) -> Meaning:
    if to in ("f16x2", "bf16x2"):  # the first operand is the upper half
        return (lambda high, low: np.stack([_halves(low, to[:-2]), _halves(high, to[:-2])], 1).reshape(-1).view(np.uint32)), (of, of)
    if to in ("f16", "bf16"):
        return (lambda a: _halves(a, to)), (of,)
    return (lambda a: a.astype(dtype_of(to))), (of,)


def _wide(name: str, how: str, kind: str, bits: int) -> Meaning:
    double = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{min(bits // 4, 8)}")
    if name == "mad":
        return (lambda a, b, c: a.astype(double) * b.astype(double) + c.view(double)), (kind, kind, f"{kind[0]}{2 * bits}")
    if how == "wide":
        return (lambda a, b: a.astype(double) * b.astype(double)), (kind, kind)
    return (lambda a, b: (a.astype(object) * b.astype(object) >> bits).astype(dtype_of(kind))), (kind, kind)


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    b = np.where(b == 0, 1, b).astype(b.dtype)  # of lanes that are not active
    return np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b)) if a.dtype.kind == "i" else a // b


def _lop3(a: Lanes, b: Lanes, c: Lanes, table: Lanes) -> Lanes:
    found = np.zeros_like(a)
    for i in range(8):
        if table[0] >> i & 1:
            found |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return found


def _prmt(a: Lanes, b: Lanes, select: Lanes) -> Lanes:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found = np.zeros_like(both)
    for i in range(4):
        byte = (select >> 4 * i & 7).astype(np.uint64)
        found |= (both >> byte * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return found.astype(np.uint32)


def _bfi(a: Lanes, b: Lanes, at: Lanes, size: Lanes) -> Lanes:
    mask = (((1 << size.astype(np.uint64)) - np.uint64(1)) << at.astype(np.uint64)).astype(np.uint32)
    return b & ~mask | a << at & mask
