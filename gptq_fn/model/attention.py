"""Causal self-attention for every layout of the query, key and value projections."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptq_fn.model.linear import Linear, linear
from gptq_fn.model.position import rotate
from gptq_fn.spec import AttentionSpec


class Cache(NamedTuple):
    """Keys and values of the tokens before the current ones, in buffers of a fixed length; `used` tokens are valid."""

    k: Float[Array, "batch length kv_heads dim"]
    v: Float[Array, "batch length kv_heads dim"]
    used: Int[Array, ""]


def empty_cache(spec: AttentionSpec, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """A cache for `length` tokens that holds none."""
    shape = (batch, length, spec.kv_heads, spec.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((), jnp.int32))


def attention(
    spec: AttentionSpec, p: Mapping[str, Linear], x: Float[Array, "batch time width"], cache: Cache | None = None
) -> tuple[Float[Array, "batch time heads_times_dim"], Cache | None]:
    """What enters the output projection, and the cache with the current tokens appended."""
    batch, time, _ = x.shape
    q, k, v = _project(spec, p, x)
    start = jnp.zeros((), jnp.int32) if cache is None else cache.used
    positions = start + jnp.arange(time, dtype=jnp.int32)
    if spec.position is not None:
        q, k = rotate(spec.position, q, positions), rotate(spec.position, k, positions)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache.k, k, start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache.v, v, start, axis=1)
        cache = Cache(k, v, start + time)
    q = q.reshape(batch, time, spec.kv_heads, spec.heads // spec.kv_heads, spec.head_dim)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = scores * (spec.head_dim**-0.5 if spec.scale is None else spec.scale)
    weights = jax.nn.softmax(jnp.where(_visible(spec, positions, k.shape[1])[None, None, None], scores, -math.inf), axis=-1)
    mixed = jnp.einsum("bkgts,bskd->btkgd", weights.astype(x.dtype), v, precision=precision)
    return mixed.reshape(batch, time, spec.heads * spec.head_dim), cache


def _project(spec: AttentionSpec, p: Mapping[str, Linear], x: Array) -> tuple[Array, Array, Array]:
    """Queries [batch, time, heads, dim], keys and values [batch, time, kv_heads, dim]."""
    heads, kv_heads, dim = spec.heads, spec.kv_heads, spec.head_dim
    if spec.qkv == "separate":
        parts = linear(p["q"], x), linear(p["k"], x), linear(p["v"], x)
    elif spec.qkv == "concat":
        parts = jnp.split(linear(p["qkv"], x), [heads * dim, (heads + kv_heads) * dim], -1)
    else:
        grouped = linear(p["qkv"], x).reshape(*x.shape[:-1], kv_heads, heads // kv_heads + 2, dim)
        parts = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
    q, k, v = parts
    lead = x.shape[:-1]
    return q.reshape(*lead, heads, dim), k.reshape(*lead, kv_heads, dim), v.reshape(*lead, kv_heads, dim)


def _visible(spec: AttentionSpec, positions: Int[Array, " time"], length: int) -> Array:
    """Which of `length` tokens each current token attends to, [time, length]."""
    here, there = positions[:, None], jnp.arange(length, dtype=jnp.int32)[None]
    causal = there <= here
    return causal if spec.window is None else causal & (here - there < spec.window)
