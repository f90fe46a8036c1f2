"""Refinements do what slow, obvious loops in float64 do, and keep their laws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_fn import Hessian, QuantConfig, QuantizedLinear, dequantize, descend, factor, refit, solve
from gptq_fn._refine import refine
from gptq_fn._solve import round_in_loops
from gptq_fn.testing import activations, assert_equal_up_to_ties, hessian_of, hessians, weights

OUT, IN = 6, 72
"""The shape on which all laws are tried, so that each configuration is compiled once; 72 columns leave a narrower last group of 32."""
LAWS = [
    QuantConfig(4, 16, sym=False),
    QuantConfig(3, 32, order="act", grid="minmax"),
    QuantConfig(2, 32, sym=False, order="act", static_groups=True),
    QuantConfig(8, None, order="act", grid="minmax"),
]
laws = pytest.mark.parametrize("config", LAWS, ids=lambda c: f"{c.bits}bit-{'sym' if c.sym else 'asym'}-{c.group_size}-{c.order}")


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


def solved(w: jax.Array, h: Hessian, config: QuantConfig) -> tuple[QuantizedLinear, jax.Array]:
    f = factor(h, config)
    return solve(w, f, config)[0], f.damp


def assert_not_raised(after: Exact, before: Exact) -> None:
    assert (after.objective() <= before.objective() * (1 + 1e-5) + 1e-10 * before.size()).all()


@laws
@given(w=weights(OUT, IN), h=hessians(IN), data=st.data())
def test_descent_is_that_of_the_plain_loops(config, w, h, data):
    """From GPTQ's codes and from any; it never raises the objective and changes codes only."""
    q, damp = solved(w, h, config)
    if data.draw(st.booleans()):
        codes = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 2**config.bits, q.codes.shape)
        q = QuantizedLinear(jnp.asarray(codes, jnp.uint8), q.scale, q.zero, q.group_of, q.bits)
    found = descend(q, w, h, damp)
    before, after, loops = (Exact(x, w, h, damp) for x in (q, found, q))
    loops.follow(after.codes, slack=1e-4 * 2**config.bits)
    assert_not_raised(after, before)
    for leaf in ("scale", "zero", "group_of"):
        np.testing.assert_array_equal(getattr(found, leaf), getattr(q, leaf))


@laws
@given(w=weights(OUT, IN), h=hessians(IN))
def test_where_descent_ends_no_step_of_a_code_helps(config, w, h):
    q, damp = solved(w, h, config)
    for _ in range(200):
        last, q = q, descend(q, w, h, damp)
        if (last.codes == q.codes).all():
            break
    else:
        pytest.fail("descent does not end")
    exact = Exact(q, w, h, damp)
    best, slack = exact.objective(), 1e-9 * exact.size()
    for j, step in itertools.product(range(IN), (-1, 1)):
        stepped = Exact(q, w, h, damp)
        stepped.codes[:, j] = np.clip(stepped.codes[:, j] + step, 0, stepped.top)
        assert (stepped.objective() >= best * (1 - 1e-4) - slack).all()


@laws
@given(w=weights(OUT, IN), h=hessians(IN), negative=st.booleans())
def test_refit_finds_the_best_scales(config, w, h, negative):
    """Those of least squares where none of them is kept, up to rounding; it never raises the objective and changes scales only."""
    q, damp = solved(w, h, config)
    if negative:
        q = QuantizedLinear(q.codes, -q.scale, q.zero, q.group_of, q.bits)
        w = -w
    found = refit(q, w, h, damp, config)
    before, after = Exact(q, w, h, damp), Exact(found, w, h, damp)
    assert_not_raised(after, before)
    assert ((after.objective() < before.objective()) | (after.scale == before.scale).all(1)).all()
    for leaf in ("codes", "zero", "group_of"):
        np.testing.assert_array_equal(getattr(found, leaf), getattr(q, leaf))
    free = Exact(q, w, h, damp)
    free.scale = before.best_scales()
    fine = ((free.scale / before.scale > 0.25) & (free.scale / before.scale < 2.5)).all(1)
    half = np.spacing(np.asarray(found.scale)).astype(np.float64)[:, after.group] / 2  # by so much is each scale rounded
    lost = half * np.abs(after.codes - after.zero[:, after.group])
    rounding = np.einsum("oi,ij,oj->o", lost, np.abs(after.h), lost)
    assert (after.objective() - free.objective() <= 1.01 * rounding + 1e-5 * before.objective())[fine].all()


@laws
@given(w=weights(OUT, IN), h=hessians(IN))
def test_exact_levels_are_kept(config, w, h):
    q, damp = solved(w, h, config)
    again = refine(q, dequantize(q), h, damp, QuantConfig(refine=("refit", "descent"), group_size=config.group_size), round_in_loops)
    for leaf in ("codes", "scale"):
        np.testing.assert_array_equal(getattr(again, leaf), getattr(q, leaf))
    off = QuantizedLinear(q.codes, (q.scale.astype(jnp.float32) * 1.25).astype(jnp.float16), q.zero, q.group_of, q.bits)
    back = refit(off, dequantize(q), h, damp, config)
    used = np.asarray([[(np.asarray(dequantize(q))[:, np.asarray(q.group_of) == g] != 0).any(1)] for g in range(q.scale.shape[1])])[:, 0].T
    np.testing.assert_allclose(np.asarray(back.scale, np.float64)[used], np.asarray(q.scale, np.float64)[used], rtol=2e-3)


@laws
@given(w=weights(OUT, IN), other=weights(OUT, IN), h=hessians(IN), seed=st.integers(0, 1000))
def test_rows_are_independent(config, w, other, h, seed):
    order = np.random.default_rng(seed).permutation(OUT)
    mixed = jnp.where((order < OUT // 2)[:, None], w, other)[order]
    both = QuantConfig(**{**config.__dict__, "refine": ("descent", "refit")})
    (q, damp), (p, _) = solved(w, h, config), solved(mixed, h, config)
    alone, found = refine(q, w, h, damp, both, round_in_loops), refine(p, mixed, h, damp, both, round_in_loops)
    kept = (order < OUT // 2)[order]
    np.testing.assert_array_equal(found.codes[kept], alone.codes[order][kept])
    np.testing.assert_array_equal(found.scale[kept], alone.scale[order][kept])


@laws
@given(w=weights(OUT, IN), seed=st.integers(0, 99))
def test_without_correlation_descent_is_rounding(config, w, seed):
    h = Hessian(jnp.asarray(np.diag(np.exp(np.random.default_rng(seed).normal(size=IN))), jnp.float32), jnp.asarray(1, jnp.int32))
    q, damp = solved(w, h, config)
    codes = np.random.default_rng(seed).integers(0, 2**config.bits, q.codes.shape)
    found = descend(QuantizedLinear(jnp.asarray(codes, jnp.uint8), q.scale, q.zero, q.group_of, q.bits), w, h, damp)
    assert_equal_up_to_ties(found, q, w)


@pytest.mark.parametrize("step", ["descent", "refit"])
@given(w=weights(OUT, IN), x=activations(2 * IN, IN), dead=st.lists(st.integers(0, IN - 1), min_size=1, unique=True))
def test_dead_columns_stay_zero(step, w, x, dead):
    config = QuantConfig(4, 16, sym=False, refine=(step,))
    h = hessian_of(x.at[:, jnp.asarray(dead)].set(0.0))
    q, damp = solved(w, h, config)
    found = refine(q, w, h, damp, config, round_in_loops)
    assert not np.asarray(dequantize(found))[:, dead].any()
    assert found.problems() == ()
