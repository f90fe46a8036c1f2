"""Packed weights as XLA multiplies them: words of the checkpoint's bit stream, their outputs side by side.

On a CPU the words of 32 inputs are unpacked and multiplied in one vector loop over the outputs; nothing as large as the
weight is written. More rows than a few, or another device, dequantize the weight and multiply densely.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptq_fn_kernels.jax.slots import slots_of
from gptq_fn_kernels.words import pack as pack_words

STEP = 32
"""Inputs that are multiplied at a time: the fewest that fill whole words at any width."""

SMALLEST_GROUP = 8
"""Inputs that share a scale; groups of other sizes are padded."""

FEW = 4
"""Rows that are multiplied word by word. For more of them, unpacking the weight once costs less than unpacking it for each."""


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scales", "zeros", "groups", "gather", "bias"], meta_fields=["bits", "k"])
@dataclass(frozen=True)
class Rows:
    """A quantized linear of `k` inputs, held in slots (see `slots`), `STEP` of them in each row of words.

    Where experts are stacked, every array has a leading axis of experts.
    """

    words: jax.Array
    """int32 [steps, words of a step, out]."""
    scales: jax.Array
    """[groups, out], of any floating dtype."""
    zeros: jax.Array | None
    """uint8 [groups, out], or None where every zero point is the middle code."""
    groups: jax.Array
    """int32 [steps, shares]: the groups of a step's slots."""
    gather: jax.Array | None
    """int32 [slots]: the input of each slot, k where there is none; None where input i is in slot i."""
    bits: int
    k: int
    bias: jax.Array | None = None

    def multiply(self, x: jax.Array) -> jax.Array:
        """x [..., k] -> x W^T [..., out] in x's dtype, without the bias."""
        rows = x.reshape(-1, self.k)
        y = _dense(self, rows) if len(rows) > FEW else jax.lax.platform_dependent(self, rows, cpu=_by_words, default=_dense)
        return y.reshape(*x.shape[:-1], -1)


def pack(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, group_of: np.ndarray, bits: int, symmetric: bool, bias: jax.Array | None
) -> Rows:
    """Codes [out, k], scale and zero [out, groups], and the group of each input [k], as Rows."""
    slots = slots_of(group_of, chunk=STEP, smallest=SMALLEST_GROUP)
    words = _words(codes, zero, slots.inputs, np.repeat(slots.groups, slots.share), bits)
    gather = None if slots.gather is None else jnp.asarray(slots.gather)
    zeros = None if symmetric else zero.T
    return Rows(words, scale.T, zeros, jnp.asarray(slots.groups.reshape(len(words), -1)), gather, bits, len(group_of), bias)


@partial(jax.jit, static_argnames="bits")
def _words(codes: jax.Array, zero: jax.Array, inputs: np.ndarray, groups: np.ndarray, bits: int) -> jax.Array:
    # An empty slot holds its group's zero point, so its weight is 0.
    held = jnp.where((inputs == codes.shape[1])[:, None], zero.T[groups], codes.T.at[inputs].get(mode="clip"))
    return pack_words(held.astype(jnp.int32), bits, jnp.stack).reshape(len(inputs) // STEP, -1, held.shape[1])


def _slotted(p: Rows, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, slots], 0 where there is no input."""
    width = len(p.words) * STEP
    if p.gather is None:
        return jnp.pad(x, ((0, 0), (0, width - p.k)))
    return x.at[:, p.gather].get(mode="fill", fill_value=0)


def _by_words(p: Rows, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out], a step of inputs after the other, in float32."""
    steps = _slotted(p, x).astype(jnp.float32).reshape(len(x), -1, STEP).swapaxes(0, 1)

    def add(ys: tuple[jax.Array, ...], step: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[tuple[jax.Array, ...], None]:
        words, groups, xs = step
        share, codes = STEP // len(groups), list(_codes(words, p.bits))
        for s in range(len(groups)):
            zero = 2 ** (p.bits - 1) if p.zeros is None else _row(p.zeros, groups[s]).astype(jnp.int32)
            levels = [(code - zero).astype(jnp.float32) for code in codes[s * share : (s + 1) * share]]
            scale = _row(p.scales, groups[s]).astype(jnp.float32)
            ys = tuple(y + scale * sum(x[s * share + i] * level for i, level in enumerate(levels)) for x, y in zip(xs, ys, strict=True))
        return ys, None

    # A vector for each row and not a matrix of them: XLA makes vector code of the one, and not of the other.
    nothing = tuple(jnp.zeros(p.words.shape[-1], jnp.float32) for _ in x)
    return jnp.stack(jax.lax.scan(add, nothing, (p.words, p.groups, steps))[0]).astype(x.dtype)


def _row(a: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False)


def _dense(p: Rows, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out], by a weight in x's dtype."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight = dequantize(p).astype(x.dtype)
    return jnp.matmul(_slotted(p, x), weight, precision=precision)


def dequantize(p: Rows) -> jax.Array:
    """The weight [slots, out] in float32; 0 in slots without an input."""

    def one(step: tuple[jax.Array, jax.Array]) -> jax.Array:
        words, groups = step
        of = jnp.repeat(groups, STEP // len(groups), total_repeat_length=STEP)
        levels = jnp.stack(list(_codes(words, p.bits))) - (2 ** (p.bits - 1) if p.zeros is None else p.zeros[of].astype(jnp.int32))
        return levels.astype(jnp.float32) * p.scales[of].astype(jnp.float32)

    return jax.lax.map(one, (p.words, p.groups)).reshape(len(p.words) * STEP, -1)


def _codes(words: jax.Array, bits: int) -> Iterator[jax.Array]:
    """The `STEP` codes in words [words of a step, out], each int32 [out]."""
    for i in range(STEP):
        word, shift = divmod(i * bits, 32)
        code = jax.lax.shift_right_logical(words[word], jnp.int32(shift))
        if shift + bits > 32:
            code = code | words[word + 1] << (32 - shift)
        yield code & (2**bits - 1)
