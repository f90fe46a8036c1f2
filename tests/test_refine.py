"""Refinements do what slow, obvious loops in float64 do, and keep their laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_fn import (
    Hessian,
    QuantConfig,
    QuantizedLinear,
    _refine,
    dequantize,
    descend,
    factor,
    quantize_linears,
    refit,
    round_to_nearest,
    solve,
)
from gptq_fn._refine import refine
from gptq_fn._solve import round_in_loops
from gptq_fn.kernels import round_block
from gptq_fn.testing import activations, assert_equal_up_to_ties, hessian_of, hessians, weights

OUT, IN = 6, 72
"""The shape on which all laws are tried, so that each configuration is compiled once; 72 columns leave a narrower last group of 32."""
LAWS = [
    QuantConfig(4, 16, sym=False),
    QuantConfig(3, 32, order="act", grid="minmax"),
    QuantConfig(2, 32, sym=False, order="act", static_groups=True),
    QuantConfig(8, None, order="act", grid="minmax"),
]


def name(c: QuantConfig) -> str:
    return f"{c.bits}bit-{'sym' if c.sym else 'asym'}-{c.group_size}-{c.order}"


laws = pytest.mark.parametrize("config", LAWS, ids=name)
two_laws = pytest.mark.parametrize("config", LAWS[:2], ids=name)


class Exact:
    """A quantized linear, the weight that it approximates and the damped Hessian, in float64."""

    def __init__(self, q: QuantizedLinear, w: jax.Array, h: Hessian, damp: jax.Array):
        self.codes, self.scale, self.zero = (np.asarray(a, np.float64) for a in (q.codes, q.scale, q.zero))
        self.group, self.top = np.asarray(q.group_of), 2**q.bits - 1
        xx = np.asarray(h.xx, np.float64)
        diagonal = np.diag(xx)
        dead = diagonal == 0
        mean = 1.0 if dead.all() else diagonal[~dead].mean()
        self.h = xx + np.diag(np.where(dead, mean, 0.0) + float(damp) * mean)
        self.w = np.where(dead, 0.0, np.asarray(w, np.float64))

    def q(self) -> np.ndarray:
        return self.scale[:, self.group] * (self.codes - self.zero[:, self.group])

    def objective(self) -> np.ndarray:
        e = self.w - self.q()
        return np.einsum("oi,ij,oj->o", e, self.h, e)

    def size(self) -> np.ndarray:
        """What float32 rounds when it computes an objective: that of the weight itself."""
        return np.einsum("oi,ij,oj->o", self.w, self.h, self.w) + np.einsum("oi,ij,oj->o", self.q(), self.h, self.q())

    def best_levels(self, j: int) -> np.ndarray:
        """The code of column j, unrounded, that is best for all the others as they are."""
        g, residual = self.group[j], (self.w - self.q()) @ self.h[:, j]
        return self.codes[:, j] + residual / (self.scale[:, g] * self.h[j, j])

    def follow(self, found: np.ndarray, slack: float) -> None:
        """Descend as `found` did, after making sure that each code is a best one up to `slack`."""
        for j in range(len(self.h)):
            level = np.clip(self.best_levels(j), 0, self.top)
            off = np.abs(level - found[:, j])
            assert (off <= 0.5 + slack).all(), f"column {j}, row {off.argmax()}: {level[off.argmax()]} became {found[off.argmax(), j]}"
            self.codes[:, j] = found[:, j]

    def best_scales(self) -> np.ndarray:
        """The scales of each row that are best together, by solving the normal equations of its groups' parts."""
        best = np.zeros_like(self.scale)
        for row in range(len(self.w)):
            parts = np.zeros((self.scale.shape[1], len(self.h)))
            for j, g in enumerate(self.group):
                parts[g, j] = self.codes[row, j] - self.zero[row, g]
            best[row] = np.linalg.lstsq(parts @ self.h @ parts.T, parts @ self.h @ self.w[row], rcond=1e-12)[0]
        return best


DAMP = jnp.float32(0.01)


def rounded(w: jax.Array, config: QuantConfig) -> QuantizedLinear:
    """The nearest levels, in groups as act-order might leave them where it is asked for."""
    n = w.shape[1]
    order = np.random.default_rng(0).permutation(n) if config.order == "act" else np.arange(n)
    q, place = round_to_nearest(w[:, order], config), np.argsort(order)
    return QuantizedLinear(q.codes[:, place], q.scale, q.zero, q.group_of[place], q.bits)


def with_codes(q: QuantizedLinear, seed: int) -> QuantizedLinear:
    """The linear with other codes, any of them."""
    codes = np.random.default_rng(seed).integers(0, 2**q.bits, q.codes.shape)
    return QuantizedLinear(jnp.asarray(codes, jnp.uint8), q.scale, q.zero, q.group_of, q.bits)


def assert_not_raised(after: Exact, before: Exact) -> None:
    assert (after.objective() <= before.objective() * (1 + 1e-5) + 1e-10 * before.size()).all()


@laws
@given(w=weights(OUT, IN), h=hessians(IN), data=st.data())
def test_descent_is_that_of_the_plain_loops(config, w, h, data):
    """From the nearest codes and from any; it never raises the objective and changes codes only."""
    q = rounded(w, config)
    if data.draw(st.booleans()):
        q = with_codes(q, data.draw(st.integers(0, 99)))
    found = descend(q, w, h, DAMP)
    before, after, loops = (Exact(x, w, h, DAMP) for x in (q, found, q))
    loops.follow(after.codes, slack=1e-4 * 2**config.bits)
    assert_not_raised(after, before)
    for leaf in ("scale", "zero", "group_of"):
        np.testing.assert_array_equal(getattr(found, leaf), getattr(q, leaf))


@two_laws
@given(w=weights(OUT, IN), h=hessians(IN))
def test_where_descent_ends_no_step_of_a_code_helps(config, w, h):
    q = rounded(w, config)
    for _ in range(200):
        last, q = q, descend(q, w, h, DAMP)
        if (last.codes == q.codes).all():
            break
    else:
        pytest.fail("descent does not end")
    exact = Exact(q, w, h, DAMP)
    best, slack = exact.objective(), 1e-9 * exact.size()
    for j, step in itertools.product(range(IN), (-1, 1)):
        stepped = Exact(q, w, h, DAMP)
        stepped.codes[:, j] = np.clip(stepped.codes[:, j] + step, 0, stepped.top)
        assert (stepped.objective() >= best * (1 - 1e-4) - slack).all()


@laws
@given(w=weights(OUT, IN), h=hessians(IN), negative=st.booleans())
def test_refit_finds_the_best_scales(config, w, h, negative):
    """Those of least squares where none of them is kept, up to rounding; it never raises the objective and changes scales only."""
    q = rounded(w, config)
    if negative:
        q = QuantizedLinear(q.codes, -q.scale, q.zero, q.group_of, q.bits)
        w = -w
    found = refit(q, w, h, DAMP, config)
    before, after = Exact(q, w, h, DAMP), Exact(found, w, h, DAMP)
    assert_not_raised(after, before)
    assert ((after.objective() < before.objective()) | (after.scale == before.scale).all(1)).all()
    for leaf in ("codes", "zero", "group_of"):
        np.testing.assert_array_equal(getattr(found, leaf), getattr(q, leaf))
    free = Exact(q, w, h, DAMP)
    free.scale = before.best_scales()
    fine = ((free.scale / before.scale > 0.25) & (free.scale / before.scale < 2.5)).all(1)
    half = np.spacing(np.asarray(found.scale)).astype(np.float64)[:, after.group] / 2  # by so much is each scale rounded
    lost = half * np.abs(after.codes - after.zero[:, after.group])
    rounding = np.einsum("oi,ij,oj->o", lost, np.abs(after.h), lost)
    assert (after.objective() - free.objective() <= 1.01 * rounding + 1e-5 * before.objective())[fine].all()


@two_laws
@given(w=weights(OUT, IN), h=hessians(IN, dead=False))
def test_exact_levels_are_kept(config, w, h):
    q = rounded(w, config)
    again = descend(refit(q, dequantize(q), h, DAMP, config), dequantize(q), h, DAMP)
    for leaf in ("codes", "scale"):
        np.testing.assert_array_equal(getattr(again, leaf), getattr(q, leaf))
    off = QuantizedLinear(q.codes, (q.scale.astype(jnp.float32) * 1.25).astype(jnp.float16), q.zero, q.group_of, q.bits)
    back = refit(off, dequantize(q), h, DAMP, config)
    exact = np.asarray(dequantize(q))
    used = np.stack([(exact[:, np.asarray(q.group_of) == g] != 0).any(1) for g in range(q.scale.shape[1])], 1)
    np.testing.assert_allclose(np.asarray(back.scale, np.float64)[used], np.asarray(q.scale, np.float64)[used], rtol=2e-3)


@two_laws
@given(w=weights(OUT, IN), other=weights(OUT, IN), h=hessians(IN), seed=st.integers(0, 1000))
def test_rows_are_independent(config, w, other, h, seed):
    order = np.random.default_rng(seed).permutation(OUT)
    mixed = jnp.where((order < OUT // 2)[:, None], w, other)[order]
    alone, found = (refit(descend(rounded(x, config), x, h, DAMP), x, h, DAMP, config) for x in (w, mixed))
    kept = (order < OUT // 2)[order]
    np.testing.assert_array_equal(found.codes[kept], alone.codes[order][kept])
    np.testing.assert_array_equal(found.scale[kept], alone.scale[order][kept])


@laws
@given(w=weights(OUT, IN), seed=st.integers(0, 99))
def test_without_correlation_descent_is_rounding(config, w, seed):
    h = Hessian(jnp.asarray(np.diag(np.exp(np.random.default_rng(seed).normal(size=IN))), jnp.float32), jnp.asarray(1, jnp.int32))
    q = rounded(w, config)
    assert_equal_up_to_ties(descend(with_codes(q, seed), w, h, DAMP), q, w)


@two_laws
@given(w=weights(OUT, IN), x=activations(2 * IN, IN), dead=st.lists(st.integers(0, IN - 1), min_size=1, unique=True))
def test_dead_columns_become_zero(config, w, x, dead):
    h = hessian_of(np.where(np.isin(np.arange(IN), dead), np.float32(0), x))
    q = rounded(w, config)
    found = refit(descend(q, w, h, DAMP), w, h, DAMP, config)
    assert not np.asarray(dequantize(found))[:, dead].any()
    assert found.problems() == ()


def problem(out: int, inputs: int, rows: int = 400) -> tuple[jax.Array, Hessian]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)) * np.exp(rng.normal(size=inputs)) + rng.normal(size=(rows, 4)) @ rng.normal(size=(4, inputs))
    return jnp.asarray(rng.normal(size=(out, inputs)), jnp.float32), hessian_of(jnp.asarray(x, jnp.float32))


@pytest.mark.parametrize("config", [QuantConfig(3, 48, sym=False, order="act"), QuantConfig(4, 16, grid="minmax")], ids=name)
def test_wide_and_many_rows(config, monkeypatch):
    """Several panels, of which the last is filled up, and more rows than are refitted at once."""
    w, h = problem(5, 300)
    q = rounded(w, config)
    found = descend(q, w, h, DAMP)
    loops, after = Exact(q, w, h, DAMP), Exact(found, w, h, DAMP)
    start = loops.objective()
    loops.follow(after.codes, slack=1e-3)
    assert (after.objective() < 0.9 * start).all()
    whole = refit(found, w, h, DAMP, config)
    assert (Exact(whole, w, h, DAMP).objective() < 0.999 * after.objective()).all()
    monkeypatch.setattr(_refine, "_EQUATIONS", 2 * whole.scale.shape[1] ** 2)
    parts = jax.jit(refit.__wrapped__, static_argnames="config")(found, w, h, DAMP, config)
    np.testing.assert_allclose(parts.scale, whole.scale, rtol=2e-3)


def test_64_bits_change_nothing():
    """Everything is float32 where JAX has float64, too."""
    config = QuantConfig(3, 16, refine=("descent", "refit"))
    w, h = problem(5, 40)
    q = rounded(w, config)
    expected = refit(descend(q, w, h, DAMP), w, h, DAMP, config)
    with jax.enable_x64(True):
        found = refit(descend(q, w, h, DAMP), w, h, DAMP, config)
    for leaf in ("codes", "scale"):
        np.testing.assert_array_equal(getattr(found, leaf), getattr(expected, leaf))


@pytest.mark.gpu
@pytest.mark.parametrize("config", [QuantConfig(4, 128), QuantConfig(3, 48, sym=False, order="act")], ids=name)
def test_refinements_on_a_gpu(config):
    """They gain as much as on a CPU, by the plain loops and by the kernel."""
    w, h = problem(200, 1200, 3000)
    q = rounded(w, config)
    lowered = {}
    for kind, rounds in {"plain": round_in_loops, "kernel": round_block()}.items():
        found = descend(q, w, h, DAMP, rounds)
        again = refit(found, w, h, DAMP, config)
        before, after, last = (Exact(x, w, h, DAMP) for x in (q, found, again))
        assert_not_raised(after, before)
        assert_not_raised(last, after)
        lowered[kind] = after.objective().sum(), last.objective().sum()
    np.testing.assert_allclose(lowered["kernel"], lowered["plain"], rtol=1e-3)


REFINED = QuantConfig(3, 16, refine=("descent", "refit", "descent"))


def test_linears_are_refined_as_their_configuration_says():
    """By the damping of their factor, under vmap as experts are, and not where too few rows reached them."""
    w, h = problem(7, 40)
    f = factor(h, REFINED)
    q = solve(w, f, QuantConfig(3, 16))[0]
    expected = descend(refit(descend(q, w, h, f.damp), w, h, f.damp, REFINED), w, h, f.damp)
    ((_, found, report),) = quantize_linears({"a": {"weight": w}}, h, {"a": REFINED})
    before, after = (Exact(x, w, h, f.damp).objective() for x in (q, found))
    assert (after <= before).all()
    assert after.sum() < 0.95 * before.sum()
    several = jax.vmap(lambda q, w, h: refine(q, w, h, f.damp, REFINED, round_in_loops))(
        *(jax.tree.map(lambda a: jnp.stack([a, a]), of) for of in (q, w, h))
    )
    for mine in (found, jax.tree.map(lambda a: a[0], several)):
        assert (np.asarray(mine.codes) == np.asarray(expected.codes)).mean() > 0.98
        np.testing.assert_allclose(mine.scale, expected.scale, rtol=0.02)
    ((_, nearest, report),) = quantize_linears({"a": {"weight": w}}, h._replace(rows=jnp.asarray(3)), {"a": REFINED})
    assert report.rounded
    np.testing.assert_array_equal(nearest.codes, round_to_nearest(w, REFINED).codes)


@pytest.mark.parametrize("wrong", ["descent", ["refit"], ("descend",), ("refit", 2), None])
def test_other_refinements_are_refused(wrong):
    with pytest.raises(ValueError, match="refine must be a tuple of 'descent' and 'refit'"):
        QuantConfig(refine=wrong)
