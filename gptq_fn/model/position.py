"""Rotary positions (Su et al. 2021, arXiv 2104.09864), their scalings for long texts, ALiBi and sinusoids."""

import math
from functools import singledispatch

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptq_fn.spec import (
    AlibiSpec,
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ProportionalScaling,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)


def rotate(
    rope: RopeSpec, x: Float[Array, "batch time heads dim"], positions: Int[Array, "#batch time"]
) -> Float[Array, "batch time heads dim"]:
    """The heads with their first `rope.dim` features rotated by angles that grow with `positions`; see `turns_of`."""
    cos, sin = (turn[:, :, None, :].astype(x.dtype) for turn in turns_of(rope, positions))
    turning, still = x[..., : rope.dim], x[..., rope.dim :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if rope.interleaved else jnp.split(turning, 2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    turning = jnp.stack(turned, -1).reshape(turning.shape) if rope.interleaved else jnp.concatenate(turned, -1)
    return jnp.concatenate([turning, still], -1)


def turns_of(
    rope: RopeSpec, positions: Int[Array, "#batch time"]
) -> tuple[Float[Array, "#batch time half"], Float[Array, "#batch time half"]]:
    """What rotates each pair at these positions: the cosine and the sine of its angle, times the scaling's amplitude, in float32.

    Scalings that depend on the length of the text take that of the longest sample, as transformers does.
    """
    angles = positions.astype(jnp.float32)[..., None] * frequencies(rope, positions.max() + 1)[None, None]
    amplitude = rope.scaling.amplitude if isinstance(rope.scaling, YarnScaling | LongScaling) else 1.0
    cos, sin = jax.lax.platform_dependent(jnp.cos(angles), jnp.sin(angles), cpu=_once, default=lambda *turns: turns)
    return cos * amplitude, sin * amplitude


def _once(cos: Float[Array, "*rows half"], sin: Float[Array, "*rows half"]) -> tuple[Array, Array]:
    """The same, behind a product with ones: without it XLA computes them on CPUs anew for every head, which takes as long as the
    projection of the heads."""
    half = cos.shape[-1]
    both = jnp.matmul(jnp.concatenate([cos, sin], -1), jnp.eye(2 * half, dtype=cos.dtype), precision=jax.lax.Precision.HIGHEST)
    return both[..., :half], both[..., half:]


def frequencies(rope: RopeSpec, length: Int[Array, ""] | int = 1) -> Float[Array, " half"]:
    """The angle per token of each rotated pair, in radians; some scalings depend on the `length` of the text so far."""
    plain = rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)
    found = plain if rope.scaling is None else _scaled(rope.scaling, rope, plain, length)
    return jnp.asarray(found, jnp.float32)


@singledispatch
def _scaled(scaling: RopeScaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> np.ndarray | Array:
    raise TypeError(f"{scaling} is no scaling of rotary positions.")


@_scaled.register
def _(scaling: LinearScaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> np.ndarray:
    return plain / scaling.factor


@_scaled.register
def _(scaling: DynamicScaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> Array:
    longest = jnp.maximum(jnp.asarray(length), scaling.original_length).astype(jnp.float32)
    stretch = scaling.factor * longest / scaling.original_length - (scaling.factor - 1)
    # theta * stretch^(dim / (dim - 2)), raised to the power of each pair
    power = np.arange(0, rope.dim, 2) / (rope.dim - 2)
    return jnp.asarray(plain, jnp.float32) * stretch ** jnp.asarray(-power, jnp.float32)


@_scaled.register
def _(scaling: YarnScaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> np.ndarray:
    def pair_of(turns: float) -> float:
        return rope.dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_of(scaling.fast), pair_of(scaling.slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    ramp = np.clip((np.arange(rope.dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return plain * (1 - ramp) + plain / scaling.factor * ramp


@_scaled.register
def _(scaling: LongScaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> Array:
    short, long = (jnp.asarray(plain / np.asarray(divisors), jnp.float32) for divisors in (scaling.short, scaling.long))
    return jnp.where(jnp.asarray(length) > scaling.original_length, long, short)


@_scaled.register
def _(scaling: Llama3Scaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> np.ndarray:
    turns = scaling.original_length * plain / (2 * np.pi)  # full turns over the context of pretraining
    keep = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


@_scaled.register
def _(scaling: ProportionalScaling, rope: RopeSpec, plain: np.ndarray, length: Array | int) -> np.ndarray:
    return np.where(np.arange(rope.dim // 2) < int(scaling.part * rope.dim // 2), plain / scaling.factor, 0)


def alibi(spec: AlibiSpec, heads: int, length: int, scale: float) -> Float[Array, "heads length"]:
    """The bias of each key position on the scores of each head; only differences between positions matter to a softmax."""
    slopes = jnp.asarray(_slopes(spec, heads), jnp.float32)
    dtype = jnp.bfloat16 if spec.rounded else jnp.float32
    bias = (slopes.astype(dtype)[:, None] * jnp.arange(length).astype(dtype)[None]).astype(jnp.float32)
    return bias * scale if spec.scaled else bias


def _slopes(spec: AlibiSpec, heads: int) -> np.ndarray:
    def powers(n: int) -> np.ndarray:
        return 2.0 ** (-spec.steepest * np.arange(1, n + 1) / n)

    below = 2 ** math.floor(math.log2(heads))
    if below == heads:
        return powers(heads)
    finer = powers(2 * below)
    if spec.slopes == "mpt":
        return np.concatenate([finer[1::2], finer[::2]])[:heads]
    return np.concatenate([powers(below), finer[::2][: heads - below]])


def sinusoids(width: int, positions: Int[Array, "#batch time"]) -> Float[Array, "#batch time width"]:
    """Sines and cosines of angles that grow with `positions`, in halves as in tensor2tensor (cf. Vaswani et al. 2017, 3.5)."""
    rates = 10000.0 ** (-np.arange(width // 2) / (width // 2 - 1))
    angles = positions.astype(jnp.float32)[..., None] * jnp.asarray(rates, jnp.float32)[None, None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)
