"""Layer norm and RMS norm."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn.spec import NormSpec


def norm(spec: NormSpec, p: Mapping[str, Array] | None, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """x normalized over its last axis, computed in float32 and returned in x's dtype; x itself where `p` is None.

    Weights and biases are [width], or [heads, width] where each head has its own; norms without a weight have none.
    """
    if p is None:
        return x
    y = x.astype(jnp.float32)
    if spec.kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + spec.eps)
    if "weight" in p:
        y = y * (_like(p["weight"], y) + spec.offset)
    if "bias" in p:
        y = y + _like(p["bias"], y)
    return y.astype(x.dtype)


def _like(features: Array, y: Array) -> Array:
    return features.astype(jnp.float32).reshape((1,) * (y.ndim - features.ndim) + features.shape)
