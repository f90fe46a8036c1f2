"""What may be asked of a product beside multiplying, as plain JAX does it: what a Triton kernel does on the way."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Around:
    """The numbers of what comes before and after a product."""

    eps: float = 0.0
    """Added to the mean square that inputs are normalized by."""
    offset: float = 0.0
    """Added to the weights that they are multiplied by then."""
    gate: tuple[float, float] | None = None
    """a and b, where the first half of the outputs, z, becomes z * sigmoid(a z + b z^3) times the other half."""


def before(x: jax.Array, norm: jax.Array | None, around: Around) -> jax.Array:
    """x [m, k] over the root of its mean square, times `norm` [k], where there is one; computed in float32."""
    if norm is None:
        return x
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + around.eps)
    return (y * (norm.astype(jnp.float32) + around.offset)[None]).astype(x.dtype)


def after(y: jax.Array, bias: jax.Array | None, plus: jax.Array | None, around: Around) -> jax.Array:
    """y [m, n] with the bias [n] added, and `plus` of its shape; or gated [m, n / 2]."""
    if bias is not None:
        y = y + bias.astype(y.dtype)[None]
    if around.gate is None:
        return y if plus is None else plus + y
    (a, b), (z, other) = around.gate, jnp.split(y, 2, -1)
    return z * jax.nn.sigmoid(z * (a + b * z * z)) * other
