"""A linear layer whose weight may be quantized."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn._quantized import QuantizedLinear, dequantize


@runtime_checkable
class Product(Protocol):
    """A linear in a form of its own, a pytree: packed weights, whose kernels the core does not know."""

    @property
    def bias(self) -> Array | None:
        """[out], or None."""
        ...

    def multiply(self, x: Array) -> Array:
        """x [..., in] -> x W^T [..., out] in x's dtype, without the bias."""
        ...


Linear = Mapping[str, Any] | QuantizedLinear | Product
"""`{"weight": [out, in], "bias": [out]}`, the bias optional, a QuantizedLinear, or a Product."""


@partial(jax.tree_util.register_dataclass, data_fields=["whole"], meta_fields=["widths"])
@dataclass(frozen=True)
class Joined:
    """Linears that read one input as one linear, whose outputs follow each other; `widths` are the numbers of them."""

    whole: Linear
    widths: tuple[int, ...]


def linear(p: Linear, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
    """x W^T + b, in x's dtype; float32 is multiplied in full precision."""
    if isinstance(p, QuantizedLinear | Mapping):
        weight, bias = (dequantize(p), p.bias) if isinstance(p, QuantizedLinear) else (p["weight"], p.get("bias"))
        precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
        y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), precision=precision)
    else:
        y, bias = p.multiply(x), p.bias
    return y if bias is None else y + _along_last(bias.astype(x.dtype), y)


def linears(p: Mapping[str, Any], roles: Sequence[str], x: Float[Array, "*rows in"]) -> list[Array]:
    """What the linears of these roles make of x, each [*rows, out]. They may be joined, under their names with "+" between."""
    joined = p.get("+".join(roles))
    if joined is None:
        return [linear(p[role], x) for role in roles]
    ends = [sum(joined.widths[: i + 1]) for i in range(len(roles) - 1)]
    return jnp.split(linear(joined.whole, x), ends, -1)


def _along_last(feature: Float[Array, " out"], like: Array) -> Array:
    return feature.reshape((1,) * (like.ndim - 1) + (-1,))
