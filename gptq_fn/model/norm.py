"""Layer norm and RMS norm."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn.spec import NormSpec


def norm(spec: NormSpec, p: Mapping[str, Array] | None, x: Float[Array, "*rows width"]) -> Float[Array, "*rows width"]:
    """x normalized over its last axis, computed in float32 and returned in x's dtype; x itself where `p` is None."""
    if p is None:
        return x
    y = x.astype(jnp.float32)
    if spec.kind == "layer":
        y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + spec.eps)
    features = (1,) * (x.ndim - 1) + (-1,)
    y = y * (p["weight"].astype(jnp.float32) + spec.offset).reshape(features)
    if "bias" in p:
        y = y + p["bias"].astype(jnp.float32).reshape(features)
    return y.astype(x.dtype)
