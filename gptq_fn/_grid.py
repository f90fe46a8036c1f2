"""Uniform grids: where the 2^bits levels of a group of weights lie."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn._config import Search

SCALE_DTYPE = jnp.float16
"""Checkpoints store scales in this type, so grids are made of its values: codes are chosen for the scale that is kept."""

_FACTORS = tuple(1 - i / 25 for i in range(16))
"""How far the mse search shrinks a range: from all of it to the 0.4 that suits 2-bit codes of normal weights."""


class Grid(NamedTuple):
    """Level c of row o is `scale[o] * (c - zero[o])`; `zero` holds whole numbers, so that 0 is always a level."""

    scale: Float[Array, " out"]
    zero: Float[Array, " out"]


def encode(w: Float[Array, "out group"], grid: Grid, bits: int) -> Float[Array, "out group"]:
    """The codes of the levels nearest to `w`, as whole numbers in float32, ties to the even level."""
    return jnp.clip(jnp.round(w / grid.scale[:, None]) + grid.zero[:, None], 0, 2**bits - 1)


def decode(codes: Float[Array, "out group"], grid: Grid) -> Float[Array, "out group"]:
    """The weights that `codes` stand for."""
    return grid.scale[:, None] * (codes - grid.zero[:, None])


def find_grid(w: Float[Array, "out group"], *, bits: int, sym: bool, method: Search) -> Grid:
    """A grid for each row of `w`; zeros appended to a row do not change it.

    "minmax" covers the row's range and zero. "mse" shrinks that range by the factor that makes the sum of
    squared rounding errors least. Scales are values of float16.
    """
    low, high = jnp.minimum(w.min(1), 0.0), jnp.maximum(w.max(1), 0.0)
    if sym:
        high = jnp.maximum(-low, high)
        low = -high
    widest = _grid_over(low, high, bits, sym)
    if method == "minmax":
        return widest

    def shrunk(factor: Float[Array, "*out"], low: Float[Array, " out"], high: Float[Array, " out"]) -> Grid:
        return _grid_over(factor * low, factor * high, bits, sym)

    def error(w: Float[Array, "out group"], low: Float[Array, " out"], high: Float[Array, " out"], factor: Float[Array, ""]) -> Array:
        grid = shrunk(factor, low, high)
        return ((decode(encode(w, grid, bits), grid) - w) ** 2).sum(1)

    # GPUs try all factors in one kernel; CPUs are faster one after the other, while the weights are in a cache.
    factors = jnp.asarray(_FACTORS, w.dtype)
    errors = jax.lax.platform_dependent(
        w, low, high, cpu=lambda *of: jax.lax.map(partial(error, *of), factors), default=lambda *of: jax.vmap(partial(error, *of))(factors)
    )
    return shrunk(factors[jnp.argmin(errors, 0)], low, high)  # of equals, the first


def _grid_over(low: Float[Array, " out"], high: Float[Array, " out"], bits: int, sym: bool) -> Grid:
    """The grid whose first and last level are `low` and `high`, up to the rounding of its scale and zero point."""
    top = 2**bits - 1
    scale = ((high - low) / top).astype(SCALE_DTYPE).astype(low.dtype)
    scale = jnp.where(scale > 0, scale, 1.0)  # a row without weights, or below float16's reach: every level but 0 is far away
    if sym:
        return Grid(scale, jnp.full_like(scale, 2 ** (bits - 1)))
    return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, top))
