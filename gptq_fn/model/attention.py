"""Causal self-attention for every layout of the query, key and value projections."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptq_fn.model.linear import linear
from gptq_fn.model.mix import mix
from gptq_fn.model.norm import norm
from gptq_fn.model.position import alibi, rotate
from gptq_fn.spec import AlibiSpec, AttentionSpec, LatentAttentionSpec, RopeSpec


class Cache(NamedTuple):
    """Keys and values of the tokens before the current ones, in buffers of a fixed length; `used` tokens are valid."""

    k: Float[Array, "batch length kv_heads dim"]
    v: Float[Array, "batch length kv_heads value_dim"]
    used: Int[Array, ""]


def empty_cache(spec: AttentionSpec | LatentAttentionSpec, batch: int, length: int, dtype: jnp.dtype) -> Cache:
    """A cache for `length` tokens that holds none."""
    latent = isinstance(spec, LatentAttentionSpec)
    heads, value_dim = (spec.heads, spec.value_dim) if latent else (spec.kv_heads, spec.head_dim)
    k, v = (jnp.zeros((batch, length, heads, dim), dtype) for dim in (spec.head_dim, value_dim))
    return Cache(k, v, jnp.zeros((), jnp.int32))


def attention(
    spec: AttentionSpec, p: Mapping[str, Any], x: Float[Array, "batch time width"], cache: Cache | None = None
) -> tuple[Float[Array, "batch time heads_times_dim"], Cache | None]:
    """What enters the output projection, and the cache with the current tokens appended."""
    q, k, v = _project(spec, p, x)
    positions = positions_of(x, cache)
    if spec.qk_norm is not None and not spec.qk_norm.after_rope:
        q, k = _normalized(spec, p, q, k)
    if spec.clip is not None:
        q, k, v = (jnp.clip(part, -spec.clip, spec.clip) for part in (q, k, v))
    if isinstance(spec.position, RopeSpec):
        q, k = rotate(spec.position, q, positions), rotate(spec.position, k, positions)
    if spec.qk_norm is not None and spec.qk_norm.after_rope:
        q, k = _normalized(spec, p, q, k)
    k, v, after = append(cache, k, v)
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    bias = alibi(spec.position, spec.heads, k.shape[1], scale) if isinstance(spec.position, AlibiSpec) else None
    options = {"scale": scale, "softcap": spec.softcap, "bias": bias, "sinks": p["sinks"] if spec.sinks else None}
    return mix(q, k, v, visible(spec.window, positions, k.shape[1]), causal=cache is None, **options), after


def positions_of(x: Float[Array, "batch time width"], cache: Cache | None) -> Int[Array, " time"]:
    """The positions of the current tokens."""
    start = jnp.zeros((), jnp.int32) if cache is None else cache.used
    return start + jnp.arange(x.shape[1], dtype=jnp.int32)


def append(cache: Cache | None, k: Array, v: Array) -> tuple[Array, Array, Cache | None]:
    """The keys and values of all tokens, and the cache that holds them."""
    if cache is None:
        return k, v, None
    time = k.shape[1]
    k = jax.lax.dynamic_update_slice_in_dim(cache.k, k.astype(cache.k.dtype), cache.used, axis=1)
    v = jax.lax.dynamic_update_slice_in_dim(cache.v, v.astype(cache.v.dtype), cache.used, axis=1)
    return k, v, Cache(k, v, cache.used + time)


def visible(window: int | None, positions: Int[Array, " time"], length: int) -> Bool[Array, "time length"]:
    """Which of `length` tokens each current token attends to."""
    here, there = positions[:, None], jnp.arange(length, dtype=jnp.int32)[None]
    causal = there <= here
    return causal if window is None else causal & (here - there < window)


def _project(spec: AttentionSpec, p: Mapping[str, Any], x: Array) -> tuple[Array, Array, Array]:
    """Queries [batch, time, heads, dim], keys and values [batch, time, kv_heads, dim]."""
    heads, kv_heads, dim, lead = spec.heads, spec.kv_heads, spec.head_dim, x.shape[:-1]
    if spec.qkv == "separate":
        parts = linear(p["q"], x), linear(p["k"], x), linear(p["v"], x)
    else:
        whole = linear(p["qkv"], x)
        if spec.qkv == "concat":
            parts = jnp.split(whole, [heads * dim, (heads + kv_heads) * dim], -1)
        elif spec.qkv == "grouped":
            grouped = whole.reshape(*lead, kv_heads, heads // kv_heads + 2, dim)
            parts = grouped[..., :-2, :], grouped[..., -2, :], grouped[..., -1, :]
        else:
            q, v, k = jnp.moveaxis(whole.reshape(*lead, 4, 3, heads // 4 * dim), -2, 0)
            parts = q, k, v
    q, k, v = parts
    return q.reshape(*lead, heads, dim), k.reshape(*lead, kv_heads, dim), v.reshape(*lead, kv_heads, dim)


def _normalized(spec: AttentionSpec, p: Mapping[str, Any], q: Array, k: Array) -> tuple[Array, Array]:
    assert spec.qk_norm is not None
    if spec.qk_norm.over == "head":
        return norm(spec.qk_norm.norm, p["q_norm"], q), norm(spec.qk_norm.norm, p["k_norm"], k)
    flat_q, flat_k = (a.reshape(*a.shape[:2], -1) for a in (q, k))
    q_norm, k_norm = norm(spec.qk_norm.norm, p["q_norm"], flat_q), norm(spec.qk_norm.norm, p["k_norm"], flat_k)
    return q_norm.reshape(q.shape), k_norm.reshape(k.shape)
