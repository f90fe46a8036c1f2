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
    time = x.shape[1]
    q, k, v = _project(spec, p, x)
    start = jnp.zeros((), jnp.int32) if cache is None else cache.used
    positions = start + jnp.arange(time, dtype=jnp.int32)
    if spec.position is not None:
        q, k = rotate(spec.position, q, positions), rotate(spec.position, k, positions)
    if cache is not None:
        k = jax.lax.dynamic_update_slice_in_dim(cache.k, k, start, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(cache.v, v, start, axis=1)
        cache = Cache(k, v, start + time)
    return _mix(spec, q, k, v, _visible(spec, positions, k.shape[1])), cache


_QUERIES = 128
"""Query positions that are worth a matrix product of their own."""


def _mix(spec: AttentionSpec, q: Array, k: Array, v: Array, visible: Array) -> Float[Array, "batch time heads_times_dim"]:
    """The values, averaged for each query head with softmax weights over the tokens that are visible to it.

    One key-value head of one sample at a time: its scores fit a cache, and all scores at once would be most of the memory.
    """
    batch, time, heads, dim = q.shape
    share, length = heads // spec.kv_heads, k.shape[1]
    scale = dim**-0.5 if spec.scale is None else spec.scale
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None

    def rows(q: Array, k: Array, v: Array, visible: Array) -> Array:
        """The mixed values of some query positions of all query heads that share these keys and values."""
        scores = jnp.matmul(q.reshape(-1, dim), k.T, precision=precision, preferred_element_type=jnp.float32) * scale
        scores = jnp.where(visible[None], scores.reshape(share, *visible.shape), -math.inf)
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        mixed = jnp.matmul(weights.reshape(-1, len(k)).astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)
        return (mixed.reshape(q.shape) / weights.sum(-1, keepdims=True)).astype(v.dtype)

    def one(head: tuple[Array, Array, Array]) -> Array:
        q, k, v = head
        parts = []
        for start in range(0, time, step := max(_QUERIES, -(-time // 4))):
            stop = min(start + step, time)
            seen = stop if length == time else length  # without a cache, later tokens need not be looked at
            parts.append(rows(q[:, start:stop], k[:seen], v[:seen], visible[start:stop, :seen]))
        return jnp.concatenate(parts, axis=1)

    q = q.reshape(batch, time, spec.kv_heads, share, dim).transpose(0, 2, 3, 1, 4).reshape(-1, share, time, dim)
    k, v = (a.transpose(0, 2, 1, 3).reshape(-1, length, dim) for a in (k, v))
    mixed = jax.lax.map(one, (q, k, v)).reshape(batch, spec.kv_heads, share, time, dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * dim)


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
