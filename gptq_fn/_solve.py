"""GPTQ on one weight matrix (Frantar et al. 2022, arXiv 2210.17323): rounding column by column.

Columns are rounded in an order of our choice. The rounding error of a column, divided by the diagonal of the inverse
factor, is subtracted from all columns not rounded yet, along that column's row of the factor (the paper's equation 3
and algorithm 1). Blocks of columns are nested so that far columns are updated by matrix products; a group's scale is
taken when its block is entered, from weights that have every earlier update.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from gptq_fn._config import QuantConfig
from gptq_fn._factor import Factor
from gptq_fn._grid import SCALE_DTYPE, Grid, cheapest_grid, decode, encode, find_grid, storable
from gptq_fn._product import product
from gptq_fn._quantized import QuantizedLinear

_PANEL, _STRIP = 128, 16
"""Columns whose updates stay inside a block: the panel fits the second level of cache, the strip the first."""
_LEAF = 1024
"""Columns that are rounded panel after panel. Wider matrices are halved, so that most updates are wide products."""
Find = Callable[[Float[Array, "columns out"], Float[Array, "columns columns"], Int[Array, ""]], Grid]
"""The grid [1, out] of a block of weights, or the grids [columns, out] of its columns, from these weights, the factor's square
on these columns and the position of the first one."""

Rounded = tuple[UInt8[Array, "columns out"], Float[Array, "columns out"]]
"""The codes of a block of columns, and their rounding errors divided by the diagonal of the factor."""

RoundBlock = Callable[[Float[Array, "columns out"], Float[Array, "columns columns"], Grid, int], Rounded]
"""Rounds a block of columns, each after it has the updates of those before it, from the weights, the factor's square on these
columns, their grid [1, out] or grids [columns, out], and the bits. Hashable: it is part of the key of a compiled program, so a lambda
made anew for each call compiles anew."""


def round_in_loops(w: Float[Array, "columns out"], upper: Float[Array, "columns columns"], grid: Grid, bits: int) -> Rounded:
    """The plain `RoundBlock`: column after column, in strips that fit the first level of cache."""

    def visit(w: Array, upper: Array, first: Array, widths: tuple[int, ...]) -> Rounded:
        if not widths:
            mine = Grid(*(a[0] if len(a) == 1 else jax.lax.dynamic_index_in_dim(a, first, keepdims=False) for a in grid))
            codes = encode(w.T, mine, bits)
            return codes.T.astype(jnp.uint8), (w - decode(codes, mine).T) / upper

        def part(mine: Array, square: Array, start: Array) -> tuple[Array, Array]:
            codes, errors = visit(mine, square, first + start, widths[1:])
            return errors, codes

        errors, codes = _sweep(w, upper, widths[0], part)
        return codes, errors

    return visit(w, upper, jnp.asarray(0), tuple(sorted({min(_near(len(w), _STRIP), len(w)), 1}, reverse=True)))


@partial(jax.jit, static_argnames=("config", "round_block"))
def solve(
    w: Float[Array, "out in"], factor: Factor, config: QuantConfig, round_block: RoundBlock = round_in_loops
) -> tuple[QuantizedLinear, Float[Array, " out"]]:
    """The quantized weight, and for each row the objective (w - q) H (w - q)^T under the damped Hessian.

    The rows of `w` are independent of each other: linears that read the same input may be stacked. `w` may be of any floating type
    and is solved in float32, in which the objective is; scales are float16, codes and zero points uint8. Weights that are not
    finite give codes without meaning: `quantize_linears` refuses them.
    """
    n = w.shape[1]
    w = jnp.where(factor.dead[None], 0.0, w.astype(jnp.float32))
    width = group_width(n, config)
    groups = -(-n // width)
    turn = jnp.arange(n)
    by_place = config.static_groups or config.order == "group"
    group = (factor.order if by_place else turn) // width  # the group of the column that is processed p-th
    place = jnp.zeros_like(turn).at[factor.order].set(turn, unique_indices=True)  # of each stored column among the processed
    if config.static_groups:
        stored = _stored_grids(w, config, _cost_of_errors(factor.upper)[place])
        slot, block = turn, _PANEL
    else:
        # Blocks are of one width, so a narrower last group is filled up with empty columns where it ends.
        stored, last_end = None, jnp.max(jnp.where(group == groups - 1, turn, 0))
        slot = turn + jnp.where(turn > last_end, groups * width - n, 0)
        block = width if groups > 1 else _round_up(n, _PANEL)

    widths = _widths(block)
    size = _round_up(n, widths[0])
    columns = _spread(w.T[factor.order], slot, size)
    upper = _spread(_spread(factor.upper, slot, size).T, slot, size).T
    empty = jnp.ones(size, upper.dtype).at[slot].set(0.0)
    upper = upper + jnp.diag(empty)
    find = partial(_fit, config, round_block, empty) if stored is None else partial(_look_up, stored, jnp.pad(group, (0, size - n)))
    codes, errors, found = _round_columns(columns, upper, find, widths, round_block, config.bits)

    if stored is None:
        rank = jnp.zeros(groups, slot.dtype).at[group].set(slot // block)  # of each stored group among the processed
        stored = Grid(*(a[rank].T for a in found))
    q = QuantizedLinear(
        codes=codes[slot][place].T,
        scale=stored.scale.astype(SCALE_DTYPE),
        zero=stored.zero.astype(jnp.uint8),
        group_of=group[place].astype(jnp.int32),
        bits=config.bits,
    )
    return q, (errors**2).sum(0)


@partial(jax.jit, static_argnames="config")
def round_to_nearest(w: Float[Array, "out in"], config: QuantConfig) -> QuantizedLinear:
    """Every weight at its nearest level, on grids by stored position: what quantization costs without calibration.

    Where `config.grid` is a search that needs a Hessian, "hid" or "loop", grids are those of "mse"; to a function of your own,
    errors cost alike in all columns.
    """
    w = w.astype(jnp.float32)
    n = w.shape[1]
    grid = _stored_grids(w, config, jnp.ones(n, w.dtype))
    group = jnp.arange(n, dtype=jnp.int32) // group_width(n, config)
    levels = jnp.round(w / grid.scale[:, group]) + grid.zero[:, group]
    codes = jnp.clip(levels, 0, config.max_code).astype(jnp.uint8)
    return QuantizedLinear(codes, grid.scale.astype(SCALE_DTYPE), grid.zero.astype(jnp.uint8), group, config.bits)


def _look_up(stored: Grid, group: Int[Array, " in"], w: Float[Array, "columns out"], _: Array, first: Int[Array, ""]) -> Grid:
    """The grids of the groups to which the columns from position `first` on belong."""
    mine = jax.lax.dynamic_slice_in_dim(group, first, len(w))
    return Grid(*(jnp.take(a, mine, axis=1).T for a in stored))


def _fit(
    config: QuantConfig,
    round_block: RoundBlock,
    empty: Float[Array, " in"],
    w: Float[Array, "columns out"],
    upper: Float[Array, "columns columns"],
    first: Int[Array, ""],
) -> Grid:
    """The grid that suits these weights, which begin at position `first`, as they are now; `empty` is 1 for columns that only fill up."""
    if config.grid == "loop":

        def cost(grid: Grid) -> Float[Array, " rows"]:
            copies = jnp.tile(w, (1, len(grid.scale) // w.shape[1]))
            errors = _round_in_panels(copies, upper, Grid(*(a[None] for a in grid)), config.bits, round_block)[1]
            return (errors**2).sum(0)

        found = cheapest_grid(w.T, cost, bits=config.bits, sym=config.sym, negative=config.either_sign)
    else:
        fills = jax.lax.dynamic_slice_in_dim(empty, first, len(w))
        counts = jnp.where(fills.min() > 0, 1.0, 1 - fills)  # where nothing else is in a block, its zeros are weights like others
        found = _searched(config, w.T, _cost_of_errors(upper) * counts)
    return Grid(*(a[None] for a in found))


def _searched(config: QuantConfig, w: Float[Array, "out group"], weight: Float[Array, " group"]) -> Grid:
    """A grid for each row by the search of `config`, with rounding errors weighted where that heeds it."""
    if callable(config.grid):
        return storable(Grid(*config.grid(w, weight, config)), w, bits=config.bits, sym=config.sym)
    method = "minmax" if config.grid == "minmax" else "mse"
    heeded = weight if config.grid == "hid" else None
    return find_grid(w, bits=config.bits, sym=config.sym, method=method, weight=heeded, negative=config.either_sign)


def _cost_of_errors(upper: Float[Array, "columns columns"]) -> Float[Array, " columns"]:
    """What a squared rounding error of each column adds to the objective, after the best change of the columns behind it."""
    return 1 / jnp.diagonal(upper) ** 2


def _round_columns(
    w: Float[Array, "columns out"],
    upper: Float[Array, "columns columns"],
    find: Find,
    widths: tuple[int, ...],
    round_block: RoundBlock,
    bits: int,
) -> tuple[Array, Array, Grid]:
    """Codes [columns, out], scaled errors [columns, out] and the grids that `find` chose [blocks, out].

    `widths` are those of nested blocks, each a divisor of the one before; at the entry of one of the last width, `find`
    chooses a grid. The program grows with the columns only by the halves that they are cut into.
    """

    def visit(w: Array, upper: Array, first: Array, widths: tuple[int, ...]) -> tuple[Array, tuple[Array, Grid]]:
        if not widths:
            grid = find(w, upper, first)
            codes, errors = _round_in_panels(w, upper, grid, bits, round_block)
            return errors, (codes, grid)
        return _sweep(w, upper, widths[0], lambda mine, square, start: visit(mine, square, first + start, widths[1:]))

    errors, (codes, grids) = visit(w, upper, jnp.asarray(0), widths)
    return codes, errors, grids


def _round_in_panels(
    w: Float[Array, "columns out"], upper: Float[Array, "columns columns"], grid: Grid, bits: int, round_block: RoundBlock
) -> Rounded:
    """What `round_block` makes of a block of any width with one grid [1, out], which it gets in blocks of at most a panel."""
    if len(w) <= _PANEL:
        return round_block(w, upper, grid, bits)

    def part(mine: Array, square: Array, _: Array) -> tuple[Array, Array]:
        codes, errors = round_block(mine, square, grid, bits)
        return errors, codes

    errors, codes = _sweep(w, upper, _near(len(w), _PANEL), part)
    return codes, errors


def _sweep(
    w: Array, upper: Array, size: int, part: Callable[[Array, Array, Array], tuple[Array, Any]], first: int = 0
) -> tuple[Array, Any]:
    """What `part` makes of every `size` columns of `w`, one part after the other.

    `part` is called with the columns, the factor's square on them and the position of their first one, and returns their
    scaled errors, which are then subtracted from all columns behind, and anything else. `first` is added to positions.
    """
    if len(w) == size:
        return part(w, upper, jnp.asarray(first))
    if len(w) > _LEAF:
        half = _round_up(-(-len(w) // 2), size)
        before = _sweep(w[:half], upper[:half, :half], size, part, first)
        rest = w[half:] - product(upper[:half, half:].T, before[0])
        after = _sweep(rest, upper[half:, half:], size, part, first + half)
        return jax.tree.map(lambda *halves: jnp.concatenate(halves), before, after)

    def step(w: Array, start: Array) -> tuple[Array, tuple[Array, Any]]:
        mine = jax.lax.dynamic_slice_in_dim(w, start, size)
        rows = jax.lax.dynamic_slice_in_dim(upper, start, size)  # zero before the part: `upper` is triangular
        errors, rest = part(mine, jax.lax.dynamic_slice_in_dim(rows, start, size, axis=1), first + start)
        update = rows.T * errors if size == 1 else product(rows.T, errors)
        return w - update, (errors, rest)

    found = jax.lax.scan(step, w, jnp.arange(0, len(w), size))[1]
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), found)


def _widths(block: int) -> tuple[int, ...]:
    """The widths of nested blocks down to `block`: panels and strips, where they are wider."""
    strip = max(block, _near(block, _STRIP))
    return tuple(sorted({block, strip, max(block, _near(strip, _PANEL))}, reverse=True))


def _near(width: int, limit: int) -> int:
    """The largest multiple of `width` up to `limit`, or its largest divisor where it is wider."""
    if width <= limit:
        return limit // width * width
    return next(d for d in range(limit, 0, -1) if width % d == 0)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def group_width(n: int, config: QuantConfig) -> int:
    """The columns of a group, of which only the last may have fewer, where a row has `n`."""
    return n if config.group_size is None else min(config.group_size, n)


def _spread(rows: Float[Array, "n m"], slot: Int[Array, " n"], size: int) -> Float[Array, "size m"]:
    """Row p at index slot[p], zeros elsewhere."""
    if size == len(rows):
        return rows
    return jnp.zeros((size, rows.shape[1]), rows.dtype).at[slot].set(rows, unique_indices=True)


def _stored_grids(w: Float[Array, "out in"], config: QuantConfig, weight: Float[Array, " in"]) -> Grid:
    """Scales and zero points [out, groups] of the groups as they lie in the row, with rounding errors weighted where that counts."""
    out, n = w.shape
    width = group_width(n, config)
    missing = _round_up(n, width) - n
    full = jnp.pad(w, ((0, 0), (0, missing))).reshape(out, -1, width)
    each = jnp.pad(weight, (0, missing)).reshape(-1, width)
    return jax.vmap(partial(_searched, config), in_axes=(1, 0), out_axes=1)(full, each)
