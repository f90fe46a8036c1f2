"""Causal self-attention for every layout of the query, key and value projections."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptq_fn.model.linear import Input, linear, linears
from gptq_fn.model.mix import mix
from gptq_fn.model.norm import norm
from gptq_fn.model.position import alibi, rotate
from gptq_fn.spec import AlibiSpec, AttentionSpec, RopeSpec


class Cache(NamedTuple):
    """Keys and values of the tokens before the current ones, in buffers of a fixed length; `used` of each sample are valid."""

    k: Float[Array, "batch kv_heads length dim"]
    v: Float[Array, "batch kv_heads length value_dim"]
    used: Int[Array, " batch"]


def resized(cache: Cache, length: int, used: Int[Array, " batch"]) -> Cache:
    """A cache for `length` tokens, more than this one's, of which `used` of each sample are valid."""
    k, v = (jnp.pad(a, ((0, 0), (0, 0), (0, length - a.shape[2]), (0, 0))) for a in (cache.k, cache.v))
    return Cache(k, v, used)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["q", "k", "v", "cache", "bias", "sinks"],
    meta_fields=["rope", "scale", "window", "softcap"],
)
@dataclass(frozen=True)
class Asked:
    """What the current tokens look for, and in what; see `mix`. Queries and keys are yet to be rotated where there is a `rope`."""

    q: Float[Array, "batch time heads dim"]
    k: Float[Array, "batch time kv_heads dim"]
    v: Float[Array, "batch time kv_heads dim"]
    cache: Cache | None
    bias: Float[Array, "heads length"] | None
    sinks: Float[Array, " heads"] | None
    rope: RopeSpec | None
    scale: float
    window: int | None
    softcap: float | None

    @property
    def positions(self) -> Int[Array, "#batch time"]:
        """The positions of the current tokens."""
        return positions_of(self.q, self.cache)


Attended = tuple[Float[Array, "batch time heads_times_dim"], Cache]
"""What enters the output projection, and the cache with the current tokens appended."""

Attend = Callable[[Asked, Callable[[Asked], Attended]], Attended]
"""One token's attention by a kernel, which the core does not know: the block's parameter "attend", called with what is
asked and the function that it stands for."""


def attention(spec: AttentionSpec, p: Mapping[str, Any], x: Input, cache: Cache | None = None) -> Attended:
    """What enters the output projection, and the cache with the current tokens appended."""
    q, k, v = _project(spec, p, x)
    rope = spec.position if isinstance(spec.position, RopeSpec) else None
    if spec.qk_norm is not None and not spec.qk_norm.after_rope:
        q, k = _normalized(spec, p, q, k)
    if spec.clip is not None:
        q, k, v = (jnp.clip(part, -spec.clip, spec.clip) for part in (q, k, v))
    if spec.qk_norm is not None and spec.qk_norm.after_rope:
        if rope is not None:
            positions = positions_of(x, cache)
            q, k, rope = rotate(rope, q, positions), rotate(rope, k, positions), None
        q, k = _normalized(spec, p, q, k)
    scale = spec.head_dim**-0.5 if spec.scale is None else spec.scale
    length = x.shape[1] if cache is None else cache.k.shape[2]
    bias = alibi(spec.position, spec.heads, length, scale) if isinstance(spec.position, AlibiSpec) else None
    asked = Asked(q, k, v, cache, bias, p["sinks"] if spec.sinks else None, rope, scale, spec.window, spec.softcap)
    kernel: Attend | None = p.get("attend") if cache is not None and x.shape[1] == 1 else None
    return _attended(asked) if kernel is None else kernel(asked, _attended)


def _attended(asked: Asked) -> Attended:
    """The same from the projections: rotated, appended and mixed."""
    q, k, positions = asked.q, asked.k, asked.positions
    if asked.rope is not None:
        q, k = rotate(asked.rope, q, positions), rotate(asked.rope, k, positions)
    after = append(asked.cache, k, asked.v)
    options = {"scale": asked.scale, "window": asked.window, "softcap": asked.softcap, "bias": asked.bias, "sinks": asked.sinks}
    return mix(q, after.k, after.v, positions, causal=asked.cache is None, **options), after


def positions_of(x: Input, cache: Cache | None) -> Int[Array, "#batch time"]:
    """The positions of the current tokens; x [batch, time, ...]."""
    start = jnp.zeros((1, 1), jnp.int32) if cache is None else cache.used[:, None]
    return start + jnp.arange(x.shape[1], dtype=jnp.int32)[None]


def append(cache: Cache | None, k: Float[Array, "batch time kv_heads dim"], v: Float[Array, "batch time kv_heads value_dim"]) -> Cache:
    """The cache with these keys and values of each sample behind those it holds; one that is just these without a cache."""
    batch, time = k.shape[:2]
    k, v = (a.transpose(0, 2, 1, 3) for a in (k, v))
    if cache is None:
        return Cache(k, v, jnp.full(batch, time, jnp.int32))
    put = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=1))
    k, v = (put(held, new.astype(held.dtype), cache.used) for held, new in ((cache.k, k), (cache.v, v)))
    return Cache(k, v, cache.used + time)


def _project(spec: AttentionSpec, p: Mapping[str, Any], x: Input) -> tuple[Array, Array, Array]:
    """Queries [batch, time, heads, dim], keys and values [batch, time, kv_heads, dim]."""
    heads, kv_heads, dim, lead = spec.heads, spec.kv_heads, spec.head_dim, x.shape[:-1]
    if spec.qkv == "separate":
        parts = linears(p, ("q", "k", "v"), x)
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
