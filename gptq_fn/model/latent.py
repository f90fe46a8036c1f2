"""Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434), cut where its latents enter linears."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn.model.attention import Cache, append, positions_of
from gptq_fn.model.linear import Input, linear, normed
from gptq_fn.model.mix import mix
from gptq_fn.model.position import rotate
from gptq_fn.spec import LatentAttentionSpec


def compress(spec: LatentAttentionSpec, p: Mapping[str, Any], x: Input) -> tuple[dict[str, Input], dict[str, Array]]:
    """The latents, by the tap that they are, and what else is needed: the rotary key, and queries that have no latent."""
    latent, key = jnp.split(linear(p["kv_a"], x), [spec.kv_rank], -1)
    taps, held = {"kv_latent": normed(spec.norm, p, "kv_latent", latent)}, {"rotary_key": key}
    if spec.q_rank is None:
        return taps, {**held, "q": linear(p["q"], x)}
    return {"q_latent": normed(spec.norm, p, "q_latent", linear(p["q_a"], x)), **taps}, held


def attend(
    spec: LatentAttentionSpec, p: Mapping[str, Any], taps: Mapping[str, Input], held: Mapping[str, Array], cache: Cache | None = None
) -> tuple[Float[Array, "batch time heads_times_value_dim"], Cache]:
    """What enters the output projection, and the cache with the current tokens appended."""
    latent = taps["kv_latent"]
    lead = latent.shape[:2]
    positions = positions_of(latent, cache)
    q = held["q"] if spec.q_rank is None else linear(p["q_b"], taps["q_latent"])
    q = q.reshape(*lead, spec.heads, spec.head_dim)
    q = jnp.concatenate([q[..., : spec.plain], rotate(spec.position, q[..., spec.plain :], positions)], -1)
    k, v = jnp.split(linear(p["kv_b"], latent).reshape(*lead, spec.heads, -1), [spec.plain], -1)
    rotary = rotate(spec.position, held["rotary_key"][:, :, None], positions)
    k = jnp.concatenate([k, jnp.broadcast_to(rotary, (*lead, spec.heads, rotary.shape[-1]))], -1)
    after = append(cache, k, v)
    return mix(q, after.k, after.v, positions, scale=spec.scale, causal=cache is None), after
