"""A search of one's own for grids, given as a function: it is told what the others know, and serves wherever a configuration does."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_interop.gptq_format import described_by
from gptq_fn_interop.resume import identity
from gptq_fn_interop.stream import open_source
from tiny import save_tiny_llama

import gptq_fn
from gptq_fn import Grid, QuantConfig, Rule, Runtime, add_rows, dequantize, empty, factor, find_grid, interop, round_to_nearest, solve

W = jax.random.normal(jax.random.key(0), (6, 72))
H = add_rows(empty(72), jax.random.normal(jax.random.key(1), (200, 72)) * jnp.linspace(0.1, 3, 72)[None])


def hid_again(w: jax.Array, weight: jax.Array, config: QuantConfig) -> Grid:
    return find_grid(w, bits=config.bits, sym=config.sym, method="mse", weight=weight, negative=config.either_sign)


def constant(w: jax.Array, weight: jax.Array, config: QuantConfig) -> Grid:
    """Scales that float16 does not hold, and zero points between codes."""
    return Grid(jnp.full(len(w), 0.1), jnp.full(len(w), 4.6))


@pytest.mark.parametrize("place", [{"order": "act"}, {"static_groups": True}, {"group_size": None, "sym": False}])
def test_a_function_is_told_what_the_search_of_that_name_knows(place: dict) -> None:
    config = QuantConfig(**{"bits": 3, "group_size": 48, "grid": "hid", "negative_scales": True, **place})
    named, own = (solve(W, factor(H, c), c) for c in (config, replace(config, grid=hid_again)))
    jax.tree.map(np.testing.assert_array_equal, named, own)


@pytest.mark.parametrize("static", [True, False])
def test_columns_that_fill_up_a_group_cost_nothing_and_no_others_do(static: bool) -> None:
    """The scale is the number of columns that count: 48 in the first group, 24 in the second."""

    def counting(w: jax.Array, weight: jax.Array, config: QuantConfig) -> Grid:
        counted = jnp.where((weight > 0).sum() == (w != 0).any(0).sum(), (weight > 0).sum(), 0)
        return Grid(jnp.full(len(w), counted.astype(jnp.float32)), jnp.zeros(len(w)))

    config = QuantConfig(bits=4, group_size=48, order="natural", static_groups=static, grid=counting)
    for q in (solve(W, factor(H, config), config)[0], round_to_nearest(W, config)):
        np.testing.assert_array_equal(q.scale, np.tile([48.0, 24.0], (6, 1)))


@pytest.mark.parametrize("size", [16, 48])
def test_no_group_is_without_columns(size: int) -> None:
    """Of 72 columns in groups of 16, which are solved in blocks of 128, some groups only fill up the last block."""

    def deviation(w: jax.Array, weight: jax.Array, config: QuantConfig) -> Grid:
        return Grid(jnp.sqrt((w**2).mean(1, where=(weight > 0)[None])) / 2, jnp.full(len(w), 4.0))

    config = QuantConfig(bits=3, group_size=size, order="natural", grid=deviation)
    f = factor(H, config)
    q, objective = solve(W, f, config)
    damped = H.xx + f.damp * jnp.diagonal(H.xx).mean() * jnp.eye(72)
    lost = W - dequantize(q)
    np.testing.assert_allclose(objective, ((lost @ damped) * lost).sum(1), rtol=1e-3)


@pytest.mark.parametrize(("sym", "zero"), [(True, 8), (False, 5)])
def test_grids_are_rounded_to_what_is_stored_before_codes_are_chosen(sym: bool, zero: int) -> None:
    config = QuantConfig(bits=4, group_size=24, sym=sym, grid=constant, order="natural")
    q = round_to_nearest(W, config)
    assert (q.scale == np.float16(0.1)).all()
    assert (q.zero == zero).all()
    expected = np.clip(np.round(np.asarray(W) / np.float32(np.float16(0.1))) + zero, 0, 15)
    np.testing.assert_array_equal(q.codes, expected)
    zeros = QuantConfig(bits=4, grid=lambda w, weight, config: Grid(jnp.zeros(len(w)), jnp.zeros(len(w))))
    assert (round_to_nearest(W, zeros).scale == 1).all()


def test_what_is_no_grid_is_refused() -> None:
    with pytest.raises(ValueError, match=r"6 rows has a scale and a zero point for each, in arrays \[6\]; got one of \[1\]"):
        round_to_nearest(W, QuantConfig(grid=lambda w, weight, config: Grid(jnp.ones(1), jnp.ones(1))))
    with pytest.raises(ValueError, match="minmax, mse, hid, loop, got 'minmin'"):
        QuantConfig(grid="minmin")  # type: ignore[arg-type]


def test_whole_models(tmp_path: Path) -> None:
    """On disk and in memory, for the linears that a rule names; the report and the checkpoint tell the function's name."""
    source = save_tiny_llama(tmp_path / "model", hidden_size=128, intermediate_size=128, num_hidden_layers=1)
    calib = np.random.default_rng(0).integers(0, 300, (4, 64)).astype(np.int32)
    own = QuantConfig(grid=constant)
    config = replace(own, grid="minmax", rules=(Rule(".*mlp", own),))
    report = interop.quantize_checkpoint(source, tmp_path / "q", calib, config, runtime=Runtime())
    params, _ = interop.load_gptq(tmp_path / "q")
    quantized = gptq_fn.quantize(*interop.load_gptq(source), jnp.asarray(calib), config)
    for block, in_memory in zip(params["blocks"], quantized.params["blocks"], strict=True):
        for role in ("gate", "up", "down"):
            assert (block[role].scale == np.float16(0.1)).all()
            np.testing.assert_array_equal(block[role].codes, in_memory[role].codes)
        assert not (block["q"].scale == np.float16(0.1)).any()
    name = f"{__name__}.constant"
    assert json.loads((tmp_path / "q" / "report.json").read_text())["config"]["rules"][0]["config"]["grid"] == name
    assert report.as_dict()["config"]["grid"] == "minmax"
    assert described_by(own, head=False)["meta"]["grid"] == name
    told = [identity(*open_source(source, c), calib, c, Runtime(), 1) for c in (own, replace(own, grid=hid_again))]
    assert [x["config"]["grid"] for x in told] == [name, f"{__name__}.hid_again"]  # a run is not continued with another grid
