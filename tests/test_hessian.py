"""The second moment of a layer's inputs does not depend on how they arrive."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq_fn import Hessian, _hessian, add_rows, empty, merge
from gptq_fn.testing import activations

ROWS, IN = 24, 16
whole = activations(ROWS, IN, whole=True)  # whole numbers: float32 sums are exact, so order and split may not matter at all


def hessian(*parts: jnp.ndarray) -> Hessian:
    h = empty(IN)
    for part in parts:
        h = add_rows(h, part)
    return h


def assert_same(a: Hessian, b: Hessian) -> None:
    np.testing.assert_array_equal(a.xx, b.xx)
    assert int(a.rows) == int(b.rows)


@given(x=whole, order=st.permutations(range(ROWS)))
def test_the_order_of_rows_does_not_matter(x, order):
    assert_same(hessian(x), hessian(x[jnp.asarray(order)]))


@given(x=whole, cut=st.sampled_from((1, 8, 23)))
def test_rows_may_be_split_and_merged(x, cut):
    a, b = x[:cut], x[cut:]
    for split in (hessian(a, b), merge(hessian(a), hessian(b)), merge(hessian(b), hessian(a))):
        assert_same(hessian(x), split)
    assert_same(hessian(x), hessian(x.reshape(4, 6, IN)))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@given(x=activations(9, 300, whole=True))
@settings(max_examples=5)
def test_wide_inputs_are_multiplied_block_by_block(dtype, x):
    """Blocks of 128, 128 and 44 inputs: exact sums of whole numbers are the same, and others exactly symmetric."""
    with pytest.MonkeyPatch.context() as patch:
        for widest in ("_WIDEST", "_WIDEST_ON_CPUS"):
            patch.setattr(_hessian, widest, 128)
        exact = np.asarray(x.astype(dtype), np.float64)
        h = add_rows(add_rows(empty(300), x.astype(dtype)), x.astype(dtype))
        np.testing.assert_array_equal(h.xx, 2 * exact.T @ exact)
        other = add_rows(h, jnp.sin(x).astype(dtype)).xx
        np.testing.assert_array_equal(other, other.T)
        rest = np.asarray(jnp.sin(x).astype(dtype), np.float64)
        np.testing.assert_allclose(other, 2 * exact.T @ exact + rest.T @ rest, rtol=1e-6, atol=1e-5)


@given(x=whole)
def test_the_empty_hessian_is_the_unit(x):
    assert_same(merge(empty(IN), hessian(x)), hessian(x))
    assert_same(merge(hessian(x), empty(IN)), hessian(x))


@given(x=whole, keep=st.lists(st.booleans(), min_size=ROWS, max_size=ROWS), poison=st.sampled_from((1.0, np.nan, np.inf)))
def test_a_mask_is_as_good_as_dropping_rows(x, keep, poison):
    keep = np.asarray(keep)
    masked = add_rows(empty(IN), jnp.where(keep[:, None], x, poison), jnp.asarray(keep))
    dropped = np.asarray(x)[keep]
    np.testing.assert_array_equal(masked.xx, dropped.T @ dropped)
    assert int(masked.rows) == keep.sum()
    assert_same(masked, add_rows(empty(IN), x.reshape(4, 6, IN), jnp.asarray(keep.reshape(4, 6))))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@given(x=activations(ROWS, IN))
def test_products_are_exact_whatever_the_type_of_the_rows(dtype, x):
    x = x.astype(dtype)
    exact = np.asarray(x, np.float64)
    size = np.sqrt(np.outer(*2 * [np.square(exact).sum(0)]))
    h = add_rows(empty(IN), x)
    assert h.xx.dtype == jnp.float32
    assert (np.abs(np.asarray(h.xx, np.float64) - exact.T @ exact) <= 1e-6 * size).all()
