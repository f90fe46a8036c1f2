"""Whole models: tokens in, logits or more tokens out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptq_fn.model.attention import Cache, empty_cache
from gptq_fn.model.block import BlockParams, block
from gptq_fn.model.linear import linear
from gptq_fn.model.norm import norm
from gptq_fn.model.position import sinusoids
from gptq_fn.spec import BlockSpec, ModelSpec

Params = Mapping[str, Any]
"""{"top": {role: {"weight", "bias"}}, "blocks": [BlockParams, ...]}."""


def embed(
    spec: ModelSpec, top: Mapping[str, Any], tokens: Int[Array, "batch time"], start: Array | int = 0
) -> Float[Array, "batch time width"]:
    """What enters the first block; `start` is the position of the first token."""
    x = jnp.take(top["embed"]["weight"], tokens, axis=0) * spec.embed_scale
    if "project_in" in top:
        x = linear(top["project_in"], x)
    positions = start + jnp.arange(tokens.shape[1], dtype=jnp.int32) + spec.position_offset
    if spec.sinusoids:
        x = x + sinusoids(x.shape[-1], positions)[None].astype(x.dtype)
    if "positions" in top:
        x = x + jnp.take(top["positions"]["weight"], positions, axis=0)[None]
    return norm(spec.norm, top.get("embed_norm"), x)


def head_input(spec: ModelSpec, top: Mapping[str, Any], x: Float[Array, "batch time width"]) -> Float[Array, "batch time features"]:
    """What enters the head, from the last block's output."""
    x = norm(spec.norm, top.get("final_norm"), x)
    return linear(top["project_out"], x) if "project_out" in top else x


def unembed(spec: ModelSpec, top: Mapping[str, Any], x: Float[Array, "batch time width"]) -> Float[Array, "batch time vocab"]:
    """Logits from the last block's output."""
    x = head_input(spec, top, x)
    logits = linear(top["embed"] if spec.tied else top["head"], x) * spec.logit_scale
    return logits if spec.logit_softcap is None else spec.logit_softcap * jnp.tanh(logits / spec.logit_softcap)


def forward(spec: ModelSpec, params: Params, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
    """Logits for each token; weights may be float or quantized, block by block and role by role."""
    return _forward(spec, params, tokens, [None] * len(spec.blocks), jnp.asarray(0, jnp.int32))[0]


def generate(
    spec: ModelSpec, params: Params, tokens: Int[Array, "batch time"], n: int, *, temperature: float = 0.0, key: Array | None = None
) -> Int[Array, "batch time_plus_n"]:
    """`tokens` continued by `n` more: the likeliest ones, or drawn at `temperature` with the PRNG key `key`.

    Prompts of one call have the same length. Raises ValueError where sampling is asked for without a key.
    """
    key = jax.random.key(0) if key is None and temperature == 0 else key
    if key is None:
        raise ValueError(f"Sampling at temperature {temperature} needs a PRNG key: pass key=jax.random.key(seed).")
    batch, time = tokens.shape
    dtype = params["top"]["embed"]["weight"].dtype
    caches: Sequence[Cache | None] = [empty_cache(b.attn, batch, time + n, dtype) for b in spec.blocks]
    fresh, start = tokens, 0
    for i in range(n):
        logits, caches = _forward(spec, params, fresh, caches, jnp.asarray(start, jnp.int32))
        last = logits[:, -1]
        chosen = jax.random.categorical(jax.random.fold_in(key, i), last / temperature) if temperature > 0 else last.argmax(-1)
        start += fresh.shape[1]
        fresh = chosen[:, None].astype(tokens.dtype)
        tokens = jnp.concatenate([tokens, fresh], 1)
    return tokens


# Blocks are compiled one by one, so that a model costs one compilation for each distinct block, whatever its depth.
_embed = jax.jit(embed, static_argnames="spec")
_unembed = jax.jit(unembed, static_argnames="spec")


@partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def _block(spec: BlockSpec, p: BlockParams, x: Array, cache: Cache | None) -> tuple[Array, Cache | None]:
    x, _, cache = block(spec, p, x, cache)
    return x, cache


def _forward(
    spec: ModelSpec, params: Params, tokens: Array, caches: Sequence[Cache | None], start: Array
) -> tuple[Array, Sequence[Cache | None]]:
    shell = replace(spec, blocks=())
    x = _embed(shell, params["top"], tokens, start)
    kept = []
    for block_spec, p, cache in zip(spec.blocks, params["blocks"], caches, strict=True):
        x, cache = _block(block_spec, p, x, cache)
        kept.append(cache)
    return _unembed(shell, params["top"], x), kept
