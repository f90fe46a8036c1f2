"""Laws that a quantizer of your own should hold, tested by properties, and how they find what is wrong with one.

    pytest examples/test_own_quantizer.py

A quantizer maps a weight [out, in] and the Hessian of its inputs to a QuantizedLinear. The right one below is GPTQ on a grid of our own,
that of `research.py`. Each wrong one has a mistake that is easy to make and hard to see: its results look like any others. The
strategies of `gptq_fn.testing` draw weights with outliers, constant and empty rows, and Hessians of correlated and dead inputs.
Put your quantizer in the place of `right`.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from research import gptq, normal_grid

import gptq_fn
from gptq_fn import Grid, Hessian, QuantConfig, QuantizedLinear, testing

dequantize = jax.jit(gptq_fn.dequantize)

Quantizer = Callable[[jax.Array, Hessian], QuantizedLinear]

OUT, INPUTS = 6, 48
CONFIG = QuantConfig(bits=4, group_size=16, damp=0.01, order="act", static_groups=True, grid=normal_grid)


# The first draw of a test compiles, so there is no deadline; and to vary each part of a failing example takes longer than to find it.
PHASES = (Phase.explicit, Phase.generate, Phase.shrink)
settings.register_profile("here", deadline=None, max_examples=20, derandomize=True, phases=PHASES)
settings.load_profile("here")


def right(w: jax.Array, h: Hessian) -> QuantizedLinear:
    return gptq(w, h, CONFIG)


def damped_absolutely(w: jax.Array, h: Hessian) -> QuantizedLinear:
    """Adds 1 to the diagonal, whatever the inputs' unit is."""
    return gptq(w, Hessian(h.xx + jnp.eye(INPUTS), h.rows), CONFIG)


def widest(group: jax.Array, weight: jax.Array, config: QuantConfig) -> Grid:
    return Grid(*(jnp.full_like(a, a.max()) for a in normal_grid(group, weight, config)))


def scaled_by_all_rows(w: jax.Array, h: Hessian) -> QuantizedLinear:
    """Takes the largest scale of all rows where each should have its own."""
    return gptq(w, h, replace(CONFIG, grid=widest))


def left_in_order(w: jax.Array, h: Hessian) -> QuantizedLinear:
    """Forgets to put the columns back where they were stored."""
    q = gptq(w, h, CONFIG)
    return QuantizedLinear(q.codes[:, jnp.argsort(-jnp.diagonal(h.xx))], q.scale, q.zero, q.group_of, q.bits)


QUANTIZERS = {
    "right": right,
    "damped absolutely": damped_absolutely,
    "scaled by all rows": scaled_by_all_rows,
    "left in order": left_in_order,
}


def law(*broken_by: str) -> Callable:
    """A law for the right quantizer and for wrong ones that break it: where one is not found out, the test is too weak and fails."""
    found = pytest.mark.xfail(reason="its mistake is found", strict=True)
    return pytest.mark.parametrize("name", ["right", *(pytest.param(name, marks=found) for name in broken_by)])


@law()
@given(testing.weights(OUT, INPUTS), testing.hessians(INPUTS))
def test_the_result_is_a_linear_that_can_be_stored(name: str, w: jax.Array, h: Hessian) -> None:
    q = QUANTIZERS[name](w, h)
    assert q.shape == w.shape
    assert q.problems() == ()


@law("damped absolutely")
@given(testing.weights(OUT, INPUTS), testing.hessians(INPUTS), st.sampled_from((2.0**-20, 2.0**20)))
def test_the_unit_of_the_inputs_does_not_matter(name: str, w: jax.Array, h: Hessian, unit: float) -> None:
    a, b = (QUANTIZERS[name](w, Hessian(xx, h.rows)) for xx in (h.xx, unit * h.xx))
    np.testing.assert_array_equal(a.codes, b.codes)


@law("scaled by all rows")
@given(testing.weights(OUT, INPUTS), testing.hessians(INPUTS))
def test_rows_do_not_see_each_other(name: str, w: jax.Array, h: Hessian) -> None:
    both, alone = QUANTIZERS[name](w, h), QUANTIZERS[name](w.at[0].set(0.0), h)
    np.testing.assert_array_equal(both.codes[1:], alone.codes[1:])
    np.testing.assert_array_equal(both.scale[1:], alone.scale[1:])


@law("left in order")
@given(testing.weights(OUT, INPUTS), testing.hessians(INPUTS, dead=False))
def test_without_correlation_every_weight_goes_to_its_nearest_level(name: str, w: jax.Array, h: Hessian) -> None:
    q = QUANTIZERS[name](w, Hessian(jnp.diag(jnp.diagonal(h.xx)), h.rows))
    scale, zero = (np.asarray(a, np.float64)[:, np.asarray(q.group_of)] for a in (q.scale, q.zero))
    inside = np.clip(np.asarray(w, np.float64), -zero * scale, (2**q.bits - 1 - zero) * scale)
    assert (np.abs(np.asarray(dequantize(q)) - inside) <= scale * (0.5 + 1e-4)).all()


@law()
@given(testing.weights(OUT, INPUTS), testing.hessians(INPUTS))
def test_what_is_never_used_gets_weight_0(name: str, w: jax.Array, h: Hessian) -> None:
    dead = np.asarray(jnp.diagonal(h.xx)) == 0
    assert not np.asarray(dequantize(QUANTIZERS[name](w, h)))[:, dead].any()
