"""Uniform grids: what lies on them, how far from them a weight can be, and which one is chosen."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import Entered, cost, factors, grid

import gptq_fn
from gptq_fn import Grid, QuantConfig, decode, dequantize, find_grid, round_to_nearest
from gptq_fn.testing import weights

OUT, WIDTH = 8, 24
SCHEMES = [(bits, sym) for bits in (2, 3, 4, 8) for sym in (True, False)]
schemes = pytest.mark.parametrize(("bits", "sym"), SCHEMES)
find = partial(jax.jit, static_argnames=("bits", "sym", "method", "negative"))(find_grid)
encode = partial(jax.jit, static_argnames="bits")(gptq_fn.encode)


def round_trip(w: jnp.ndarray, grid: Grid, bits: int) -> np.ndarray:
    return np.asarray(decode(encode(w, grid, bits), grid), np.float64)


@schemes
@given(w=weights(OUT, WIDTH), seed=st.integers(0, 1000))
def test_every_level_is_its_own_code(bits, sym, w, seed):
    grid = find(w, bits=bits, sym=sym, method="mse")
    codes = np.random.default_rng(seed).integers(0, 2**bits, (OUT, WIDTH)).astype(np.float32)
    np.testing.assert_array_equal(encode(decode(jnp.asarray(codes), grid), grid, bits), codes)


@schemes
@given(w=weights(OUT, WIDTH), beyond=st.floats(1, 2))
def test_weights_in_range_move_by_half_a_step_at_most(bits, sym, w, beyond):
    grid = find(w, bits=bits, sym=sym, method="minmax")
    scale, zero = (np.asarray(a, np.float64)[:, None] for a in grid)
    low, high = scale * (0 - zero), scale * (2**bits - 1 - zero)
    wild = beyond * np.asarray(w, np.float64)
    inside = np.clip(wild, low, high)
    assert (np.abs(round_trip(jnp.asarray(inside, jnp.float32), grid, bits) - inside) <= scale / 2 * (1 + 1e-5)).all()
    codes = np.asarray(encode(jnp.asarray(wild, jnp.float32), grid, bits))
    assert (codes[wild > high] == 2**bits - 1).all()
    assert (codes[wild < low] == 0).all()


@schemes
@given(w=weights(OUT, WIDTH))
def test_minmax_covers_the_weights_but_for_the_rounding_of_its_scale(bits, sym, w):
    grid = find(w, bits=bits, sym=sym, method="minmax")
    exact, top = np.asarray(w, np.float64), 2**bits - 1
    low, high = np.minimum(exact.min(1), 0), np.maximum(exact.max(1), 0)
    reach = 2 * np.maximum(-low, high) if sym else high - low
    scale = np.asarray(grid.scale, np.float64)
    lost = np.where(reach > 0, np.abs(reach - top * scale), 0)  # a checkpoint stores the scale in float16
    assert (np.abs(round_trip(w, grid, bits) - exact) <= (scale / 2 + lost)[:, None] * (1 + 1e-5)).all()


@schemes
@given(w=weights(OUT, WIDTH))
def test_the_search_is_never_worse_than_the_range(bits, sym, w):
    def error(method: str) -> np.ndarray:
        return ((round_trip(w, find(w, bits=bits, sym=sym, method=method), bits) - np.asarray(w, np.float64)) ** 2).sum(1)

    assert (error("mse") <= error("minmax") * (1 + 1e-5)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_the_range_in_which_all_weights_but_one_are_levels(bits):
    """One row for each factor of the search, from 1 down to 0.4 in steps of 0.04."""
    scale = (2 * np.linspace(1, 0.4, 16) / (2**bits - 1)).astype(np.float16)
    codes = np.tile(np.arange(2**bits), 400)
    w = scale[:, None] * (codes - 2 ** (bits - 1)) * (codes > 0)  # the lowest level may lie beyond the largest weight
    assert (np.abs(w) < 1).all()
    w[:, 0] = 1
    np.testing.assert_array_equal(find(jnp.asarray(w, jnp.float32), bits=bits, sym=True, method="mse").scale, scale)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_is_better_for_normal_weights(bits):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 128)), jnp.float32)
    errors = {m: ((round_trip(w, find(w, bits=bits, sym=True, method=m), bits) - w) ** 2).sum() for m in ("minmax", "mse")}
    assert errors["mse"] < 0.9 * errors["minmax"]


@schemes
@pytest.mark.parametrize("method", ["minmax", "mse"])
@given(w=weights(OUT, WIDTH))
def test_a_grid_holds_zero_and_fits_a_checkpoint(bits, sym, method, w):
    scale, zero = find(w, bits=bits, sym=sym, method=method)
    assert (scale > 0).all()
    assert jnp.isfinite(scale).all()
    np.testing.assert_array_equal(scale, scale.astype(jnp.float16).astype(jnp.float32))
    np.testing.assert_array_equal(zero, jnp.clip(jnp.round(zero), 0, 2**bits - 1))
    assert not round_trip(jnp.zeros_like(w), Grid(scale, zero), bits).any()
    if sym:
        assert (zero == 2 ** (bits - 1)).all()


@schemes
@pytest.mark.parametrize("method", ["minmax", "mse"])
@given(w=weights(OUT, WIDTH - 8))
def test_zeros_at_the_end_of_a_row_do_not_change_its_grid(bits, sym, method, w):
    for found, expected in zip(*(find(v, bits=bits, sym=sym, method=method) for v in (jnp.pad(w, ((0, 0), (0, 8))), w)), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("method", "sign"), [("minmax", 1), ("minmax", -1), ("mse", 1)])
@given(w=weights(OUT, WIDTH), power=st.integers(-3, 10))
def test_a_symmetric_grid_has_the_unit_of_the_weights(method, sign, w, power):
    """No rounding notices a power of two, as long as the scale stays a normal number of float16."""
    w = jnp.where(jnp.abs(w).max(1, keepdims=True) < 0.01, 1.0, w)
    unit = sign * 2.0**power
    scale, other = (find(v, bits=4, sym=True, method=method).scale for v in (w, unit * w))
    np.testing.assert_array_equal(scale * 2.0**power, other)


@pytest.mark.parametrize(("bits", "sym", "negative"), [(2, True, True), (3, True, False), (4, True, True), (4, False, False)])
@given(w=weights(OUT, WIDTH), seed=st.integers(0, 1000))
def test_the_search_is_that_of_float64_with_each_column_weighted(bits, sym, negative, w, seed):
    weight = np.exp(2 * np.random.default_rng(seed).normal(size=WIDTH)).astype(np.float32)
    found = find(w, bits=bits, sym=sym, method="mse", weight=jnp.asarray(weight), negative=negative)
    config, exact = QuantConfig(bits, sym=sym, grid="hid", negative_scales=negative), np.asarray(w, np.float64)
    entered = Entered(exact, np.eye(WIDTH), 1 / weight.astype(np.float64))
    least = np.min([cost(*grid(exact, config, factor), entered, config) for factor in factors(config)], axis=0)
    scale, zero = (np.asarray(a, np.float64) for a in found)
    assert (cost(scale, zero, entered, config) <= least * (1 + 1e-4) + 1e-6 * scale**2 * weight.sum()).all()


@pytest.mark.parametrize("negative", [False, True])
@given(w=weights(OUT, WIDTH), power=st.integers(-20, 20))
def test_equal_weights_change_nothing(negative, w, power):
    weighted = find(w, bits=4, sym=True, method="mse", weight=jnp.full(WIDTH, 2.0**power), negative=negative)
    for a, b in zip(weighted, find(w, bits=4, sym=True, method="mse", negative=negative), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("bits", [2, 3, 4])
@given(seed=st.integers(0, 1000))
def test_the_sign_of_weights_turns_the_sign_of_scales(bits, seed):
    """Rows whose values lie on all levels, the one without an opposite among them, take the sign that covers it."""
    rng, top = np.random.default_rng(seed), 2 ** (bits - 1)
    levels = np.stack([np.concatenate([np.arange(-top, top), rng.integers(-top, top, WIDTH)]) for _ in range(OUT)])
    scale = rng.uniform(0.1, 1, (OUT, 1))
    w = jnp.asarray(np.concatenate([levels * scale, -levels * scale]), jnp.float32)
    found = find(w, bits=bits, sym=True, method="mse", negative=True)
    assert (found.scale[:OUT] > 0).all()
    assert (found.scale[OUT:] < 0).all()
    np.testing.assert_array_equal(found.scale[OUT:], -found.scale[:OUT])
    codes = encode(w, found, bits)
    np.testing.assert_array_equal(codes[OUT:], codes[:OUT])


@pytest.mark.parametrize("group_size", [16, 10, None])
@given(w=weights(OUT, WIDTH))
def test_rounding_finds_the_nearest_level_of_each_group(group_size, w):
    config = QuantConfig(3, group_size, sym=False, grid="minmax")
    q = round_to_nearest(w, config)
    assert q.problems() == ()
    np.testing.assert_array_equal(q.group_of, np.arange(WIDTH) // (group_size or WIDTH))
    group, exact = np.asarray(q.group_of), np.asarray(w, np.float64)
    scale, zero = (np.asarray(a, np.float64)[:, group, None] for a in (q.scale, q.zero))
    levels = scale * (np.arange(8) - zero)
    nearest = np.abs(levels - exact[:, :, None]).min(-1)
    assert (np.abs(np.asarray(dequantize(q), np.float64) - exact) <= nearest + 1e-5 * scale[:, :, 0]).all()
