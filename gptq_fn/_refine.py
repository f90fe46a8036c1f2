"""Refinements of a quantized weight Q: better codes for its scales, and better scales for its codes.

Both lower what GPTQ is greedy about, (w - q) H (w - q)^T for each row, H being the damped Hessian, and neither ever raises it:
they may follow each other any number of times. Rows are independent.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn._config import QuantConfig
from gptq_fn._factor import damped_diagonal
from gptq_fn._grid import Grid
from gptq_fn._hessian import Hessian
from gptq_fn._product import product
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._solve import RoundBlock, group_width, round_in_loops

_PANEL = 128
"""Columns that are descended by one `RoundBlock`."""

_RIDGE = 1e-6
"""Added to the diagonal of the equations of `refit`, scaled to ones: it pulls towards the scales as they are."""

_LEAST, _MOST = 0.2, 3.0
"""By what a refitted scale may differ from the one that its codes were chosen for."""

_EQUATIONS = 2**26
"""Coefficients of the rows whose scales are refitted together: 256 MiB."""


@partial(jax.jit, static_argnames=("config", "round_block"))
def refine(
    q: QuantizedLinear, w: Float[Array, "out in"], h: Hessian, damp: Float[Array, ""], config: QuantConfig, round_block: RoundBlock
) -> QuantizedLinear:
    """`q` after the refinements that `config` names, in their order; see `descend` for the arguments."""
    for step in config.refine:
        q = descend(q, w, h, damp, round_block) if step == "descent" else refit(q, w, h, damp, config)
    return q


@partial(jax.jit, static_argnames="round_block")
def descend(
    q: QuantizedLinear, w: Float[Array, "out in"], h: Hessian, damp: Float[Array, ""], round_block: RoundBlock = round_in_loops
) -> QuantizedLinear:
    """`q` with new codes by one sweep of coordinate descent: column after column, as stored, gets its best codes for all others.

    `w` is the weight that is approximated, and `damp` the damping relative to the mean of H's diagonal, as a `Factor` tells it.

    With R = (w - q) H, the best value of column j is q_j + R_j / H_jj, so its best code is that of the nearest level; moving
    the column by d takes d H_jk from every R_k. Inside a panel this is the loop of GPTQ: let S be the inverse of the upper
    triangle of the panel's square of H, diagonal included. Unrounded, descent would reach q + R S (a step of Gauss and Seidel),
    and the error of rounding column j moves what column k behind it reaches by S_jk / S_jj, as a factor S would. S is as well
    conditioned as H is positive definite: where the diagonal is 1, its norm is at most 2.
    """
    n = len(h.xx)
    size = -(-n // _PANEL) * _PANEL
    xx = jnp.pad(_damped(h, damp), ((0, size - n), (0, size - n))) + jnp.diag(jnp.arange(size) >= n).astype(jnp.float32)
    starts = jnp.arange(0, size, _PANEL)
    squares = jax.vmap(lambda start: jax.lax.dynamic_slice(xx, (start, start), (_PANEL, _PANEL)))(starts)
    inverses = jax.vmap(lambda square: jax.scipy.linalg.solve_triangular(square, jnp.eye(_PANEL, dtype=square.dtype)))(squares)
    stored = Grid(q.scale.T.astype(jnp.float32), q.zero.T.astype(jnp.float32))
    group = jnp.pad(q.group_of, (0, size - n))
    error = jnp.pad(_target(w, h) - dequantize(q), ((0, 0), (0, size - n))).T

    def panel(error: Array, these: tuple[Array, ...]) -> tuple[Array, Array]:
        start, inverse, codes, group = these
        grid = Grid(*(jnp.take(a, group, axis=0) for a in stored))
        old = codes.astype(jnp.float32) - grid.zero
        residual = product(jax.lax.dynamic_slice_in_dim(xx, start, _PANEL), error)
        reached = grid.scale * old + product(inverse.T, residual)
        found, _ = round_block(reached, inverse, grid, q.bits)
        moved = grid.scale * (found.astype(jnp.float32) - grid.zero - old)
        mine = jax.lax.dynamic_slice_in_dim(error, start, _PANEL) - moved
        return jax.lax.dynamic_update_slice_in_dim(error, mine, start, 0), found

    panels = jnp.pad(q.codes, ((0, 0), (0, size - n))).T.reshape(len(starts), _PANEL, -1)
    codes = jax.lax.scan(panel, error, (starts, inverses, panels, group.reshape(len(starts), _PANEL)))[1]
    return QuantizedLinear(codes.reshape(size, -1)[:n].T, q.scale, q.zero, q.group_of, q.bits, q.bias)


@partial(jax.jit, static_argnames="config")
def refit(q: QuantizedLinear, w: Float[Array, "out in"], h: Hessian, damp: Float[Array, ""], config: QuantConfig) -> QuantizedLinear:
    """`q` with the scales of each row that are best together for its codes, up to their rounding.

    The arguments are those of `descend`; the groups of `q` are those that `config` makes. With a = codes - zero and R = (w - q) H,
    the scales change by the least squares solution d of M d = r, where M_gk = a_g H_gk a_k^T and r_g = R_g a_g^T. A group keeps
    its scale where it would shrink or grow too much, and a row keeps all of its scales where they are no better once rounded.
    """
    n, groups = len(h.xx), q.scale.shape[1]
    width = group_width(n, config)
    xx = _damped(h, damp)
    levels = q.codes.astype(jnp.float32) - q.zero.astype(jnp.float32)[:, q.group_of]
    residual = product(_target(w, h) - dequantize(q), xx)
    # All groups get as many columns: where the last one is narrower, what lies outside the matrices counts as 0.
    column = jnp.full(groups * width, n).at[:n].set(jnp.argsort(q.group_of, stable=True))

    def by_group(a: Float[Array, "rows in"]) -> Float[Array, "groups width rows"]:
        return jnp.take(a.T, column, axis=0, mode="fill", fill_value=0).reshape(groups, width, -1)

    def changed(scale: Array, levels: Array, residual: Array) -> Array:
        a = by_group(levels)

        def coefficients(group: tuple[Array, Array]) -> Array:
            columns, mine = group
            strip = xx.at[columns[:, None], column[None]].get(mode="fill", fill_value=0)
            return (product(strip.T, mine).reshape(a.shape) * a).sum(1)

        gram = jax.lax.map(coefficients, (column.reshape(groups, width), a)).transpose(2, 0, 1)
        return _best_scales(scale, gram, (by_group(residual) * a).sum(1).T)

    scale = _in_parts(changed, max(1, _EQUATIONS // groups**2), q.scale, levels, residual)
    return QuantizedLinear(q.codes, scale, q.zero, q.group_of, q.bits, q.bias)


def _best_scales(
    scale: Float[Array, "rows groups"], gram: Float[Array, "rows groups groups"], gain: Float[Array, "rows groups"]
) -> Float[Array, "rows groups"]:
    """The scales changed by what solves gram d = gain in each row, and rounded, where that lowers d gram d^T - 2 gain d^T."""
    old = scale.astype(jnp.float32)
    size = jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    size = jnp.where(size > 0, size, 1.0)  # a group of zeros keeps any scale
    scaled = gram / (size[:, :, None] * size[:, None, :]) + _RIDGE * jnp.eye(gram.shape[1], dtype=gram.dtype)[None]
    root = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    step = jax.scipy.linalg.cho_solve((root, True), (gain / size)[:, :, None])[:, :, 0] / size
    new = (old + step).astype(scale.dtype)
    ratio = new.astype(jnp.float32) / old
    new = jnp.where((ratio > _LEAST) & (ratio < _MOST), new, scale)  # false for what is not finite
    moved = new.astype(jnp.float32) - old
    change = ((gram * moved[:, None, :]).sum(2) * moved).sum(1) - 2 * (gain * moved).sum(1)
    return jnp.where((change < 0)[:, None], new, scale)


def _damped(h: Hessian, damp: Float[Array, ""]) -> Float[Array, "in in"]:
    """The matrix whose inverse a `Factor` with this damping holds, as it is stored."""
    turn = jnp.arange(len(h.xx))
    return h.xx.at[turn, turn].set(damped_diagonal(jnp.diagonal(h.xx), damp))


def _target(w: Float[Array, "out in"], h: Hessian) -> Float[Array, "out in"]:
    """What is approximated: `w`, but 0 where inputs were always 0."""
    return jnp.where((jnp.diagonal(h.xx) <= 0)[None], 0.0, w.astype(jnp.float32))


def _in_parts(f: Callable[..., Array], rows: int, *arrays: Array) -> Array:
    """f(*arrays), of which row after row is independent, for at most `rows` of them at a time."""
    out = len(arrays[0])
    parts = -(-out // rows)
    if parts == 1:
        return f(*arrays)
    each = -(-out // parts)
    split = [jnp.pad(a, ((0, parts * each - out), (0, 0))).reshape(parts, each, -1) for a in arrays]
    return jax.lax.map(lambda part: f(*part), tuple(split)).reshape(parts * each, -1)[:out]
