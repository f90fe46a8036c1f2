"""Whole models: tokens in, logits out."""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptq_fn.model.attention import Cache
from gptq_fn.model.block import BlockParams, block
from gptq_fn.model.linear import linear
from gptq_fn.model.norm import norm
from gptq_fn.model.position import sinusoids
from gptq_fn.spec import BlockSpec, ModelSpec

Params = Mapping[str, Any]
"""{"top": {role: {"weight", "bias"}}, "blocks": [BlockParams, ...]}."""


def embed(
    spec: ModelSpec, top: Mapping[str, Any], tokens: Int[Array, "batch time"], positions: Int[Array, "#batch time"] | None = None
) -> Float[Array, "batch time width"]:
    """What enters the first block; `positions` of the tokens count from 0 where they are not given."""
    x = jnp.take(top["embed"]["weight"], tokens, axis=0) * spec.embed_scale
    if "project_in" in top:
        x = linear(top["project_in"], x)
    if positions is None:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = positions + spec.position_offset
    if spec.sinusoids:
        x = x + sinusoids(x.shape[-1], positions).astype(x.dtype)
    if "positions" in top:
        x = x + jnp.take(top["positions"]["weight"], positions, axis=0)
    return norm(spec.norm, top.get("embed_norm"), x)


def learned_positions(spec: ModelSpec, top: Mapping[str, Any]) -> int | float:
    """The tokens that a text may have: the positions that were learned, or without limit where they are computed."""
    return len(top["positions"]["weight"]) - spec.position_offset if "positions" in top else math.inf


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
    shell = replace(spec, blocks=())
    x = run_embed(shell, params["top"], tokens)
    for block_spec, p in zip(spec.blocks, params["blocks"], strict=True):
        x, _ = run_block(block_spec, p, x)
    return _unembed(shell, params["top"], x)


# Blocks are compiled one by one, so that a model costs one compilation for each distinct block, whatever its depth.
run_embed = jax.jit(embed, static_argnames="spec")
_unembed = jax.jit(unembed, static_argnames="spec")


@partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def run_block(spec: BlockSpec, p: BlockParams, x: Array, cache: Cache | None = None) -> tuple[Array, Cache]:
    """The block's output, and the cache with these tokens appended, in the memory of the one given."""
    x, _, cache = block(spec, p, x, cache)
    return x, cache
