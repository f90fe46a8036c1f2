"""Linears with packed weights for JAX: Triton kernels on GPUs, plain JAX elsewhere."""

import jax
import numpy as np

from gptq_fn_kernels.jax import fragments, rows
from gptq_fn_kernels.jax.attention import attend
from gptq_fn_kernels.jax.columns import SMALLEST, WIDEST, round_columns
from gptq_fn_kernels.jax.fragments import Fragments
from gptq_fn_kernels.jax.launch import missing
from gptq_fn_kernels.jax.rows import Rows

__all__ = ["SMALLEST", "WIDEST", "Fragments", "Rows", "attend", "missing", "pack", "round_columns", "serves"]


def pack(
    codes: jax.Array, scale: jax.Array, zero: jax.Array, group_of: jax.Array, bits: int, bias: jax.Array | None = None
) -> Fragments | Rows:
    """The linear of weight `scale[o, g] * (codes[o, i] - zero[o, g])`, `g = group_of[i]`, in about `bits` bits a weight.

    codes uint8 [out, k], scale and zero [out, groups], group_of int [k], bias [out] or None. Laid out for the device that
    the codes are on; what it computes does not depend on where it is computed. Reads values: not for use under jit.
    """
    symmetric = bool((zero == 2 ** (bits - 1)).all())
    form = fragments if serves(codes) else rows
    return form.pack(codes, scale, zero, np.asarray(group_of), bits, symmetric, bias)


def serves(array: jax.Array) -> bool:
    """Whether kernels can be launched where the array is."""
    return missing() is None and all(device.platform == "gpu" for device in array.devices())
