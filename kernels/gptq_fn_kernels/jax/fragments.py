"""Packed weights as the Triton kernels multiply them, and as XLA does where there is no GPU."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptq_fn_kernels.jax.around import Around, after, before
from gptq_fn_kernels.jax.launch import launch
from gptq_fn_kernels.slots import slots_of
from gptq_fn_kernels.triton.layout import (
    FOR_TRITON,
    FROM_TRITON,
    SMALLEST_GROUP,
    chunk_of,
    largest_group_of,
    pack_words,
    unpack_words,
)
from gptq_fn_kernels.triton.plan import DENSE_OUTPUTS, Gpu, constants_of, plan_of


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["words", "high", "zeros", "scales", "gather", "bias"],
    meta_fields=["bits", "group", "k"],
)
@dataclass(frozen=True)
class Fragments:
    """A quantized linear of `k` inputs, held in slots (see `slots`), laid out for the registers of matrix instructions.

    Where experts are stacked, every array has a leading axis of experts.
    """

    words: jax.Array
    """int32 [chunks, out, 16], as in `gptq_fn_kernels.triton.layout`, in Triton's order."""
    high: jax.Array | None
    """int16 [chunks, out, 16]: the highest bits of codes of 3 bits."""
    zeros: jax.Array | None
    """float16 [slots / group, out], whole numbers, or None where every zero point is the middle code."""
    scales: jax.Array
    """[slots / group, out], of any floating dtype."""
    gather: jax.Array | None
    """int32 [slots]: the input of each slot, k where there is none; None where input i is in slot i."""
    bits: int
    group: int
    """Slots that share a scale."""
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
        """x [..., k] -> x W^T + b [..., out] in x's dtype.

        norm: weights [k], epsilon and offset of an RMS norm that x is to go through before. plus [..., out] is added, or else
        gate: a and b, by which the first half z of the outputs becomes z * sigmoid(a z + b z^3) times the other half.
        """
        weight, eps, offset = norm or (None, 0.0, 0.0)
        rows = None if plus is None else plus.reshape(-1, plus.shape[-1])
        return _product(Around(eps, offset, gate), self, x.reshape(-1, self.k), weight, rows).reshape(*x.shape[:-1], -1)


def pack(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, group_of: np.ndarray, bits: int, symmetric: bool, bias: jax.Array | None
) -> Fragments:
    """Codes [out, k], scale and zero [out, groups], and the group of each input [k], as Fragments."""
    slots = slots_of(group_of, chunk=chunk_of(bits), smallest=SMALLEST_GROUP, largest=largest_group_of(bits))
    words, high = _words(codes, zero, slots.inputs, np.repeat(slots.groups, slots.share), bits)
    gather = None if slots.gather is None else jnp.asarray(slots.gather)
    zeros = None if symmetric else zero.T[slots.groups].astype(jnp.float16)
    return Fragments(words, high, zeros, scale.T[slots.groups], gather, bits, slots.share, len(group_of), bias)


@partial(jax.jit, static_argnames="bits")
def _words(codes: jax.Array, zero: jax.Array, inputs: np.ndarray, groups: np.ndarray, bits: int) -> tuple[jax.Array, jax.Array | None]:
    # An empty slot holds its group's zero point, so its weight is 0.
    held = jnp.where((inputs == codes.shape[1])[None], zero[:, groups], codes.at[:, inputs].get(mode="clip"))
    words, high = pack_words(held.astype(jnp.int32), bits)
    order = np.asarray(FOR_TRITON)
    return words[..., order], None if high is None else high[..., order].astype(jnp.int16)


def _multiplied(around: Around, p: Fragments, x: jax.Array, norm: jax.Array | None, plus: jax.Array | None) -> jax.Array:
    """x [m, k] -> [m, out], or half as many where they are gated."""
    return jax.lax.platform_dependent(p, x, norm, plus, cuda=partial(_by_kernel, around), default=partial(_dense, around))


_product = jax.custom_vjp(_multiplied, nondiff_argnums=(0,))
_Given = tuple[Fragments, jax.Array, jax.Array | None, jax.Array | None]


def _forward(around: Around, *given: Any) -> tuple[jax.Array, _Given]:
    return _product(around, *given), given


def _backward(around: Around, given: _Given, slope: jax.Array) -> _Given:
    """The gradients of the dense product: a kernel has none."""
    return jax.vjp(partial(_dense, around), *given)[1](slope)


_product.defvjp(_forward, _backward)


def _by_kernel(around: Around, p: Fragments, x: jax.Array, norm: jax.Array | None, plus: jax.Array | None) -> jax.Array:
    """x [m, k] -> [m, out], by the kernels that `gptq_fn_kernels.triton.plan` names for a GPU."""
    (m, k), (chunks, n, _) = x.shape, p.words.shape
    here, weight = gpu(), {"words": p.words, "high": p.high, "zeros": p.zeros, "scales": p.scales}
    if here is None:  # this branch is traced, too, where the program will run elsewhere
        return _dense(around, p, x, norm, plus)
    constants = constants_of(p.bits, p.group, x.dtype == jnp.bfloat16)
    plan = plan_of(m, n, k, bits=p.bits, itemsize=x.dtype.itemsize, gpu=here)
    few, precision = plan is not None and plan.kernel == "few_rows", "tf32x3" if x.dtype == jnp.float32 and here.tensor_float else "ieee"
    if not (few and m == 1):
        x, norm = before(x, norm, around), None
    if plan is None:
        whole = jax.ShapeDtypeStruct((n, chunks * chunk_of(p.bits)), x.dtype)
        numbers = {"n": n, "width": whole.shape[1], "BN": DENSE_OUTPUTS, **constants}
        dense = launch("kernels.dequantized", weight, [whole], (chunks, -(-n // DENSE_OUTPUTS)), numbers)[0]
        return after(_matmul(_slotted(p, x), dense), p.bias, plus, around)
    blocks = {"BM": plan.rows, "BN": plan.outputs, "SPLIT": plan.split, "STAGES": plan.stages, "PRECISION": precision, "OVERLAP": False}
    if few:
        (gate, bend), width = around.gate or (0.0, 0.0), n if around.gate is None else n // 2
        numbers = {"m": m, "n": n, "k": k, "chunks": chunks, "stride": k, "ONE": m == 1, "WIDTH": 1 << (k - 1).bit_length()}
        numbers |= {"EPS": around.eps, "OFFSET": around.offset, "GATE": gate, "BEND": bend}
        inputs = {"x": x, "gather": p.gather, **weight, "norm": norm, "bias": p.bias, "plus": plus}
        y, programs = jax.ShapeDtypeStruct((m, width), x.dtype), -(-n // plan.outputs)
        return launch("kernels.few_rows", inputs, [y], (programs,), numbers | constants | blocks, warps=plan.warps)[0]
    held = x if p.gather is None else _slotted(p, x)
    numbers = {"m": m, "n": n, "k": held.shape[1], "chunks": chunks, "stride": held.shape[1]}
    parts = jax.ShapeDtypeStruct((plan.split, m, n), x.dtype if plan.split == 1 else jnp.float32)
    grid = -(-m // plan.rows), -(-n // plan.outputs), plan.split
    (y,) = launch("kernels.many_rows", {"x": held, **weight}, [parts], grid, numbers | constants | blocks, warps=plan.warps)
    # XLA adds the parts, and does the rest, in the program that uses them.
    return after(y.sum(0).astype(x.dtype), p.bias, plus, around)


@cache
def gpu() -> Gpu | None:
    """The GPU that plans are made for: JAX's first of NVIDIA, or None."""
    try:
        found: Any = jax.devices("cuda")[0]
    except RuntimeError:
        return None
    # XLA launches kernels one after the other, so none overlaps the one before.
    return Gpu(found.core_count, found.shared_memory_per_block_optin, tensor_float=float(found.compute_capability) >= 8, overlap=False)


def _slotted(p: Fragments, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, slots], 0 where there is no input."""
    width = len(p.words) * chunk_of(p.bits)
    return jnp.pad(x, ((0, 0), (0, width - p.k))) if p.gather is None else x.at[:, p.gather].get(mode="fill", fill_value=0)


def _dense(around: Around, p: Fragments, x: jax.Array, norm: jax.Array | None, plus: jax.Array | None) -> jax.Array:
    """x [m, k] -> [m, out], by a weight in x's dtype."""
    y = _matmul(_slotted(p, before(x, norm, around)), dequantize(p).astype(x.dtype))
    return after(y, p.bias, plus, around)


def _matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum("ms,os->mo", x, weight, precision=precision)


def dequantize(p: Fragments) -> jax.Array:
    """The weight [out, slots] in float32; 0 in slots without an input."""
    order = np.asarray(FROM_TRITON)
    high = None if p.high is None else p.high[..., order].astype(jnp.int32)
    codes = unpack_words(p.words[..., order], high, p.bits, jnp.stack)
    levels = codes.reshape(len(codes), -1, p.group) - (2 ** (p.bits - 1) if p.zeros is None else p.zeros.T.astype(jnp.int32)[..., None])
    return (levels.astype(jnp.float32) * p.scales.T.astype(jnp.float32)[..., None]).reshape(len(codes), -1)
