"""The asymmetric target: a linear makes good what rounding before it changed in its inputs.

The idea is GPTAQ's (Li et al. 2025, arXiv 2504.02692), here made partial. Beside the quantized stream, of which rows x enter a
linear, runs the float stream, in which x + d would. Of the weights that compute from x what W computes from x + d, that of least
squared error under the damped Hessian H_d = sum x x^T + damping is W + W C H_d^-1, with C = sum d x^T; the target goes the part
alpha of this way. Where alpha is not given, it is the best one for rows that were held out.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from gptq_fn._config import QuantConfig
from gptq_fn._factor import Factor
from gptq_fn._hessian import Hessian, add_rows, cross, empty
from gptq_fn._mesh import PARTS, placed, together
from gptq_fn._product import energy, product

HELD_OUT = 8
"""Of so many samples one, from the first on, is held out where alpha is chosen."""


class Moments(NamedTuple):
    """Sums over rows x that enter a linear and, where the float stream is needed, x + d that do there. A monoid, as Hessians are."""

    h: Hessian
    drift: Float[Array, "in in"] | None
    """The sum of d x^T, in float32."""


def no_rows(width: int, configs: Collection[QuantConfig]) -> tuple[Moments, ...]:
    """What linears of these configurations need, of no rows: the moments of all, or of those fitted and those held out."""
    alphas = {config.alpha for config in configs}

    def none() -> Moments:
        return Moments(empty(width), jnp.zeros((width, width), jnp.float32) if alphas - {0.0} else None)

    return (none(), none()) if None in alphas else (none(),)


def shares_of(keep: Bool[Array, "batch time"], samples: Sequence[int], shares: int, mesh: Mesh | None) -> Iterator[tuple[int, Array]]:
    """Which tokens of a batch belong to each of one or two shares of the rows, by its number; none where no sample does."""
    held = np.asarray([shares == 2 and n % HELD_OUT == 0 for n in samples])
    if held.all() or not held.any():
        yield int(held.any()), keep
        return
    mask = placed(np.pad(held, (0, len(keep) - len(held)))[:, None], mesh, PARTS)
    yield from ((0, keep & ~mask), (1, keep & mask))


def add(m: Moments, streams: Sequence[Float[Array, "*rows in"]], keep: Bool[Array, "*rows"]) -> Moments:
    """The moments with the rows added that `keep`: those of the quantized stream and, for the drift, of the float one.

    bf16 and fp16 differences are rounded as the activations are, and exact where neither is twice the other.
    """
    x = streams[0]
    if m.drift is None:
        return Moments(add_rows(m.h, x, keep), None)
    x, exact = (jnp.where(keep[..., None], a, jnp.zeros((), a.dtype)).reshape(-1, a.shape[-1]) for a in streams)
    return Moments(add_rows(m.h, x, keep.reshape(-1)), m.drift + cross(exact - x, x))


def total(moments: Sequence[Moments]) -> Moments:
    """The moments of the rows of all."""
    first, *rest = moments
    for m in rest:
        drift = None if first.drift is None or m.drift is None else first.drift + m.drift
        first = Moments(Hessian(first.h.xx + m.h.xx, first.h.rows + m.h.rows), drift)
    return first


class Aim(NamedTuple):
    """What is solved in the place of some rows of W, and the part `alpha` of the way that was taken.

    `fall` is by how much ||W (X + D) - W' X||^2 falls for each row as W' goes from W to the target; `held_fall` on the rows
    that were held out where W' is fitted to the others, and `held_whole` ||W X||^2 there.
    """

    w: Float[Array, "rows in"]
    alpha: Float[Array, ""]
    fall: Float[Array, " rows"]
    held_fall: Float[Array, " rows"]
    held_whole: Float[Array, " rows"]


def aim_at(
    w: Float[Array, "rows in"], f: Factor, moments: Sequence[Moments], fitted: Factor | None, config: QuantConfig, mesh: Mesh | None = None
) -> Aim:
    """The target of these rows, without moments they themselves; `f` is the factor of all moments, `fitted` that of the first of two.

    A linear that fewer tokens than `config.min_rows` reached keeps its weight. Inside a program of a mesh, where each device has
    other rows of W, all of them choose one alpha.
    """
    none = jnp.zeros(len(w), jnp.float32)
    if not moments:
        return Aim(w, jnp.zeros((), jnp.float32), none, none, none)
    m = total(moments)
    enough = (m.h.rows >= config.min_rows).astype(jnp.float32)
    pulls = [product(w, each.drift) for each in moments if each.drift is not None]
    if config.alpha is None:
        assert fitted is not None
        held, way = moments[1].h, _way(pulls[0], fitted)
        b, c = (pulls[1] * way).sum(-1), energy(way, held.xx)
        alpha = enough * _best(*(a.sum() for a in together((b, c), mesh)))
        held_fall, held_whole = 2 * alpha * b - alpha**2 * c, energy(w, held.xx)
    else:
        alpha, held_fall, held_whole = enough * config.alpha, none, none
    pull = sum(pulls[1:], pulls[0])
    step = alpha * _way(pull, f)
    return Aim(w + step, alpha, 2 * (pull * step).sum(-1) - energy(step, m.h.xx), held_fall, held_whole)


def _way(pull: Float[Array, "rows in"], f: Factor) -> Float[Array, "rows in"]:
    """W C H_d^-1 from W C, by the factor of H_d, which is in processing order."""
    turned = product(product(pull[:, f.order], f.upper.T), f.upper)
    return jnp.zeros_like(turned).at[:, f.order].set(turned, unique_indices=True)


def _best(b: Float[Array, ""], c: Float[Array, ""]) -> Float[Array, ""]:
    """The alpha in [0, 1] at which ||W D - alpha way X||^2 = ||W D||^2 - 2 alpha b + alpha^2 c is least; 0 where it does not matter."""
    return jnp.where(c > 0, jnp.clip(b / jnp.where(c > 0, c, 1.0), 0.0, 1.0), 0.0)
