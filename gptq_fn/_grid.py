"""Uniform grids: where the 2^bits levels of a group of weights lie."""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

SCALE_DTYPE = jnp.float16
"""Checkpoints store scales in this type, so grids are made of its values: codes are chosen for the scale that is kept."""

_FACTORS = tuple(1 - i / 25 for i in range(16))
"""How far a search shrinks a range: from all of it to the 0.4 that suits 2-bit codes of normal weights."""

_AT_ONCE = 2**29
"""Weights that GPUs round at once to try factors: 2 GiB of float32, where a search does not happen inside one kernel."""

_IN_CACHE = 2**16
"""Rows that CPUs round at once to try factors, column after column: a few arrays of so many values fit the second level of cache."""


class Grid(NamedTuple):
    """Level c of row o is `scale[o] * (c - zero[o])`; `zero` holds whole numbers, so that 0 is always a level."""

    scale: Float[Array, " out"]
    zero: Float[Array, " out"]


Cost = Callable[[Grid], Float[Array, " out"]]
"""What it costs each row to be rounded on its grid. Called with the grids of several copies of all rows, one copy after the
other, it tells the cost of each."""


def encode(w: Float[Array, "out group"], grid: Grid, bits: int) -> Float[Array, "out group"]:
    """The codes of the levels nearest to `w`, as whole numbers in float32, ties to the even level."""
    return jnp.clip(jnp.round(w / grid.scale[:, None]) + grid.zero[:, None], 0, 2**bits - 1)


def decode(codes: Float[Array, "out group"], grid: Grid) -> Float[Array, "out group"]:
    """The weights that `codes` stand for."""
    return grid.scale[:, None] * (codes - grid.zero[:, None])


def find_grid(
    w: Float[Array, "out group"],
    *,
    bits: int,
    sym: bool,
    method: Literal["minmax", "mse"],
    weight: Float[Array, " group"] | None = None,
    negative: bool = False,
) -> Grid:
    """A grid for each row of `w`; zeros appended to a row do not change it.

    "minmax" covers the row's range and zero. "mse" shrinks that range by the factor that makes the sum of squared rounding
    errors least, those of column j counted `weight[j]` times; where `negative`, its scales may be so. Scales are values of
    float16. Raises ValueError for another method: the searches of `solve` that are not here are "hid", which is "mse" with
    a weight, and "loop".
    """
    if method not in ("minmax", "mse"):
        raise ValueError(f"method must be minmax or mse, got {method!r}; 'hid' is mse with weight=1 / diag(upper)**2.")
    if method == "minmax":
        return _grid_over(*_range(w, sym), bits, sym)
    copies = _IN_CACHE // len(w)
    return cheapest_grid(w, rounding_cost(w, bits, weight), bits=bits, sym=sym, negative=negative, copies=copies)


def rounding_cost(w: Float[Array, "out group"], bits: int, weight: Float[Array, " group"] | None = None) -> Cost:
    """The sum of squared rounding errors, those of column j counted `weight[j]` times."""

    def at_once(grid: Grid) -> Float[Array, " rows"]:
        copies = jnp.tile(w, (len(grid.scale) // len(w), 1))
        lost = (decode(encode(copies, grid, bits), grid) - copies) ** 2
        return (lost if weight is None else lost * weight[None]).sum(1)

    def by_column(grid: Grid) -> Float[Array, " rows"]:
        scale, zero = (a.reshape(-1, len(w)) for a in grid)

        def add(total: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
            mine, counted = column[0][None], column[1]
            levels = jnp.clip(jnp.round(mine / scale), -zero, 2**bits - 1 - zero)
            return total + counted * (scale * levels - mine) ** 2, None

        each = jnp.ones(w.shape[1], w.dtype) if weight is None else weight
        return jax.lax.scan(add, jnp.zeros_like(scale), (w.T, each))[0].reshape(-1)

    def cost(grid: Grid) -> Float[Array, " rows"]:
        return jax.lax.platform_dependent(grid, cpu=by_column, default=at_once)

    return cost


def cheapest_grid(w: Float[Array, "out group"], cost: Cost, *, bits: int, sym: bool, negative: bool = False, copies: int = 1) -> Grid:
    """For each row of `w` the grid of least cost among those that cover its range shrunk by some factors; of equals, the widest.

    CPUs ask for the cost of at most so many `copies` of the rows at once, if of more than one.
    Where `negative`, scales of either sign are tried. That is for symmetric grids: their codes reach one level further below
    the zero point than above it, and a negative scale turns that level to the other side.
    """
    low, high = _range(w, sym)
    factors = jnp.asarray([sign * factor for sign in ((1, -1) if negative else (1,)) for factor in _FACTORS], w.dtype)

    def shrunk(factor: Float[Array, "*_"], low: Float[Array, "*_"], high: Float[Array, "*_"]) -> Grid:
        return _grid_over(factor * low, factor * high, bits, sym)

    def costs(at_once: int, low: Float[Array, " out"], high: Float[Array, " out"]) -> Float[Array, "factors out"]:
        def some(factors: Float[Array, " at_once"]) -> Float[Array, "at_once out"]:
            grids = shrunk(factors[:, None], low[None], high[None])
            return cost(Grid(*(a.reshape(-1) for a in grids))).reshape(len(factors), -1)

        return jax.lax.map(some, factors.reshape(-1, at_once)).reshape(len(factors), -1)

    # GPUs try all factors in one kernel; CPUs are faster with what stays in a cache.
    parts = [n for n in range(1, len(factors) + 1) if len(factors) % n == 0]
    most, few = (max(n for n in parts if n <= max(1, limit)) for limit in (_AT_ONCE // w.size, copies))
    found = jax.lax.platform_dependent(low, high, cpu=partial(costs, few), default=partial(costs, most))
    return shrunk(factors[jnp.argmin(found, 0)], low, high)  # of equals, the first


def storable(grid: Grid, w: Float[Array, "out group"], *, bits: int, sym: bool) -> Grid:
    """The grid of the rows of `w` that checkpoints can hold: scales in float16, of which none is 0, and zero points among the codes,
    where `sym` the middle one. Raises ValueError where it is not a scale and a zero point for each row."""
    if found := [a.shape for a in grid if a.shape != w.shape[:1]]:
        raise ValueError(
            f"A grid of {len(w)} rows has a scale and a zero point for each, in arrays [{len(w)}]; got one of {list(found[0])}."
        )
    scale = grid.scale.astype(SCALE_DTYPE).astype(w.dtype)
    scale = jnp.where(scale == 0, 1.0, scale)
    if sym:
        return Grid(scale, jnp.full_like(scale, 2 ** (bits - 1)))
    return Grid(scale, jnp.clip(jnp.round(grid.zero.astype(w.dtype)), 0, 2**bits - 1))


def _range(w: Float[Array, "out group"], sym: bool) -> tuple[Float[Array, " out"], Float[Array, " out"]]:
    """The least and the largest weight of each row, or zero; of opposite values where `sym`."""
    low, high = jnp.minimum(w.min(1), 0.0), jnp.maximum(w.max(1), 0.0)
    if sym:
        high = jnp.maximum(-low, high)
        low = -high
    return low, high


def _grid_over(low: Float[Array, "*rows"], high: Float[Array, "*rows"], bits: int, sym: bool) -> Grid:
    """The grid whose first and last level are `low` and `high`, up to the rounding of its scale and zero point."""
    top = 2**bits - 1
    scale = ((high - low) / top).astype(SCALE_DTYPE).astype(low.dtype)
    scale = jnp.where(jnp.abs(scale) > 0, scale, 1.0)  # a row without weights, or below float16's reach: all levels but 0 are far away
    if sym:
        return Grid(scale, jnp.full_like(scale, 2 ** (bits - 1)))
    return Grid(scale, jnp.clip(jnp.round(-low / scale), 0, top))
