"""Packed weights as XLA multiplies them: words whose fields are neighbouring inputs, the outputs side by side.

On a CPU a step of inputs is dequantized and multiplied, then the next: nothing as large as the weight is written, and
the loops over outputs become vector code. Other devices dequantize the weight and multiply densely.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gptq_fn_kernels.jax.around import Around, after, before
from gptq_fn_kernels.slots import slots_of
from gptq_fn_kernels.words import pack as pack_words

STEP = 64
"""Inputs that are multiplied at a time: their weights stay in a cache."""

SMALLEST_GROUP = 8
"""Inputs that share a scale; groups of other sizes are padded."""

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Widths that divide a word, into which codes are cut, the lowest bits first."""


@partial(jax.tree_util.register_dataclass, data_fields=["words", "scales", "zeros", "groups", "gather", "bias"], meta_fields=["bits", "k"])
@dataclass(frozen=True)
class Rows:
    """A quantized linear of `k` inputs, held in slots (see `slots`), `STEP` of them in each row of words.

    Where experts are stacked, every array has a leading axis of experts.
    """

    words: jax.Array
    """int32 [steps, words of a step, out]: plane after plane, in each the inputs in their order."""
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

    def multiply(
        self,
        x: jax.Array,
        *,
        norm: tuple[jax.Array, float, float] | None = None,
        plus: jax.Array | None = None,
        gate: tuple[float, float] | None = None,
    ) -> jax.Array:
        """As `Fragments.multiply`."""
        weight, eps, offset = norm or (None, 0.0, 0.0)
        around = Around(eps, offset, gate)
        rows = before(x.reshape(-1, self.k), weight, around)
        y = jax.lax.platform_dependent(self, rows, cpu=_by_steps, default=_dense)
        return after(y, self.bias, None if plus is None else plus.reshape(-1, plus.shape[-1]), around).reshape(*x.shape[:-1], -1)


def pack(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, group_of: np.ndarray, bits: int, symmetric: bool, bias: jax.Array | None
) -> Rows:
    """Codes [out, k], scale and zero [out, groups], and the group of each input [k], as Rows."""
    slots = slots_of(group_of, chunk=STEP, smallest=SMALLEST_GROUP, largest=STEP)
    words = _words(codes, zero, slots.inputs, np.repeat(slots.groups, slots.share), bits)
    gather = None if slots.gather is None else jnp.asarray(slots.gather)
    zeros = None if symmetric else zero.T
    return Rows(words, scale.T, zeros, jnp.asarray(slots.groups.reshape(len(words), -1)), gather, bits, len(group_of), bias)


@partial(jax.jit, static_argnames="bits")
def _words(codes: jax.Array, zero: jax.Array, inputs: np.ndarray, groups: np.ndarray, bits: int) -> jax.Array:
    # An empty slot holds its group's zero point, so its weight is 0.
    held = jnp.where((inputs == codes.shape[1])[:, None], zero.T[groups], codes.T.at[inputs].get(mode="clip")).astype(jnp.int32)
    planes, shift = [], 0
    for width in PLANES[bits]:
        words = pack_words((held >> shift) & (2**width - 1), width, jnp)
        planes.append(words.reshape(len(inputs) // STEP, -1, held.shape[1]))
        shift += width
    return jnp.concatenate(planes, axis=1)


def _slotted(p: Rows, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, slots], 0 where there is no input."""
    width = len(p.words) * STEP
    if p.gather is None:
        return jnp.pad(x, ((0, 0), (0, width - p.k)))
    return x.at[:, p.gather].get(mode="fill", fill_value=0)


def _by_steps(p: Rows, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out], a step of inputs after the other, in float32."""
    steps = _slotted(p, x).astype(jnp.float32).reshape(len(x), -1, STEP).swapaxes(0, 1)

    def add(y: jax.Array, step: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        words, groups, x = step
        return y + jnp.matmul(x, _weight(p, words, groups), precision=jax.lax.Precision.HIGHEST), None

    nothing = jnp.zeros((len(x), p.words.shape[-1]), jnp.float32)
    return jax.lax.scan(add, nothing, (p.words, p.groups, steps))[0].astype(x.dtype)


def _dense(p: Rows, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out], by a weight in x's dtype."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    weight = jax.vmap(partial(_weight, p))(p.words, p.groups).reshape(-1, p.words.shape[-1])
    return jnp.matmul(_slotted(p, x), weight.astype(x.dtype), precision=precision)


def _weight(p: Rows, words: jax.Array, groups: jax.Array) -> jax.Array:
    """The weight [STEP, out] of a step in float32; 0 in slots without an input."""
    codes, first, shift = jnp.int32(0), 0, 0
    for width in PLANES[p.bits]:
        count = STEP * width // 32
        fields = words[first : first + count, None] >> jnp.arange(0, 32, width, dtype=jnp.int32)[None, :, None]
        codes = codes | (fields & (2**width - 1)).reshape(STEP, -1) << shift
        first, shift = first + count, shift + width
    codes = codes.reshape(len(groups), -1, words.shape[-1])
    zeros = 2 ** (p.bits - 1) if p.zeros is None else p.zeros[groups].astype(jnp.int32)[:, None]
    return ((codes - zeros).astype(jnp.float32) * p.scales[groups].astype(jnp.float32)[:, None]).reshape(STEP, -1)
