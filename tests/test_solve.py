"""The solver against textbook GPTQ in float64, and the laws that hold whatever the numbers."""

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from oracle import Following, gptq, problem, processing_order

from gptq_fn import Hessian, QuantConfig, QuantizedLinear, _factor, _solve, dequantize, factor, round_to_nearest, solve
from gptq_fn._product import product
from gptq_fn.testing import activations, assert_equal_up_to_ties, hessian_of, hessians, weights

# Inputs for each group size: groups narrower and wider than the panel of 128 columns, ragged last groups, one group.
WIDTHS = {16: 72, 32: 160, 48: 200, 128: 300, 256: 300, 1024: 96, None: 200}
SCHEMES = list(itertools.product((2, 3, 4, 8), (True, False), ("minmax", "mse", "hid", "loop"), (False, True)))
PLACES = list(itertools.product(WIDTHS, ("natural", "act", "group"), (False, True)))


def allowed(scheme: tuple, place: tuple) -> bool:
    """Whether a QuantConfig may have these options, and each of them counts."""
    (_, sym, search, negative), (_, _, static) = scheme, place
    return (sym and search != "minmax" if negative else True) and not (search == "loop" and static)


def pairs(options: tuple) -> set:
    return set(itertools.combinations(enumerate(options), 2))


def covering() -> list[tuple]:
    """For each place the scheme that brings together most options that no place before did."""
    chosen, seen = [], set()
    for place in PLACES:
        chosen.append(max(((*s, *place) for s in SCHEMES if allowed(s, place)), key=lambda options: len(pairs(options) - seen)))
        seen |= pairs(chosen[-1])
    return chosen


OPTIONS = covering()
GRID = [
    QuantConfig(bits, group_size, sym, order=order, static_groups=static, grid=search, negative_scales=negative)
    for bits, sym, search, negative, group_size, order, static in OPTIONS
]

OUT, IN = 8, 72
"""The shape on which all laws are tried, so that each configuration is compiled once."""
LAWS = [
    QuantConfig(4, 16, sym=False, order="group", grid="mse"),
    QuantConfig(3, 32, sym=True, order="act", grid="loop", negative_scales=True),
    QuantConfig(4, None, sym=True, order="act", grid="hid"),
    QuantConfig(2, 16, sym=False, order="natural", static_groups=True, grid="minmax"),
]


def name(c: QuantConfig) -> str:
    grid = f"{c.grid}{'-negative' * c.negative_scales}"
    return f"{c.bits}bit-{'sym' if c.sym else 'asym'}-{grid}-{c.group_size}-{c.order}{'-static' * c.static_groups}"


laws = pytest.mark.parametrize("config", LAWS, ids=name)


def damp_of(h: Hessian, config: QuantConfig) -> float:
    """The damping that is asked for: by default, inputs over rows."""
    return min(1.0, max(0.01, len(h.xx) / int(h.rows))) if config.damp is None else config.damp


def assert_textbook(q: QuantizedLinear, w: jnp.ndarray, h: Hessian, config: QuantConfig, damp: float | None = None) -> np.ndarray:
    """Raise unless textbook GPTQ could have given `q`; returns the objective of each row."""
    assert q.problems() == ()
    follow = Following(config, q, slack=2e-6 * 2**config.bits)
    exact = gptq(problem(np.asarray(w), np.asarray(h.xx), config, damp_of(h, config) if damp is None else damp), follow)
    np.testing.assert_array_equal(q.group_of, exact.group_of)
    assert exact.strayed <= 0.01 * q.codes.size
    return exact.objective


def test_the_option_grid_holds_every_pair_of_options():
    assert set().union(*map(pairs, OPTIONS)) == set().union(*(pairs((*s, *p)) for s in SCHEMES for p in PLACES if allowed(s, p)))


@pytest.mark.parametrize("config", GRID, ids=name)
@settings(max_examples=3, phases=(Phase.explicit, Phase.reuse, Phase.generate))  # shrinking would take minutes
@given(data=st.data())
def test_solve_is_textbook_gptq(config, data):
    inputs = WIDTHS[config.group_size]
    w, h = data.draw(weights(OUT, inputs)), data.draw(hessians(inputs))
    f = factor(h, config)
    assert list(f.order) == processing_order(np.diag(h.xx), config)
    q, objective = solve(w, f, config)
    exact = assert_textbook(q, w, h, config)
    start = problem(np.asarray(w), np.asarray(h.xx), config, damp_of(h, config))
    size = np.sqrt(np.einsum("oi,ij,oj->o", start.w, start.h, start.w))  # float32 rounds w, and so w - q
    assert (np.abs(np.sqrt(objective) - np.sqrt(exact)) <= 2e-6 * size).all()


@laws
@given(data=st.data())
def test_without_correlation_gptq_is_rounding(config, data):
    w = data.draw(weights(OUT, IN))
    spread = data.draw(st.booleans()) and config.grid in ("minmax", "mse") and (config.order != "act" or config.static_groups)
    diagonal = np.exp(np.random.default_rng(0).normal(size=IN)) if spread else np.ones(IN)  # act-order regroups unequal inputs
    h = Hessian(jnp.asarray(np.diag(diagonal), jnp.float32), jnp.asarray(1, jnp.int32))
    assert_equal_up_to_ties(solve(w, factor(h, config), config)[0], round_to_nearest(w, config), w)


@laws
@given(w=weights(OUT, IN), h=hessians(IN), power=st.integers(-20, 20), c=st.floats(0.001, 1000))
def test_the_unit_of_the_hessian_does_not_matter(config, w, h, power, c):
    def solved(unit: float) -> QuantizedLinear:
        return solve(w, factor(Hessian(h.xx * jnp.float32(unit), h.rows), config), config)[0]

    assert_same(solved(1.0), solved(2.0**power))
    assert_textbook(solved(c), w, h, config)


@laws
@given(w=weights(OUT, IN), other=weights(OUT, IN), h=hessians(IN), seed=st.integers(0, 1000))
def test_rows_are_independent(config, w, other, h, seed):
    rng = np.random.default_rng(seed)
    f = factor(h, config)
    alone, order, kept = solve(w, f, config)[0], rng.permutation(OUT), rng.random(OUT) < 0.5
    mixed = solve(jnp.where(kept[:, None], w, other)[order], f, config)[0]
    for a, b in ((mixed.codes, alone.codes), (mixed.scale, alone.scale), (mixed.zero, alone.zero)):
        np.testing.assert_array_equal(a[kept[order]], b[order][kept[order]])


@laws
@given(w=weights(OUT, IN), x=activations(2 * IN, IN), dead=st.lists(st.integers(0, IN - 1), min_size=1, unique=True))
def test_dead_columns_become_zero(config, w, x, dead):
    h = hessian_of(x.at[:, jnp.asarray(dead)].set(0.0))
    f = factor(h, config)
    q, objective = solve(w, f, config)
    assert set(dead) <= set(np.flatnonzero(f.dead))
    assert not np.asarray(dequantize(q))[:, np.asarray(f.dead)].any()
    assert jnp.isfinite(objective).all()
    alive = solve(w.at[:, jnp.asarray(dead)].set(123.0), f, config)[0]
    assert_same(q, alive)


@pytest.mark.parametrize("config", [c for c in LAWS if c.order == "act"], ids=name)
@given(w=weights(OUT, IN), x=activations(2 * IN, IN, whole=True), seed=st.integers(0, 1000))
def test_act_order_commutes_with_a_permutation_of_the_inputs(config, w, x, seed):
    permutation = np.random.default_rng(seed).permutation(IN)
    h = hessian_of(x)
    diagonal = np.diag(h.xx)
    by_size = np.argsort(-diagonal[permutation], kind="stable")
    if (permutation[by_size] != np.argsort(-diagonal, kind="stable")).any():
        return  # equal diagonals are taken in the order in which they are stored
    stored = solve(w, factor(h, config), config)[0]
    moved = solve(w[:, permutation], factor(hessian_of(x[:, permutation]), config), config)[0]
    assert_same(moved, QuantizedLinear(stored.codes[:, permutation], stored.scale, stored.zero, stored.group_of[permutation], stored.bits))


@laws
def test_the_loss_is_less_than_that_of_rounding(config):
    ours, rounding = [], []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        w = jnp.asarray(rng.normal(size=(OUT, IN)), jnp.float32)
        x = jnp.asarray(rng.normal(size=(2 * IN, IN)) + rng.normal(size=(2 * IN, 4)) @ rng.normal(size=(4, IN)), jnp.float32)
        h = hessian_of(x)
        for losses, q in ((ours, solve(w, factor(h, config), config)[0]), (rounding, round_to_nearest(w, config))):
            losses.append(float(jnp.square((w - dequantize(q)) @ x.T).sum()))
    assert np.mean(ours) < 0.7 * np.mean(rounding)


@given(x=activations(2 * IN, IN), config=st.sampled_from(LAWS))
def test_the_factor_inverts_the_damped_hessian(x, config):
    h = hessian_of(x)
    f = factor(h, config)
    u, order = np.asarray(f.upper, np.float64), np.asarray(f.order)
    damped = problem(np.zeros((1, IN)), np.asarray(h.xx), config, damp_of(h, config)).h[np.ix_(order, order)]
    np.testing.assert_array_equal(u, np.triu(u))
    np.testing.assert_allclose(u @ damped @ u.T, np.eye(IN), atol=1e-3)
    assert float(f.damp) == np.float32(damp_of(h, config))


@pytest.mark.parametrize("n", [1, 7, 64, 100])
def test_wide_matrices_are_factorized_by_halves(n, monkeypatch):
    """As exactly as by Cholesky and substitution, however badly conditioned."""
    monkeypatch.setattr(_factor, "_BASE", 8)
    rng = np.random.default_rng(n)
    x = rng.normal(size=(2 * n, n)) * 10.0 ** rng.uniform(-3, 3, n) + 10 * rng.normal(size=(2 * n, 1))
    a = x.T @ x
    a = (a + 1e-5 * np.diag(np.diag(a))).astype(np.float32)
    exact = np.linalg.inv(np.linalg.cholesky(a.astype(np.float64)))
    ours = _factor._inverse_root(jnp.tril(jnp.asarray(a)), product)
    by_substitution = jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(jnp.asarray(a)), jnp.eye(n), lower=True)
    found, usual = (np.abs(u - exact).max() / np.abs(exact).max() for u in (ours, by_substitution))
    assert found <= 4 * max(usual, np.finfo(np.float32).eps)
    np.testing.assert_array_equal(np.triu(ours, 1), 0)


def test_asymmetric_grids_keep_positive_scales():
    rng = np.random.default_rng(0)
    w, h = jnp.asarray(rng.normal(size=(OUT, IN)), jnp.float32), hessian_of(jnp.asarray(rng.normal(size=(2 * IN, IN)), jnp.float32))
    config = QuantConfig(4, 16, sym=False, grid="hid", negative_scales=True)
    f = factor(h, config)
    q, usual = (solve(w, f, c)[0] for c in (config, replace(config, negative_scales=False)))
    np.testing.assert_array_equal(q.codes, usual.codes)
    assert (q.scale > 0).all()


def test_what_is_not_positive_is_not_factorized(monkeypatch):
    monkeypatch.setattr(_factor, "_BASE", 8)
    a = np.eye(40, dtype=np.float32)
    a[30, 30] = -1
    assert not jnp.isfinite(_factor._inverse_root(jnp.asarray(a), product)).all()


@pytest.mark.parametrize("config", [QuantConfig(4, 16, sym=False), QuantConfig(3, None, order="act")], ids=name)
def test_wide_weights_are_solved_by_halves(config, monkeypatch):
    monkeypatch.setattr(_solve, "_LEAF", 128)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(OUT, 440)), jnp.float32)
    h = hessian_of(jnp.asarray(rng.normal(size=(900, 440)) + rng.normal(size=(900, 4)) @ rng.normal(size=(4, 440)), jnp.float32))
    assert_textbook(solve(w, factor(h, config), config)[0], w, h, config)  # no other test compiles this shape


@given(w=weights(OUT, IN), x=activations(IN // 3, IN))
@settings(max_examples=5)
def test_damping_is_raised_until_the_factor_exists(w, x):
    config = QuantConfig(4, 16, sym=False, damp=0.0)
    h = hessian_of(x)
    f = factor(h, config)
    assert np.float32(0.01) <= float(f.damp) <= 1
    assert jnp.isfinite(f.upper).all()
    assert_textbook(solve(w, f, config)[0], w, h, config, damp=float(f.damp))


def test_inputs_that_were_all_zero_give_zero_weights():
    config = LAWS[0]
    h = Hessian(jnp.zeros((IN, IN)), jnp.asarray(5, jnp.int32))
    f = factor(h, config)
    assert float(f.damp) == np.float32(damp_of(h, config))
    assert f.dead.all()
    assert not dequantize(solve(jnp.ones((OUT, IN)), f, config)[0]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("where", [(3, 5), (3, 3), (slice(None), slice(None))], ids=["one", "diagonal", "all"])
def test_a_hessian_that_is_not_finite_has_no_damping(value, where):
    xx = jnp.eye(IN).at[where].set(value)
    assert np.isnan(factor(Hessian(jnp.maximum(xx, xx.T), jnp.asarray(1, jnp.int32)), LAWS[0]).damp)


def test_weights_in_half_precision_are_solved_in_float32():
    w = jnp.asarray(np.random.default_rng(0).normal(size=(OUT, IN)), jnp.bfloat16)
    h = hessian_of(jnp.asarray(np.random.default_rng(1).normal(size=(2 * IN, IN)), jnp.float32))
    f = factor(h, LAWS[0])
    assert_same(solve(w, f, LAWS[0])[0], solve(w.astype(jnp.float32), f, LAWS[0])[0])


def assert_same(a: QuantizedLinear, b: QuantizedLinear) -> None:
    for field in ("codes", "scale", "zero", "group_of"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field), field)


@pytest.mark.parametrize("config", [QuantConfig(3, 16, grid="loop", negative_scales=True), QuantConfig(4, None, grid="hid")], ids=name)
def test_factors_tried_at_once_as_on_gpus_choose_what_those_one_by_one_do(config, monkeypatch):
    """Also under vmap, as experts are solved."""
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(2, OUT, IN)), jnp.float32)
    h = hessian_of(jnp.asarray(rng.normal(size=(200, IN)) + rng.normal(size=(200, 1)), jnp.float32))

    def solved() -> tuple[QuantizedLinear, jax.Array]:
        jax.clear_caches()  # of programs for the other kind of device
        return jax.vmap(lambda one: solve(one, factor(h, config), config))(w)

    def default(*args: jax.Array, cpu: Any, default: Any) -> Any:
        asked.append(cpu)
        return default(*args)

    one_by_one, asked = solved(), []
    monkeypatch.setattr(jax.lax, "platform_dependent", default)
    at_once = solved()
    assert asked
    np.testing.assert_array_equal(at_once[0].scale, one_by_one[0].scale)
    np.testing.assert_array_equal(at_once[0].codes, one_by_one[0].codes)
