"""Texts continued: the prompts once through the model, then a token at a time with a cache of keys and values."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptq_fn.model.attention import Cache, resized
from gptq_fn.model.decoder import Params, embed, run_block, run_embed, unembed
from gptq_fn.model.sampling import choose, require_sound
from gptq_fn.spec import ModelSpec

_ROOM = 64
"""Caches have room for a multiple of this many tokens, so that texts of about one length share their programs."""

_LOOK = 8
"""Steps between two looks at whether every text has ended, for which the host waits for the device."""


def generate(
    spec: ModelSpec,
    params: Params,
    tokens: Int[Array, "batch time"],
    n: int,
    *,
    keep: Bool[Array, "batch time"] | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    key: Array | None = None,
    end: int | Sequence[int] = (),
    pad: int | None = None,
) -> Int[Array, "batch time_plus_n"]:
    """`tokens` continued by `n` more: the likeliest ones, or drawn at `temperature` with the PRNG key `key`.

    Drawn tokens are of the `top_k` likeliest, and of these in the nucleus of `top_p`. Prompts of several lengths are
    padded on the left: `keep` is False for padding, which nothing attends to and no position counts. Behind one of the
    `end` tokens comes `pad`, by default the first of `end`; when every text has ended, generating stops.

    Each distinct block is one program for prompts and one for a step, so compiling costs the same at any depth, and one
    block's weights at a time are dequantized. A program of the whole step would compile in proportion to the depth, and
    XLA holds the dequantized weights of all blocks in it at once. Nothing but the looks waits for the device. Raises
    ValueError where options contradict each other or what is known of the model.
    """
    require_sound(temperature=temperature, top_k=top_k, top_p=top_p, key=key)
    prompts, lengths = _left_aligned(tokens, keep)
    _require_known(spec, params["top"], prompts, n)
    ends = np.atleast_1d(np.asarray(end, np.int32))
    draw = partial(_draw, replace(spec, blocks=()), params["top"], lengths=lengths, ends=ends, key=key if temperature else None)
    draw = partial(draw, temperature=np.float32(temperature), top_p=None if top_p is None else np.float32(top_p), top_k=top_k)
    x, caches = _read(spec, params, prompts, lengths, room=-(-(prompts.shape[1] + n) // _ROOM) * _ROOM)
    filler = pad if pad is not None else int(ends[0]) if len(ends) else 0
    text = _Text(jnp.full((len(tokens), n), filler, jnp.int32), jnp.zeros(len(tokens), bool), jnp.asarray(0, jnp.int32))
    for i in range(1, n + 1):
        x, text = draw(x, text)
        if i == n or (len(ends) and i % _LOOK == 0 and bool(text.ended.all())):
            break
        for j, (block_spec, p) in enumerate(zip(spec.blocks, params["blocks"], strict=True)):
            x, caches[j] = run_block(block_spec, p, x, caches[j])
    return jnp.concatenate([tokens, text.tokens.astype(tokens.dtype)], axis=1)


class _Text(NamedTuple):
    """What was generated: buffers of n tokens, of which `written` are there, and which texts have ended."""

    tokens: Int[Array, "batch n"]
    ended: Bool[Array, " batch"]
    written: Int[Array, ""]


def _read(
    spec: ModelSpec, params: Params, prompts: Int[Array, "batch time"], lengths: Int[Array, " batch"], *, room: int
) -> tuple[Float[Array, "batch 1 width"], list[Cache]]:
    """What leaves the last block at the end of each prompt, and the caches of the blocks."""
    x, caches = run_embed(replace(spec, blocks=()), params["top"], prompts), []
    for block_spec, p in zip(spec.blocks, params["blocks"], strict=True):
        x, cache = run_block(block_spec, p, x)
        caches.append(_resized(cache, room, lengths))
    return jnp.take_along_axis(x, lengths[:, None, None] - 1, axis=1), caches


_resized = jax.jit(resized, static_argnames="length")


@partial(jax.jit, static_argnames=("spec", "top_k"), donate_argnames="text")
def _draw(
    spec: ModelSpec,
    top: Mapping[str, Any],
    x: Float[Array, "batch 1 width"],
    text: _Text,
    *,
    lengths: Int[Array, " batch"],
    ends: Int[Array, " ends"],
    key: Array | None,
    temperature: Array,
    top_k: int | None,
    top_p: Array | None,
) -> tuple[Float[Array, "batch 1 width"], _Text]:
    """What enters the first block next, and the text with one more token a row. What is not drawn stays as it was filled."""
    key = None if key is None else jax.random.fold_in(key, text.written)
    chosen = choose(unembed(spec, top, x)[:, 0], key, temperature=temperature, top_k=top_k, top_p=top_p).astype(jnp.int32)
    chosen = jnp.where(text.ended, text.tokens[:, text.written], chosen)
    ended = text.ended | (chosen[:, None] == ends[None]).any(-1)
    after = _Text(text.tokens.at[:, text.written].set(chosen), ended, text.written + 1)
    return embed(spec, top, chosen[:, None], (lengths + text.written)[:, None]), after


def _left_aligned(tokens: Array, keep: Array | None) -> tuple[Int[Array, "batch longest"], Int[Array, " batch"]]:
    """The prompts with their padding behind, where causal attention does not see it, and their lengths."""
    ids = np.asarray(tokens)
    kept = np.ones(ids.shape, bool) if keep is None else np.asarray(keep)
    if kept.shape != ids.shape or not ids.size or not kept[:, -1].all() or (kept[:, :-1] & ~kept[:, 1:]).any():
        raise ValueError(
            f"The prompts are {list(ids.shape)} and keep is {list(kept.shape)}. keep has the shape of the prompts and each row of it is "
            "False for padding, then True for at least one token: pad on the left (padding_side='left' of a tokenizer)."
        )
    lengths = kept.sum(1)
    rows = [np.pad(row[len(row) - length :], (0, lengths.max() - length)) for row, length in zip(ids, lengths, strict=True)]
    return jnp.asarray(np.stack(rows), jnp.int32), jnp.asarray(lengths, jnp.int32)


def _require_known(spec: ModelSpec, top: Mapping[str, Any], prompts: Array, n: int) -> None:
    """Raise ValueError for tokens and positions that the model has no embedding for."""
    ids, vocabulary, longest = np.asarray(prompts), len(top["embed"]["weight"]), prompts.shape[1] + n - 1
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"Tokens reach from {ids.min()} to {ids.max()} but the model knows {vocabulary}: another tokenizer made them.")
    if "positions" in top and longest > (learned := len(top["positions"]["weight"]) - spec.position_offset):
        raise ValueError(f"{longest} tokens have to be read for {n} new ones, but the model has learned {learned} positions.")
