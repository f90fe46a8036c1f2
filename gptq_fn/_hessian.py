"""The second moment of a linear layer's inputs: a monoid under `merge`, with `empty` as its unit."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Hessian(NamedTuple):
    """`xx` is the sum over rows of x x^T, in float32; its scale cancels in `solve`, so it is not divided by `rows`."""

    xx: Float[Array, "in in"]
    rows: Int[Array, ""]


def empty(width: int) -> Hessian:
    """The Hessian of no rows."""
    return Hessian(jnp.zeros((width, width), jnp.float32), jnp.zeros((), jnp.int32))


def add_rows(h: Hessian, x: Float[Array, "*rows in"], keep: Bool[Array, "*rows"] | None = None) -> Hessian:
    """The Hessian with these rows added; rows where `keep` is false count for nothing.

    bf16 and fp16 rows are multiplied as they are into float32 accumulators, which is exact for each product.
    """
    x = x.reshape(-1, x.shape[-1])
    rows = jnp.asarray(len(x), jnp.int32)
    if keep is not None:
        x = jnp.where(keep.reshape(-1, 1), x, jnp.zeros((), x.dtype))
        rows = keep.sum(dtype=jnp.int32)
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    xx = jax.lax.dot_general(x, x, (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
    return Hessian(h.xx + xx, h.rows + rows)


def merge(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of the rows of both."""
    return Hessian(a.xx + b.xx, a.rows + b.rows)
