"""Products of the solver against NumPy in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from gptq_fn._product import energy, product


@pytest.mark.parametrize("n", [1, 7, 384, 385, 1000, 1537])
def test_the_energy_of_rows_under_a_symmetric_matrix(n: int):
    """Of up to 384 columns in one strip, of more in up to four, the last one narrower."""
    rng = np.random.default_rng(n)
    x, e = rng.standard_normal((2 * n, n)), rng.standard_normal((5, n))
    xx = jnp.asarray(x.T @ x, jnp.float32)
    wanted = ((e @ np.asarray(xx, np.float64)) * e).sum(1)
    np.testing.assert_allclose(energy(jnp.asarray(e, jnp.float32), xx), wanted, rtol=1e-5)


def test_products_keep_float32():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((300, 1100)), rng.standard_normal((1100, 200))
    found = product(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    np.testing.assert_allclose(found, a @ b, atol=1e-4)
