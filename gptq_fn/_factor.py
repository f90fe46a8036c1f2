"""The inverse factor of a damped Hessian, which tells how the error of each column is made good by those behind it."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptq_fn._config import QuantConfig
from gptq_fn._hessian import Hessian
from gptq_fn._product import product

_BASE = 1024
"""Columns of a matrix that is factorized and inverted as one; wider ones are halved, so that most of the work is wide products."""
_SMALLEST_DAMP, _LARGEST_DAMP = 0.01, 1.0


class Factor(NamedTuple):
    """What `solve` needs of a Hessian H: `upper` with (H + damping)^-1 = upper^T upper, in processing order.

    `order[p]` is the stored column that is processed p-th; `dead` marks, in stored order, inputs that were always 0;
    `damp` is the damping that was used, relative to the mean of H's diagonal; it is not finite if no damping helped.
    """

    upper: Float[Array, "in in"]
    dead: Bool[Array, " in"]
    order: Int[Array, " in"]
    damp: Float[Array, ""]


Multiply = Callable[[Float[Array, "n k"], Float[Array, "k m"]], Float[Array, "n m"]]


@partial(jax.jit, static_argnames="config")
def factor(h: Hessian, config: QuantConfig) -> Factor:
    """The factor of the damped inverse Hessian, float32, with columns in the order that `config` asks for.

    Damping starts where `config` says and doubles until there is a factor. Nothing is raised: `damp` tells, by not being finite,
    that no damping helped.
    """
    return factor_by(product, h, config)


def factor_by(multiply: Multiply, h: Hessian, config: QuantConfig) -> Factor:
    """The factor of the damped inverse Hessian, with columns in the order that `config` asks for.

    One Cholesky is enough: with H = R R^T and R upper triangular (a Cholesky from the last column to the first),
    U = R^-1 satisfies H^-1 = U^T U. Damping starts where `config` says and doubles until the factor is finite. The large
    products of float32 matrices are those of `multiply`.
    """
    n = len(h.xx)
    diagonal = jnp.diagonal(h.xx)
    order = _processing_order(diagonal, config)
    noise = jnp.clip(n / jnp.maximum(h.rows, 1).astype(diagonal.dtype), _SMALLEST_DAMP, _LARGEST_DAMP)
    first = noise if config.damp is None else config.damp
    # A lower Cholesky factor of the columns from last to first is R with rows and columns from last to first.
    back = order[::-1]
    xx, turn = h.xx[back][:, back], jnp.arange(n)

    def attempt(damp: Float[Array, ""]) -> Float[Array, "in in"]:
        return _inverse_root(xx.at[turn, turn].set(damped_diagonal(diagonal, damp)[back]), multiply)

    def usable(triangle: Float[Array, "in in"]) -> Bool[Array, ""]:
        return jnp.isfinite(triangle).all() & (jnp.diagonal(triangle) > 0).all()

    def failed(state: tuple[Array, Array]) -> Bool[Array, ""]:
        return ~usable(state[1]) & (state[0] < _LARGEST_DAMP)

    def again(state: tuple[Array, Array]) -> tuple[Array, Array]:
        damp = jnp.where(state[0] < 0, first, jnp.clip(2 * state[0], _SMALLEST_DAMP, _LARGEST_DAMP))
        return damp, attempt(damp)

    untried = jnp.asarray(-1.0, xx.dtype), jnp.zeros_like(xx)  # nothing usable, so that the loop holds the only attempt
    damp, inverse = jax.lax.while_loop(failed, again, untried)
    return Factor(inverse[::-1, ::-1], diagonal <= 0, order, jnp.where(usable(inverse), damp, jnp.nan))


def damped_diagonal(diagonal: Float[Array, " in"], damp: Float[Array, ""]) -> Float[Array, " in"]:
    """The diagonal of a Hessian with damping relative to the mean of what is not 0; what is 0, of dead inputs, is that mean first."""
    dead = diagonal <= 0
    mean = jnp.where(dead.all(), 1.0, diagonal.sum() / jnp.maximum((~dead).sum(), 1).astype(diagonal.dtype))
    return jnp.where(dead, mean, diagonal) + damp * mean


def _inverse_root(a: Float[Array, "n n"], multiply: Multiply) -> Float[Array, "n n"]:
    """The inverse of the lower Cholesky factor of `a`, of which it reads the lower half; not finite where `a` has none."""
    n = len(a)
    if n <= _BASE:
        lower = jnp.linalg.cholesky(a, symmetrize_input=False)
        return jax.scipy.linalg.solve_triangular(lower, jnp.eye(n, dtype=a.dtype), lower=True)
    half = n // 2
    first = _inverse_root(a[:half, :half], multiply)
    below = multiply(a[half:, :half], first.T)
    last = _inverse_root(a[half:, half:] - multiply(below, below.T), multiply)
    return jnp.block([[first, jnp.zeros((half, n - half), a.dtype)], [-multiply(last, multiply(below, first)), last]])


def _processing_order(importance: Float[Array, " in"], config: QuantConfig) -> Int[Array, " in"]:
    """The columns in the order in which they are rounded; `importance` is the Hessian's diagonal."""
    n = len(importance)
    if config.order == "natural":
        return jnp.arange(n)
    if config.order == "act" or config.group_size is None:
        return jnp.argsort(-importance, stable=True)
    group = jnp.arange(n) // config.group_size
    best = jax.ops.segment_max(importance, group, num_segments=-(-n // config.group_size))
    return jnp.lexsort((-importance, group, -best[group]))
