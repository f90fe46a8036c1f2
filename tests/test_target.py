"""The asymmetric target: least squares against the float model's outputs, and a run that carries both streams."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptq_fn_interop.activations import on_disk
from gptq_fn_interop.stream import quantize_checkpoint
from gptq_fn_interop.sweep import sweep
from gptq_fn_interop.traced import quantize_traced
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Following, gptq, problem
from test_experts import EXPERTS, state_at
from test_experts import HIDDEN as EXPERT_HIDDEN
from test_experts import model as experts_model
from test_experts import random_params as experts_params
from test_quantize import PARALLEL, VOCAB, floats, model, names, random_params, run
from tiny import save_tiny_llama

from gptq_fn import (
    Hessian,
    QuantConfig,
    Rule,
    Runtime,
    Store,
    dequantize,
    embed_batches,
    factor,
    quantize,
    quantize_blocks,
    quantize_linears,
)
from gptq_fn._target import (
    ALONE,
    FITTED,
    HELD,
    HELD_OUT,
    TOKENS_A_FEATURE,
    Moments,
    add,
    aim_at,
    fitted_to,
    no_rows,
    rows_of,
    shares,
    total,
)
from gptq_fn.testing import activations, weights

OUT, IN, SAMPLES, TIME = 6, 16, 5, 12
FIXED, CHOSEN = QuantConfig(alpha=0.7), QuantConfig(alpha=None)
streams = st.tuples(activations(SAMPLES * TIME, IN), activations(SAMPLES * TIME, IN, dead=False)).map(
    lambda both: (both[0].reshape(SAMPLES, TIME, IN), (both[0] + 0.2 * both[1]).reshape(SAMPLES, TIME, IN))
)
KEEP = jnp.ones((SAMPLES, TIME), bool)


SHARES = (HELD, FITTED, FITTED, FITTED, ALONE)


def moments(config: QuantConfig, xs: Any, keep: Any = KEEP, share: tuple[int, ...] = SHARES) -> tuple[Moments, ...]:
    """Of samples with these shares."""
    found = list(no_rows(xs[0].shape[-1], [config]))
    for n, mine in rows_of(keep, share, len(found), None):
        found[n] = add(found[n], xs, mine)
    return tuple(found)


def aimed(w: Any, config: QuantConfig, m: tuple[Moments, ...]) -> Any:
    return aim_at(w, m, factor(fitted_to(m, config).h, config), config)


def test_shares_of_samples():
    """Where tokens abound, as many samples as give 8 tokens a feature go along, evenly spread, and every eighth of them is held out."""
    found = shares([100] * 640, 400)
    assert TOKENS_A_FEATURE * 400 == 32 * 100
    assert [n for n, share in enumerate(found) if share != ALONE] == list(range(0, 640, 20))
    assert [n for n, share in enumerate(found) if share == HELD] == list(range(0, 640, 160))
    assert shares([100] * 640, 1).count(ALONE) == 640 - 16
    assert shares([7, 30, 2], 200) == (HELD, FITTED, FITTED)
    assert shares([100] * 9, 4000) == (HELD, *[FITTED] * 7, HELD)


def damped(x: np.ndarray) -> np.ndarray:
    """H_d, as `factor` has it without `damp`."""
    h = x.T @ x
    live = np.diag(h) > 0
    mean = np.diag(h)[live].mean() if live.any() else 1.0
    return h + np.diag(np.where(live, 0, mean) + mean * min(1, max(0.01, len(h) / len(x))))


def way(w: Any, x: Any, exact: Any) -> np.ndarray:
    """From W to the W' of least ||W X_float - W' X||^2 + ||W' - W||^2 under the damping, in float64."""
    w, x, exact = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (w, x, exact))
    return np.linalg.solve(damped(x), x.T @ (exact - x) @ w.T).T


def off(w: Any, target: Any, x: Any, exact: Any) -> np.ndarray:
    """||W X_float - W' X||^2 of each row, in float64."""
    w, target, x, exact = (np.asarray(a, np.float64).reshape(-1, a.shape[-1]) for a in (w, target, x, exact))
    return np.square(w @ exact.T - target @ x.T).sum(1)


def close(found: Any, expected: np.ndarray, tolerance: float = 2e-3) -> None:
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(np.abs(expected).max(), 1e-6))


def stepped(found: Any, w: Any, step: np.ndarray) -> None:
    """`found` is w + step, but for what float32 loses of the step and of the sum."""
    atol = 2e-3 * np.abs(step).max() + 1e-6 * float(jnp.abs(w).max())
    np.testing.assert_allclose(found, np.asarray(w, np.float64) + step, rtol=0, atol=atol)


@given(w=weights(OUT, IN), xs=streams, order=st.sampled_from(("natural", "act", "group")), alpha=st.sampled_from((0.3, 1.0)))
def test_the_target_is_damped_least_squares(w, xs, order, alpha):
    config = QuantConfig(group_size=4, order=order, alpha=alpha)
    found = aimed(w, config, moments(config, xs))
    xs = [x[:-1] for x in xs]  # the last sample goes alone
    stepped(found.w, w, alpha * way(w, *xs))
    close(found.fall * 4 / 5, off(w, w, *xs) - off(w, np.asarray(found.w, np.float64), *xs), 1e-2)
    if alpha == 1:  # where the gradient of the least squares with damping is zero
        x, exact, target, flat = (np.asarray(a, np.float64).reshape(-1, IN) for a in (*xs, found.w, w))
        drawn = flat @ (exact.T @ x + damped(x) - x.T @ x)
        close(target @ damped(x), drawn)


@given(w=weights(OUT, IN), xs=streams)
def test_it_is_linear_in_alpha_and_stays_where_both_streams_are_the_same(w, xs):
    m = moments(FIXED, xs)
    half, full = (aimed(w, replace(FIXED, alpha=alpha), m).w - w for alpha in (0.5, 1.0))
    np.testing.assert_allclose(2 * half, full, rtol=0, atol=1e-5 * float(jnp.abs(w).max()))
    same = aimed(w, replace(FIXED, alpha=1.0), moments(FIXED, (xs[0], xs[0])))
    np.testing.assert_array_equal(same.w, w)
    np.testing.assert_array_equal(same.fall, np.zeros(OUT))


@pytest.mark.parametrize("out", [OUT, 3 * IN])  # fewer rows than inputs, and more
def test_both_orders_of_the_products_are_the_same_target(out):
    keys = jax.random.split(jax.random.key(0), 3)
    w, x, d = (jax.random.normal(key, shape) for key, shape in zip(keys, [(out, IN), *2 * [(SAMPLES, TIME, IN)]], strict=True))
    exact = x + 0.2 * d
    stepped(aimed(w, FIXED, moments(FIXED, (x, exact))).w, w, 0.7 * way(w, x[:-1], exact[:-1]))


@given(w=weights(OUT, IN), xs=streams, late=st.sampled_from((0.0, 0.3, 1.0)))
def test_alpha_is_the_best_for_held_out_samples(w, xs, late):
    """Samples 0 and 8 are held out; in them another part of the difference comes through."""
    x, exact = (jnp.concatenate([a, a[::-1]]) for a in xs)
    held = np.arange(len(x)) % HELD_OUT == 0
    exact = jnp.where(held[:, None, None], x + late * (exact - x), exact)
    share = tuple(HELD if each else FITTED for each in held)
    alone = [jnp.concatenate([a, 3 * xs[n]]) for n, a in enumerate((x, exact))]  # what goes alone has no part in the target
    found = aimed(w, CHOSEN, moments(CHOSEN, alone, jnp.ones(alone[0].shape[:2], bool), (*share, *SAMPLES * [ALONE])))
    step = way(w, x[~held], exact[~held])
    losses = [off(w, np.asarray(w) + alpha * step, x[held], exact[held]).sum() for alpha in np.linspace(0, 1, 101)]
    flat = max(losses) - min(losses) <= 1e-3 * max(losses)
    assert flat or abs(float(found.alpha) - np.argmin(losses) / 100) < 0.02
    stepped(found.w, w, float(found.alpha) * step)
    fall = losses[0] - off(w, np.asarray(w) + float(found.alpha) * step, x[held], exact[held]).sum()
    np.testing.assert_allclose(found.held_fall.sum(), fall, rtol=1e-2, atol=1e-2 * losses[0] + 1e-6)


@pytest.mark.parametrize("config", [FIXED, CHOSEN], ids=("fixed", "chosen"))
@given(xs=st.tuples(*2 * [activations(SAMPLES * TIME, IN, whole=True).map(lambda x: x.reshape(SAMPLES, TIME, IN))]))
@settings(max_examples=5)
def test_moments_are_those_of_any_parts_and_padding_counts_for_nothing(config, xs):
    """Sums of whole numbers are exact."""
    whole = moments(config, xs)
    cut = [moments(config, [x[part] for x in xs], KEEP[part], SHARES[part]) for part in (slice(0, 1), slice(1, 3), slice(3, SAMPLES))]
    merged = [total(parts) for parts in zip(*cut, strict=True)]
    padded = [jnp.pad(x, ((0, 2), (0, 3), (0, 0)), constant_values=jnp.nan) for x in xs]
    found = list(no_rows(IN, [config]))
    for share, keep in rows_of(jnp.pad(KEEP, ((0, 2), (0, 3))), SHARES, len(found), None):
        found[share] = add(found[share], padded, keep)
    for other in (merged, found):
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(tuple(other)), strict=True):
            np.testing.assert_array_equal(a, b)
    assert int(total(whole).h.rows) == SAMPLES * TIME


def test_products_of_bfloat16_are_summed_in_float32():
    x, exact = (jax.random.normal(jax.random.key(n), (4, 64, IN)).astype(jnp.bfloat16) for n in (0, 1))
    found = moments(FIXED, (x, x + exact / 64), jnp.ones((4, 64), bool), 4 * (FITTED,))[FITTED]
    assert found.drift is not None
    assert found.drift.dtype == jnp.float32
    d, x = (np.asarray(a, np.float64).reshape(-1, IN) for a in ((x + exact / 64) - x, x))
    close(found.drift, d.T @ x, 1e-5)


SPEC = model(PARALLEL, 2)
PARAMS = random_params(SPEC)
CALIB = np.random.default_rng(1).integers(0, VOCAB, (10, 24)).astype(np.int32)
PLAIN = QuantConfig(3, 16, grid="minmax", order="natural")
CONFIG = replace(PLAIN, alpha=0.6, rules=(Rule(r".*\.up", replace(PLAIN, alpha=None)), Rule(r"blocks\.0\.o", PLAIN), Rule(r"blocks\.1\.o")))


@pytest.mark.parametrize("sequential", [True, False])
def test_every_linear_is_textbook_gptq_on_its_target(sequential):
    config = replace(CONFIG, sequential=sequential)
    result = quantize(PARAMS, SPEC, CALIB, config)
    reports = {report.name: report for report in result.report.linears}
    held = np.arange(len(CALIB)) % HELD_OUT == 0
    ((x, *_),) = embed_batches(SPEC, PARAMS["top"], CALIB)
    exact = x
    assert [share == HELD for share in shares([24] * len(CALIB), 1)] == held.tolist()
    for i, (spec, p, q) in enumerate(zip(SPEC.blocks, PARAMS["blocks"], result.params["blocks"], strict=True)):
        so_far = dict(p)
        for tap, roles in spec.stages:
            entering, meant = run(spec, so_far, x)[1][tap], run(spec, p, exact)[1][tap]
            for role in roles:
                mine, w = config.resolve(f"blocks.{i}.{role}"), np.asarray(p[role]["weight"], np.float64)
                if mine is None:
                    continue
                report, alpha = reports[f"blocks.{i}.{role}"], mine.alpha
                fitted = ~held | (alpha is not None)
                step = way(w, entering[fitted], meant[fitted])
                if alpha is None:
                    losses = [off(w, w + a * step, entering[held], meant[held]).sum() for a in np.linspace(0, 1, 101)]
                    alpha = report.alpha
                    gained = losses[0] - off(w, w + alpha * step, entering[held], meant[held]).sum()
                    whole = np.square(np.asarray(entering[held], np.float64) @ w.T).sum()
                    assert report.restored_held_out == pytest.approx(gained / whole, rel=1e-2, abs=1e-6)
                    assert max(losses) - min(losses) < 1e-6 * whole or abs(alpha - np.argmin(losses) / 100) < 0.02
                else:
                    assert report.restored_held_out is None
                target = w + alpha * step
                rows = np.asarray(entering, np.float64).reshape(-1, w.shape[1])
                found = gptq(problem(target, rows.T @ rows, mine, report.damp), Following(mine, q[role], slack=1e-3))
                assert found.strayed <= 0.02 * w.size
                whole = np.square(rows @ w.T).sum()
                np.testing.assert_allclose(report.alpha, alpha, rtol=1e-6)
                pair = entering[fitted], meant[fitted]
                restored = (off(w, w, *pair) - off(w, target, *pair)).sum() / fitted.mean() / whole
                np.testing.assert_allclose(report.restored, restored, rtol=1e-2, atol=1e-6)
                left = np.square(rows @ (target - np.asarray(dequantize(q[role]), np.float64)).T).sum()
                np.testing.assert_allclose(report.error, np.sqrt(left / whole), rtol=1e-3)
                if sequential:
                    so_far[role] = floats(q)[role]
        x, exact = run(spec, floats(q), x)[0], run(spec, p, exact)[0]
    assert sum(report.restored > 1e-4 for report in reports.values()) >= 3
    assert len(reports) == len(names(SPEC)) - 1


def same(a: Any, b: Any) -> None:
    for found, expected in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_array_equal(found, expected)
    for found, expected in zip(a.report.linears, b.report.linears, strict=True):
        assert found == expected


def test_alpha_0_is_the_plain_path_and_nothing_runs_beside():
    """What waits is counted; and to carry the float stream along changes nothing where alpha is 0."""
    waiting: list[Any] = []
    plain = quantize(PARAMS, SPEC, CALIB, PLAIN, runtime=Runtime(store=Store(lambda a: waiting.append(1) or a, lambda a: a)))
    steps = sum(1 + len(block.stops) for block in SPEC.blocks)
    assert len(waiting) == 1 + steps
    batches = embed_batches(SPEC, PARAMS["top"], CALIB, beside=True)
    blocks = list(quantize_blocks(SPEC, PARAMS["blocks"], batches, PLAIN))
    same(replace_params(plain, [p for p, _, _ in blocks]), plain)
    assert all(batch.exact is not None for _, _, after in blocks for batch in after)
    waiting.clear()
    quantize(PARAMS, SPEC, CALIB, replace(PLAIN, alpha=1.0), runtime=Runtime(store=Store(lambda a: waiting.append(1) or a, lambda a: a)))
    assert len(waiting) == 1 + 2 * steps


def replace_params(quantized: Any, blocks: list[Any]) -> Any:
    return quantized._replace(params={**quantized.params, "blocks": blocks})


def test_the_target_brings_the_output_nearer_to_the_float_models():
    def output_error(alpha: float) -> float:
        batches = embed_batches(SPEC, PARAMS["top"], CALIB, beside=True)
        for _, _, after in quantize_blocks(SPEC, PARAMS["blocks"], batches, replace(PLAIN, alpha=alpha)):
            batches = after
        return sum(float(jnp.square(batch.x - batch.exact).sum()) for batch in batches)

    assert output_error(1.0) < output_error(0.0)


def test_activations_wait_anywhere(tmp_path):
    config = replace(PLAIN, alpha=1.0)
    expected = quantize(PARAMS, SPEC, CALIB, config, runtime=Runtime(tokens_per_call=64))
    same(quantize(PARAMS, SPEC, CALIB, config, runtime=Runtime(store=on_disk(tmp_path / "there"), tokens_per_call=64)), expected)
    until = time.monotonic() + 60
    while (tmp_path / "there").exists() and time.monotonic() < until:
        time.sleep(0.01)  # the last file goes when the thread that writes it is done
    assert not (tmp_path / "there").exists()


def test_experts_have_targets_of_the_tokens_that_the_quantized_stream_sends_them():
    spec = experts_model()
    params = experts_params(spec)
    p = params["blocks"][0]
    calib = np.random.default_rng(1).integers(0, 40, (8, 32)).astype(np.int32)
    only = replace(PLAIN, group_size=8, min_rows=8, alpha=1.0)
    result = quantize(params, spec, calib, replace(only, rules=(Rule(r".*(shared\..*|q|k|v)$"), Rule(r".*\.o$", PLAIN))))
    q, reports = result.params["blocks"][0], {report.name: report for report in result.report.linears}
    ((x, *_),) = embed_batches(spec, params["top"], calib)
    ours = state_at("mlp_in", {**p, "o": {"weight": dequantize(q["o"])}}, x)
    meant = state_at("mlp_in", p, x)
    for n in range(EXPERTS):
        keep = ours.held["route"].chosen(n)
        mine = {role: jax.tree.map(lambda a: a[n], q[f"experts.{role}"]) for role in ("gate", "up", "down")}  # noqa: B023
        w = {role: p[f"experts.{role}"]["weight"][n] for role in mine}
        rows = ours.taps["mlp_in"][keep], meant.taps["mlp_in"][keep]
        opening = {role: dequantize(mine[role]) for role in ("gate", "up")}, w
        inner = [jax.nn.silu(x @ one["gate"].T) * (x @ one["up"].T) for x, one in zip(rows, opening, strict=True)]
        assert inner[0].shape[-1] == EXPERT_HIDDEN
        for role, (entering, wanted) in (("gate", rows), ("up", rows), ("down", inner)):
            report, target = reports[f"blocks.0.experts.{n}.{role}"], np.asarray(w[role], np.float64) + way(w[role], entering, wanted)
            x64 = np.asarray(entering, np.float64)
            left = x64 @ (target - np.asarray(dequantize(mine[role]), np.float64)).T
            np.testing.assert_allclose(report.error, np.linalg.norm(left) / np.linalg.norm(x64 @ np.asarray(w[role]).T), rtol=1e-3)
            assert report.restored > 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("float") / "tiny", num_key_value_heads=4, intermediate_size=64)


TOKENS = np.random.default_rng(0).integers(0, 300, (6, 24)).astype(np.int32)


def test_a_run_that_continues_has_both_streams(source, tmp_path):
    config = replace(PLAIN, group_size=32, alpha=0.5, rules=(Rule(r".*(q|k|v|up|gate)_proj"), Rule("lm_head", replace(PLAIN, alpha=None))))

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    again: Callable[..., Any] = lambda name, **more: quantize_checkpoint(source, tmp_path / name, TOKENS, config, **more)  # noqa: E731
    whole = again("whole")
    with pytest.raises(KeyboardInterrupt):
        again("cut", progress=stop)
    found = again("cut", resume=True)
    assert found.linears == whole.linears
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes()
    assert whole.linears[-1].name == "lm_head"
    assert 0 < whole.linears[-1].alpha <= 1
    assert whole.restored == (whole.linears[-1].restored, whole.linears[-1].restored_held_out)


def test_what_cannot_be_had_is_refused_in_a_sentence(source, tmp_path):
    for alpha in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"alpha is a part of the way .* must lie in \[0, 1\], got"):
            QuantConfig(alpha=alpha)
    with pytest.raises(ValueError, match="but the batches hold one stream"):
        next(quantize_blocks(SPEC, PARAMS["blocks"], embed_batches(SPEC, PARAMS["top"], CALIB), FIXED))
    h = Hessian(jnp.eye(IN), jnp.asarray(64))
    with pytest.raises(ValueError, match=r"alpha is 0\.7, for which the float model has to run beside"):
        next(quantize_linears({"a": {"weight": jnp.ones((4, IN))}}, h, {"a": FIXED}))
    with pytest.raises(ValueError, match="but Hessians do not tell"):
        sweep(source, tmp_path, [QuantConfig(), FIXED])
    with pytest.raises(ValueError, match="but Linear is to run through its own forward"):
        quantize_traced(torch.nn.Linear(1, 1), TOKENS, FIXED)
