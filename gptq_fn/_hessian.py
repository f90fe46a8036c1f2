"""The second moment of a linear layer's inputs: a monoid under `merge`, with `empty` as its unit."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptq_fn._product import product

_WIDEST, _WIDEST_ON_CPUS = 4096, 384
"""Inputs whose products with each other are one matrix product; of more, those above the diagonal are computed, in blocks, and mirrored."""

_PARTS, _MULTIPLE = 8, 128
"""Into how many parts inputs are cut at most, each a multiple of what matrix units like."""


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
    xx = jax.lax.platform_dependent(h.xx, x, cpu=partial(_add_gram, _WIDEST_ON_CPUS), default=partial(_add_gram, _WIDEST))
    return Hessian(xx, h.rows + rows)


def _add_gram(widest: int, xx: Float[Array, "in in"], x: Float[Array, "rows in"]) -> Float[Array, "in in"]:
    """xx + x^T x, block after block into `xx`, which may be donated; exactly symmetric where there is more than one block."""
    n = len(xx)
    parts = min(_PARTS, -(-n // widest))
    if parts == 1:
        return xx + cross(x, x)
    width = -(-n // (parts * _MULTIPLE)) * _MULTIPLE
    blocks = [slice(start, min(start + width, n)) for start in range(0, n, width)]
    for i, rows in enumerate(blocks):
        for columns in blocks[i:]:
            block = xx[rows, columns] + cross(x[:, rows], x[:, columns])
            if columns == rows:
                xx = xx.at[rows, rows].set(jnp.triu(block) + jnp.triu(block, 1).T)
            else:
                xx = xx.at[rows, columns].set(block).at[columns, rows].set(block.T)
    return xx


def cross(x: Float[Array, "rows n"], y: Float[Array, "rows m"]) -> Float[Array, "n m"]:
    """x^T y in float32; products of bf16 and fp16 are exact."""
    if x.dtype == jnp.float32:
        return product(x.T, y)
    return jax.lax.dot_general(x, y, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)


def merge(a: Hessian, b: Hessian) -> Hessian:
    """The Hessian of the rows of both."""
    return Hessian(a.xx + b.xx, a.rows + b.rows)
