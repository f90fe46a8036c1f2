"""Texts continued: the prompts once through the model, then a token at a time with a cache of keys and values."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptq_fn._quantized import QuantizedLinear
from gptq_fn.model.attention import Cache, resized
from gptq_fn.model.decoder import Params, embed, learned_positions, run_block, run_embed, unembed
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
    progress: Callable[[int, int], None] | None = None,
) -> Int[Array, "batch time_plus_n"]:
    """`tokens` continued by `n` more, in int32: the likeliest ones, or drawn at `temperature` with the PRNG key `key`.

    Drawn tokens are of the `top_k` likeliest, and of these in the nucleus of `top_p`. Prompts of several lengths are
    padded on the left: `keep` is False for padding, which nothing attends to and no position counts. Behind one of the
    `end` tokens comes `pad`, by default the first of `end`; when every text has ended, generating stops.

    Each distinct block is one program for prompts and one for a step, so compiling costs the same at any depth, and one
    block's weights at a time are dequantized. On GPUs, where starting programs takes as long as a block does, several whole
    steps are one program; it compiles in proportion to the depth. A model of QuantizedLinears stays cut into blocks
    there, too, since XLA would hold the dequantized weights of all of them at once: `gptq_fn.kernels.pack` it. Nothing
    waits for the device but looks at whether texts have ended, and `progress`, which is called every few steps with the new
    tokens that each text has and `n`. Raises ValueError where options contradict each other or what is known of the model.
    """
    require_sound(temperature=temperature, top_k=top_k, top_p=top_p, key=key)
    if n < 0:
        raise ValueError(f"n is {n}; it is how many tokens are generated.")
    prompts, lengths = _left_aligned(tokens, keep)
    tokens = jnp.asarray(tokens, jnp.int32)  # a narrower type that holds the prompts need not hold what follows
    _require_known(spec, params["top"], prompts, n)
    if n == 0:
        return tokens
    ends = jnp.atleast_1d(jnp.asarray(end, jnp.int32))
    how = _How(lengths, ends, key if temperature else None, jnp.float32(temperature), None if top_p is None else jnp.float32(top_p))
    x, caches = _read(spec, params, prompts, lengths, room=-(-(prompts.shape[1] + n) // _ROOM) * _ROOM)
    filler = pad if pad is not None else int(ends[0]) if len(ends) else 0
    text = _Text(jnp.full((len(tokens), n), filler, jnp.int32), jnp.zeros(len(tokens), bool), jnp.asarray(0, jnp.int32))
    x, text = _draw(replace(spec, blocks=()), params["top"], x, text, how, top_k)
    state = _State(x, text, caches)
    steps = _together if _start_takes_longer(params) else _one_by_one
    for done in range(1, n, _LOOK):
        if len(ends) and bool(state.text.ended.all()):
            break
        state = steps(spec, params, state, how, top_k, min(_LOOK, n - done))
        if progress:
            progress(min(int(state.text.written), n), n)
    return jnp.concatenate([tokens, state.text.tokens], axis=1)


class _Text(NamedTuple):
    """What was generated: buffers of n tokens, of which `written` are there, and which texts have ended."""

    tokens: Int[Array, "batch n"]
    ended: Bool[Array, " batch"]
    written: Int[Array, ""]


class _How(NamedTuple):
    """What tokens are drawn by; see `generate`."""

    lengths: Int[Array, " batch"]
    ends: Int[Array, " ends"]
    key: Array | None
    temperature: Array
    top_p: Array | None


class _State(NamedTuple):
    """Between two steps: what enters the first block, the text, and the caches of the blocks."""

    x: Float[Array, "batch 1 width"]
    text: _Text
    caches: list[Cache]


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


def _start_takes_longer(params: Params) -> bool:
    """Whether starting a program takes longer than a block's step, and XLA would not make copies of weights to join blocks."""
    leaves = jax.tree.leaves(params["blocks"], is_leaf=lambda leaf: isinstance(leaf, QuantizedLinear))
    arrays = [leaf for leaf in leaves if isinstance(leaf, Array)]
    return len(arrays) == len(leaves) and all(device.platform != "cpu" for a in arrays for device in a.devices())


def _one_by_one(spec: ModelSpec, params: Params, state: _State, how: _How, top_k: int | None, count: int) -> _State:
    """`count` steps, each a program a block and one to draw."""
    for _ in range(count):
        state = _step(spec, params, state, how, top_k)
    return state


@partial(jax.jit, static_argnames=("spec", "top_k", "count"), donate_argnames="state")
def _whole_steps(spec: ModelSpec, params: Params, state: _State, how: _How, top_k: int | None, count: int) -> _State:
    """`count` steps. They pass on one count of tokens for the caches of all blocks, so that XLA computes what depends on it once."""

    def counted(x: Array, text: _Text, held: list[tuple[Array, Array]], used: Array) -> _State:
        return _State(x, text, [Cache(k, v, used) for k, v in held])

    def step(
        _: Array, carried: tuple[Array, _Text, list[tuple[Array, Array]], Array]
    ) -> tuple[Array, _Text, list[tuple[Array, Array]], Array]:
        x, text, caches = _step(spec, params, counted(*carried), how, top_k)
        return x, text, [(k, v) for k, v, _ in caches], caches[0].used

    carried = state.x, state.text, [(k, v) for k, v, _ in state.caches], state.caches[0].used
    return counted(*jax.lax.fori_loop(0, count, step, carried))


def _together(spec: ModelSpec, params: Params, state: _State, how: _How, top_k: int | None, count: int) -> _State:
    """The same in one program, of `_LOOK` steps whatever the count: nothing is drawn behind the end of a text's buffer."""
    return _whole_steps(spec, params, state, how, top_k, _LOOK)


def _step(spec: ModelSpec, params: Params, state: _State, how: _How, top_k: int | None) -> _State:
    """The state after one more token."""
    x, caches = state.x, []
    for block_spec, p, cache in zip(spec.blocks, params["blocks"], state.caches, strict=True):
        x, after = run_block(block_spec, p, x, cache)
        caches.append(after)
    x, text = _draw(replace(spec, blocks=()), params["top"], x, state.text, how, top_k)
    return _State(x, text, caches)


@partial(jax.jit, static_argnames=("spec", "top_k"), donate_argnames="text")
def _draw(
    spec: ModelSpec, top: Mapping[str, Any], x: Float[Array, "batch 1 width"], text: _Text, how: _How, top_k: int | None
) -> tuple[Float[Array, "batch 1 width"], _Text]:
    """What enters the first block next, and the text with one more token a row. What is not drawn stays as it was filled."""
    key = None if how.key is None else jax.random.fold_in(how.key, text.written)
    logits = unembed(spec, top, x)[:, 0]
    chosen = choose(logits, key, temperature=how.temperature, top_k=top_k, top_p=how.top_p).astype(jnp.int32)
    chosen = jnp.where(text.ended, text.tokens[:, text.written], chosen)
    ended = text.ended | (chosen[:, None] == how.ends[None]).any(-1)
    after = _Text(text.tokens.at[:, text.written].set(chosen), ended, text.written + 1)
    return embed(spec, top, chosen[:, None], (how.lengths + text.written)[:, None]), after


def _left_aligned(tokens: Array, keep: Array | None) -> tuple[Int[Array, "batch longest"], Int[Array, " batch"]]:
    """The prompts with their padding behind, where causal attention does not see it, and their lengths."""
    ids = np.asarray(tokens)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"Prompts are whole numbers [batch, time]; got {ids.dtype} {list(ids.shape)}.")
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
    if longest > (learned := learned_positions(spec, top)):
        raise ValueError(f"{longest} tokens have to be read for {n} new ones, but the model has learned {learned} positions.")
