"""A linear layer whose weight may be quantized, and what may be done on the way through it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn.model.norm import norm
from gptq_fn.spec import NormSpec


@runtime_checkable
class Product(Protocol):
    """A linear in a form of its own, a pytree: packed weights, whose kernels the core does not know."""

    def multiply(
        self,
        x: Array,
        *,
        norm: tuple[Array, float, float] | None = None,
        plus: Array | None = None,
        gate: tuple[float, float] | None = None,
    ) -> Array:
        """x [..., in] -> x W^T + b [..., out] in x's dtype.

        norm: weights [in], epsilon and offset of an RMS norm that x is to go through before. plus [..., out] is added, or else
        gate: a and b, by which the first half z of the outputs becomes z * sigmoid(a z + b z^3) times the other half.
        """
        ...


Linear = Mapping[str, Any] | QuantizedLinear | Product
"""`{"weight": [out, in], "bias": [out]}`, the bias optional, a QuantizedLinear, or a Product."""


@partial(jax.tree_util.register_dataclass, data_fields=["whole"], meta_fields=["widths"])
@dataclass(frozen=True)
class Joined:
    """Linears that read one input as one linear, whose outputs follow each other; `widths` are the numbers of them."""

    whole: Linear
    widths: tuple[int, ...]


@partial(jax.tree_util.register_dataclass, data_fields=["x", "p"], meta_fields=["spec"])
@dataclass(frozen=True)
class Unnormed:
    """What a norm makes of x, before it is made: a product can do that while it reads x."""

    x: Float[Array, "*rows in"]
    p: Mapping[str, Array]
    spec: NormSpec

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        return self.x.shape


Input = Array | Unnormed
"""What a linear reads."""


def normed(spec: NormSpec, p: Mapping[str, Any], role: str, x: Array) -> Input:
    """What the block's norm of this role makes of x; x itself where there is none. A block of products makes it where it reads it."""
    own, products = p.get(role), any(isinstance(leaf, Joined | Product) for leaf in p.values())
    return Unnormed(x, own, spec) if own is not None and products else norm(spec, own, x)


def value_of(x: Input) -> Array:
    """What is read, made if it is not yet."""
    return norm(x.spec, x.p, x.x) if isinstance(x, Unnormed) else x


def multiplied(p: Product, x: Input, plus: Array | None = None, gate: tuple[float, float] | None = None) -> Array:
    """`p.multiply` of what is read, where an RMS norm with a weight is left to the product."""
    if isinstance(x, Unnormed) and x.spec.kind == "rms" and set(x.p) == {"weight"}:
        return p.multiply(x.x, norm=(x.p["weight"], x.spec.eps, x.spec.offset), plus=plus, gate=gate)
    return p.multiply(value_of(x), plus=plus, gate=gate)


def linear(p: Linear, x: Input, plus: Float[Array, "*rows out"] | None = None) -> Float[Array, "*rows out"]:
    """x W^T + b, in x's dtype, and `plus` added; float32 is multiplied in full precision."""
    if not isinstance(p, QuantizedLinear | Mapping):
        return multiplied(p, x, plus)
    x = value_of(x)
    weight, bias = (dequantize(p), p.bias) if isinstance(p, QuantizedLinear) else (p["weight"], p.get("bias"))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.einsum("...i,oi->...o", x, weight.astype(x.dtype), precision=precision)
    y = y if bias is None else y + _along_last(bias.astype(x.dtype), y)
    return y if plus is None else plus + y


def linears(p: Mapping[str, Any], roles: Sequence[str], x: Input) -> list[Array]:
    """What the linears of these roles make of x, each [*rows, out]. They may be joined, under their names with "+" between."""
    joined = p.get("+".join(roles))
    if joined is None:
        return [linear(p[role], x) for role in roles]
    ends = [sum(joined.widths[: i + 1]) for i in range(len(roles) - 1)]
    return jnp.split(linear(joined.whole, x), ends, -1)


def _along_last(feature: Float[Array, " out"], like: Array) -> Array:
    return feature.reshape((1,) * (like.ndim - 1) + (-1,))
