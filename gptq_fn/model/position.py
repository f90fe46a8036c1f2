"""Rotary positions (Su et al. 2021, arXiv 2104.09864)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptq_fn.spec import RopeScaling, RopeSpec


def rotate(rope: RopeSpec, x: Float[Array, "batch time heads dim"], positions: Int[Array, " time"]) -> Float[Array, "batch time heads dim"]:
    """The heads with their first `rope.dim` features rotated by angles that grow with `positions`."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(frequencies(rope), jnp.float32)[None]
    cos, sin = (f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    turning, still = x[..., : rope.dim], x[..., rope.dim :]
    a, b = (turning[..., ::2], turning[..., 1::2]) if rope.interleaved else jnp.split(turning, 2, -1)
    turned = a * cos - b * sin, b * cos + a * sin
    turning = jnp.stack(turned, -1).reshape(turning.shape) if rope.interleaved else jnp.concatenate(turned, -1)
    return jnp.concatenate([turning, still], -1)


def frequencies(rope: RopeSpec) -> Float[np.ndarray, " half"]:
    """The angle per token of each rotated pair, in radians, fastest first."""
    plain = rope.theta ** (-np.arange(0, rope.dim, 2) / rope.dim)
    return plain if rope.scaling is None else _SCALED[rope.scaling.kind](rope.scaling, plain)


def _linear(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    return plain / scaling.factor


def _llama3(scaling: RopeScaling, plain: np.ndarray) -> np.ndarray:
    turns = scaling.original_length * plain / (2 * np.pi)  # full turns over the context of pretraining
    keep = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
    return keep * plain + (1 - keep) * plain / scaling.factor


_SCALED = {"linear": _linear, "llama3": _llama3}
