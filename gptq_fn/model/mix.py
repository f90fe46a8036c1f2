"""The heart of attention: values averaged with softmax weights."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_QUERIES = 128
"""Query positions that are worth a matrix product of their own."""

_FLASH_DIM = 128
"""The widest heads for which cuDNN has a fused kernel on every GPU that it serves."""


def mix(
    q: Float[Array, "batch time heads dim"],
    k: Float[Array, "batch kv_heads length dim"],
    v: Float[Array, "batch kv_heads length value_dim"],
    positions: Int[Array, "#batch time"],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    bias: Float[Array, "heads length"] | None = None,
    sinks: Float[Array, " heads"] | None = None,
    causal: bool = False,
) -> Float[Array, "batch time heads_times_value_dim"]:
    """The values, averaged for each query head with softmax weights over the tokens that are visible to it.

    Keys are at positions 0, 1, ...; a query sees those up to its own, the last `window` of them. Where `causal`, query t
    is at position t and tokens after it need not be looked at. NVIDIA's GPUs run this as cuDNN's fused kernel where it
    computes the same: half precision, and nothing added to the scores.
    """
    plain = partial(_by_heads, scale=scale, window=window, softcap=softcap, bias=bias, sinks=sinks, causal=causal)
    added = softcap is not None or bias is not None or sinks is not None
    fits = q.dtype.itemsize == 2 and q.shape[-1] == v.shape[-1] <= _FLASH_DIM and q.shape[-1] % 8 == 0
    if not causal or added or not fits or not _cuda():
        return plain(q, k, v, positions)
    return jax.lax.platform_dependent(q, k, v, positions, cuda=partial(_flash, scale=scale, window=window), default=plain)


@cache
def _cuda() -> bool:
    """Whether there is an NVIDIA GPU; on others cuDNN's kernel cannot even be traced."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def _flash(q: Array, k: Array, v: Array, positions: Array, *, scale: float, window: int | None) -> Array:
    """`mix` by cuDNN."""
    visible = None if window is None else (window - 1, 0)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    mixed = jax.nn.dot_product_attention(q, k, v, scale=scale, is_causal=True, local_window_size=visible, implementation="cudnn")
    return mixed.reshape(*q.shape[:2], -1)


def _by_heads(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
    bias: Array | None,
    sinks: Array | None,
    causal: bool,
) -> Array:
    """`mix` one key-value head of one sample at a time: its scores fit a cache, and all at once would be most of the memory."""
    batch, time, heads, dim = q.shape
    kv_heads, length, value_dim = v.shape[1:]
    share = heads // kv_heads
    precision = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    biases = jnp.zeros((heads, 1), jnp.float32) if bias is None else bias
    rest = jnp.full(heads, -jnp.inf, jnp.float32) if sinks is None else sinks.astype(jnp.float32)

    def rows(q: Array, k: Array, v: Array, bias: Array, rest: Array, here: Array) -> Array:
        """The mixed values of some query positions of all query heads that share these keys and values."""
        scores = jnp.matmul(q.reshape(-1, dim), k.T, precision=precision, preferred_element_type=jnp.float32) * scale
        scores = scores.reshape(share, len(here), len(k))
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        distance = here[:, None] - jnp.arange(len(k), dtype=here.dtype)[None]
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        scores = jnp.where(visible[None], scores + bias[:, None], -jnp.inf)
        largest = jnp.maximum(scores.max(-1, keepdims=True), rest[:, None, None])
        weights = jnp.exp(scores - largest)
        total = weights.sum(-1, keepdims=True) + jnp.exp(rest[:, None, None] - largest)
        mixed = jnp.matmul(weights.reshape(-1, len(k)).astype(v.dtype), v, precision=precision, preferred_element_type=jnp.float32)
        return (mixed.reshape(*q.shape[:-1], value_dim) / total).astype(v.dtype)

    def one(head: tuple[Array, Array, Array, Array, Array, Array]) -> Array:
        q, k, v, bias, rest, here = head
        parts = []
        for start in range(0, time, step := max(_QUERIES, -(-time // 4))):
            stop = min(start + step, time)
            seen = stop if causal else length
            parts.append(rows(q[:, start:stop], k[:seen], v[:seen], bias[:, :seen], rest, here[start:stop]))
        return jnp.concatenate(parts, axis=1)

    def by_head(a: Array) -> Array:
        """Something of each head, of every sample."""
        shared = a.reshape(1, kv_heads, share, *a.shape[1:])
        return jnp.broadcast_to(shared, (batch, *shared.shape[1:])).reshape(-1, *shared.shape[2:])

    q = q.reshape(batch, time, kv_heads, share, dim).transpose(0, 2, 3, 1, 4).reshape(-1, share, time, dim)
    k, v = (a.reshape(-1, length, a.shape[-1]) for a in (k, v))
    here = jnp.repeat(jnp.broadcast_to(positions, (batch, time)), kv_heads, axis=0)
    heads_of = q, k, v, by_head(biases), by_head(rest), here
    mixed = jax.vmap(one)(heads_of) if time == 1 else jax.lax.map(one, heads_of)  # the scores of one query are few
    mixed = mixed.reshape(batch, kv_heads, share, time, value_dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(batch, time, heads * value_dim)
