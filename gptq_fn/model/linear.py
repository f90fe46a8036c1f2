"""A linear layer whose weight may be quantized."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn._quantized import QuantizedLinear, dequantize

Linear = Mapping[str, Any] | QuantizedLinear
"""`{"weight": [out, in], "bias": [out]}`, the bias optional, or a QuantizedLinear."""


def linear(p: Linear, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
    """x W^T + b, in x's dtype; float32 is multiplied in full precision."""
    weight, bias = (dequantize(p), p.bias) if isinstance(p, QuantizedLinear) else (p["weight"], p.get("bias"))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), precision=precision)
    return y if bias is None else y + _along_last(bias.astype(x.dtype), y)


def _along_last(feature: Float[Array, " out"], like: Array) -> Array:
    return feature.reshape((1,) * (like.ndim - 1) + (-1,))
