"""Packed weights as the Triton kernels multiply them, and as XLA does where there is no GPU."""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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

    def multiply(self, x: jax.Array) -> jax.Array:
        """x [..., k] -> x W^T [..., out] in x's dtype, without the bias."""
        return _product(self, x.reshape(-1, self.k)).reshape(*x.shape[:-1], -1)


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


@jax.custom_vjp
def _product(p: Fragments, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out]."""
    return jax.lax.platform_dependent(p, x, cuda=_by_kernel, default=_dense)


def _forward(p: Fragments, x: jax.Array) -> tuple[jax.Array, tuple[Fragments, jax.Array]]:
    return _product(p, x), (p, x)


def _backward(held: tuple[Fragments, jax.Array], slope: jax.Array) -> tuple[Fragments, jax.Array]:
    """The gradients of the dense product: a kernel has none."""
    return jax.vjp(_dense, *held)[1](slope)


_product.defvjp(_forward, _backward)


def _by_kernel(p: Fragments, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out], by the kernels that `gptq_fn_kernels.triton.plan` names for a GPU."""
    (m, k), (chunks, n, _) = x.shape, p.words.shape
    here, weight = gpu(), {"words": p.words, "high": p.high, "zeros": p.zeros, "scales": p.scales}
    if here is None:  # this branch is traced, too, where the program will run elsewhere
        return _dense(p, x)
    constants = constants_of(p.bits, p.group, x.dtype == jnp.bfloat16)
    plan = plan_of(m, n, k, bits=p.bits, itemsize=x.dtype.itemsize, gpu=here)
    if plan is None:
        whole = jax.ShapeDtypeStruct((n, chunks * chunk_of(p.bits)), x.dtype)
        numbers = {"n": n, "width": whole.shape[1], "BN": DENSE_OUTPUTS, **constants}
        return _matmul(_slotted(p, x), launch("kernels.dequantized", weight, [whole], (chunks, -(-n // DENSE_OUTPUTS)), numbers)[0])
    precision = "tf32x3" if x.dtype == jnp.float32 and here.tensor_float else "ieee"
    blocks = {"BM": plan.rows, "BN": plan.outputs, "SPLIT": plan.split, "STAGES": plan.stages, "PRECISION": precision, "OVERLAP": False}
    if plan.kernel == "few_rows":
        numbers = {"m": m, "n": n, "k": k, "chunks": chunks, "stride": k}
        inputs, y = {"x": x, "gather": p.gather, **weight}, jax.ShapeDtypeStruct((m, n), x.dtype)
        return launch("kernels.few_rows", inputs, [y], (-(-n // plan.outputs),), numbers | constants | blocks, warps=plan.warps)[0]
    held = x if p.gather is None else _slotted(p, x)
    numbers = {"m": m, "n": n, "k": held.shape[1], "chunks": chunks, "stride": held.shape[1]}
    parts = jax.ShapeDtypeStruct((plan.split, m, n), x.dtype if plan.split == 1 else jnp.float32)
    grid = -(-m // plan.rows), -(-n // plan.outputs), plan.split
    (y,) = launch("kernels.many_rows", {"x": held, **weight}, [parts], grid, numbers | constants | blocks, warps=plan.warps)
    return y.sum(0).astype(x.dtype)  # XLA adds the parts in the program that uses them


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


def _dense(p: Fragments, x: jax.Array) -> jax.Array:
    """x [m, k] -> [m, out], by a weight in x's dtype."""
    return _matmul(_slotted(p, x), dequantize(p).astype(x.dtype))


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
