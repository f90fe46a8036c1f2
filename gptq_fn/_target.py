"""The asymmetric target: a linear makes good what rounding before it changed in its inputs.

The idea is GPTAQ's (Li et al. 2025, arXiv 2504.02692), here made partial. Beside the quantized stream, of which rows x enter a
linear, runs the float stream, in which x + d would. Of the weights that compute from x what W computes from x + d, that of least
squared error under the damped Hessian H_d = sum x x^T + damping is W + W C H_d^-1, with C = sum d x^T; the target goes the part
alpha of this way. Where alpha is not given, it is the best one for samples that were held out.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from gptq_fn._config import QuantConfig
from gptq_fn._factor import Factor, damped_diagonal
from gptq_fn._hessian import Hessian, add_rows, cross, empty
from gptq_fn._mesh import PARTS, part, placed, size, together
from gptq_fn._product import energy, nearly, roughly

HELD_OUT = 8
"""Of so many samples with a float stream one, from the first on, is held out where alpha is chosen."""

TOKENS_A_FEATURE, FEWEST = 8, 2 * HELD_OUT
"""With how many tokens for each feature of the model, and at least how many samples, the float stream goes along. What they tell of
the differences is enough; the Hessian needs all."""

FITTED, HELD, ALONE = range(3)
"""Shares of the samples: those to which the target is fitted, those held out, and those without a float stream."""


class Moments(NamedTuple):
    """Sums over rows x that enter a linear and, where the float stream is needed, x + d that do there. A monoid, as Hessians are."""

    h: Hessian
    drift: Float[Array, "in in"] | None
    """The sum of d x^T, in float32."""


def shares(lengths: Sequence[int], width: int) -> tuple[int, ...]:
    """The share of each sample of these lengths, evenly spread, where the model has `width` features."""
    count, wanted = len(lengths), len(lengths) * TOKENS_A_FEATURE * width / sum(lengths)
    beside = min(count, max(FEWEST, int(np.ceil(wanted))))
    found, chosen = np.full(count, ALONE), np.arange(beside) * count // beside
    found[chosen] = FITTED
    found[chosen[::HELD_OUT]] = HELD
    return tuple(found.tolist())


def no_rows(width: int, configs: Collection[QuantConfig]) -> tuple[Moments, ...]:
    """What linears of these configurations need, of no rows: the moments of all, or those of each share."""

    def none(*, beside: bool) -> Moments:
        return Moments(empty(width), jnp.zeros((width, width), jnp.float32) if beside else None)

    if all(config.alpha == 0 for config in configs):
        return (none(beside=False),)
    return none(beside=True), none(beside=True), none(beside=False)


def rows_of(keep: Bool[Array, "batch time"], share: Sequence[int], moments: int, mesh: Mesh | None) -> Iterator[tuple[int, Array]]:
    """Which tokens of a batch, whose samples have these shares, belong to each of so many moments, by its number; not where none do."""
    found = sorted(set(share)) if moments > 1 else [0]
    if len(found) == 1:
        yield found[0], keep
        return
    of_rows = np.pad(np.asarray(share), (0, len(keep) - len(share)), constant_values=-1)
    yield from ((mine, keep & placed((of_rows == mine)[:, None], mesh, PARTS)) for mine in found)


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

    `fall` is by how much ||W (X + D) - W' X||^2 falls for each row as W' goes from W to the target: on the tokens that the way was
    fitted to, times all tokens for each of them. `held_fall` is the same on those held out, and `held_whole` ||W X||^2 there.
    """

    w: Float[Array, "rows in"]
    alpha: Float[Array, ""]
    fall: Float[Array, " rows"]
    held_fall: Float[Array, " rows"]
    held_whole: Float[Array, " rows"]


def fitted_to(moments: Sequence[Moments], config: QuantConfig) -> Moments:
    """The moments, of those of all shares, that the way to the target is fitted to: where alpha is given, nothing is held out."""
    return moments[FITTED] if config.alpha is None else total(moments[:ALONE])


def aim_at(
    w: Float[Array, "rows in"], moments: Sequence[Moments], fitted: Factor | None, config: QuantConfig, mesh: Mesh | None = None
) -> Aim:
    """The target of these rows, without moments they themselves; `fitted` is the factor of what it is fitted to, see `fitted_to`.

    A linear that fewer tokens than `config.min_rows` reached keeps its weight. Inside a program of a mesh, where each device has
    other rows of W, all of them choose one alpha.
    """
    none = jnp.zeros(len(w), jnp.float32)
    if not moments or fitted is None:
        return Aim(w, jnp.zeros((), jnp.float32), none, none, none)
    m, held = fitted_to(moments, config), moments[HELD]
    assert m.drift is not None
    assert held.drift is not None
    way = _way(w, m.drift, fitted, mesh)
    enough = (m.h.rows >= config.min_rows).astype(jnp.float32)
    if config.alpha is None:
        b, c = (roughly(w, held.drift) * way).sum(-1), energy(way, held.h.xx)
        alpha = enough * _best(*(a.sum() for a in together((b, c), mesh)))
        held_fall, held_whole = 2 * alpha * b - alpha**2 * c, energy(w, held.h.xx)
    else:
        alpha, held_fall, held_whole = enough * config.alpha, none, none
    # Under the damped Hessian, way H_d way^T is W C way^T.
    diagonal, length = jnp.diagonal(m.h.xx), energy(way, m.h.xx)
    gain = length + ((damped_diagonal(diagonal, fitted.damp) - diagonal)[None] * way**2).sum(-1)
    each = sum(share.h.rows for share in moments) / jnp.maximum(m.h.rows, 1)
    return Aim(w + alpha * way, alpha, each * (2 * alpha * gain - alpha**2 * length), held_fall, held_whole)


def _way(w: Float[Array, "rows in"], drift: Float[Array, "in in"], f: Factor, mesh: Mesh | None) -> Float[Array, "rows in"]:
    """W C H_d^-1, by the factor of H_d; where rows are more than inputs, C H_d^-1 is computed first."""

    def made_good(c: Float[Array, "n in"]) -> Float[Array, "n in"]:
        turned = nearly(nearly(c[:, f.order], f.upper.T), f.upper)
        return jnp.zeros_like(turned).at[:, f.order].set(turned, unique_indices=True)

    if len(w) * size(mesh) > len(drift):
        return nearly(w, together(made_good(part(drift, mesh)), mesh)[: len(drift)])
    return made_good(nearly(w, drift))


def _best(b: Float[Array, ""], c: Float[Array, ""]) -> Float[Array, ""]:
    """The alpha in [0, 1] at which ||W D - alpha way X||^2 = ||W D||^2 - 2 alpha b + alpha^2 c is least; 0 where it does not matter."""
    return jnp.where(c > 0, jnp.clip(b / jnp.where(c > 0, c, 1.0), 0.0, 1.0), 0.0)
