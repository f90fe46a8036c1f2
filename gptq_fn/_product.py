"""Products of float32 matrices that are as accurate as float32."""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_ALGORITHM = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
"""On NVIDIA's matrix units: three products of the high and low halves of both operands, as accurate as float32 and faster."""


def product(a: Float[Array, "n k"], b: Float[Array, "k m"]) -> Float[Array, "n m"]:
    """a b, to the accuracy of float32, whatever JAX's default precision is."""
    plain = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    if not _has_matrix_units():
        return plain(a, b)
    return jax.lax.platform_dependent(a, b, cuda=partial(jnp.matmul, precision=_ALGORITHM), default=plain)


@cache
def _has_matrix_units() -> bool:
    """Whether programs may run on NVIDIA's GPUs and these multiply TF32."""
    try:
        return all(float(device.compute_capability) >= 8 for device in jax.devices("cuda"))
    except RuntimeError:
        return False
