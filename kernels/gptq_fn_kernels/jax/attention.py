"""One token's attention over a cache inside JAX programs on NVIDIA's GPUs: one launch of a Triton kernel."""

from typing import Any

import jax
import jax.numpy as jnp

from gptq_fn_kernels.jax.fragments import gpu
from gptq_fn_kernels.jax.launch import launch

TILE, WARPS, STAGES = 2**13, 8, 3
"""Bytes of keys, and of values, that a program copies ahead at a time, its warps, and how many such tiles there are at most. An H100
took 8.8 us for 300 tokens of 32 heads of 128 features, 5.9 for 100; of 38 choices none took less for both."""

SHARED = 2**16
"""Bytes of shared memory that a program of any GPU since Turing can have."""

NO_WINDOW = 2**30
"""Tokens that a window is never wider than."""

TOKENS = 1024
"""Tokens that one program reads. More are read by several, whose results XLA joins: another program or two. By count; a
multiprocessor reads some 100 GB/s, 1024 tokens of 128 features in 5 us, of which joining takes 2."""


def attend(
    qkv: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    used: jax.Array,
    turns: tuple[jax.Array, jax.Array] | None,
    *,
    heads: int,
    scale: float,
    interleaved: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    bias: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values mixed for each query [batch, heads * dim], and the keys and values with the current token's put in.

    qkv [batch, heads + 2 kv_heads, dim] are queries, keys and values of one token of each sample, behind `used` [batch] of
    keys and values [batch, kv_heads, length, dim]. Queries and keys are rotated by the cosines and sines [batch, pairs] of
    `turns`. bias [heads, length] and sinks [heads] as in softmax(softcap * tanh(q k^T scale / softcap) + bias, sinks).
    """
    batch, kv_heads, length, dim = keys.shape
    cos, sin = turns or (None, None)
    inputs: dict[str, jax.Array | None] = {"qkv": qkv, "keys": keys, "values": values, "used": used, "cos": cos, "sin": sin}
    numbers = constants_of(
        (heads, kv_heads, length, dim),
        0 if cos is None else cos.shape[-1],
        interleaved,
        scale=scale,
        softcap=softcap,
        window=window,
        itemsize=keys.dtype.itemsize,
        shared=SHARED if (found := gpu()) is None else found.shared,
    )
    parts = numbers["PARTS"]
    outs = [
        jax.ShapeDtypeStruct((parts, batch, heads, dim), qkv.dtype if parts == 1 else jnp.float32),
        jax.ShapeDtypeStruct((parts, batch, heads), jnp.float32),
        *(jax.ShapeDtypeStruct(held.shape, held.dtype) for held in (keys, values)),
    ]
    mixed, logs, keys, values = launch(
        "attention.attend",
        {**inputs, "bias": bias, "sinks": sinks},
        outs,
        (heads, batch, parts),
        numbers,
        warps=WARPS,
        inside={"keys": 2, "values": 3},
    )
    whole = mixed[0] if parts == 1 else (mixed * jax.nn.softmax(logs, 0)[..., None]).sum(0).astype(qkv.dtype)
    return whole.reshape(batch, heads * dim), keys, values


def constants_of(
    sizes: tuple[int, int, int, int],
    pairs: int,
    interleaved: bool,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    itemsize: int,
    shared: int,
) -> dict[str, Any]:
    """The kernel's numbers for these heads, heads of keys, tokens that a cache has room for, and features of a head, `itemsize`
    bytes each, on a GPU where a program can have so many bytes of shared memory."""
    heads, kv_heads, length, dim = sizes
    wide = 1 << (dim - 1).bit_length()
    return {
        **{"heads": heads, "kv_heads": kv_heads, "length": length, "scale": scale, "softcap": softcap, "window": window or NO_WINDOW},
        **{"TURN": pairs, "INTERLEAVED": interleaved, "DIM": dim, "WIDE": wide, "PARTS": -(-length // TOKENS)},
        **{"BLOCK": max(TILE // (wide * itemsize), 16), "STAGES": max(min(STAGES, shared // (2 * TILE)), 1)},
    }
