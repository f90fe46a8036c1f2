"""The door between torch and JAX: `to_jax` and `to_torch`, and `to_numpy` on the way.

Results never share memory with their argument: an in-place torch operation could otherwise change a JAX array, which
compiled programs take for constant. Both pass through host memory and keep every bit, NaN payloads included.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch

_NUMPY_OF: dict[torch.dtype, np.dtype] = {
    torch.bool: np.dtype(np.bool_),
    torch.uint8: np.dtype(np.uint8),
    torch.uint16: np.dtype(np.uint16),
    torch.uint32: np.dtype(np.uint32),
    torch.uint64: np.dtype(np.uint64),
    torch.int8: np.dtype(np.int8),
    torch.int16: np.dtype(np.int16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
    torch.float8_e4m3fn: np.dtype(ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: np.dtype(ml_dtypes.float8_e5m2),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}
"""Types that both sides have; they look the same in memory."""

_TORCH_OF = {theirs: ours for ours, theirs in _NUMPY_OF.items()}


def to_jax(t: torch.Tensor) -> jax.Array:
    """A copy of `t` on JAX's default device, detached from gradients.

    Without JAX's 64-bit mode, int64 becomes int32 where all values fit (token ids do). Raises ValueError where they do
    not and for tensors without values, TypeError for types that JAX lacks; float64 is among them, since it would lose digits.
    """
    array = to_numpy(t)
    return jnp.asarray(array.astype(_narrowed(array), copy=False))


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """A copy of `t` in the host's memory, with ml_dtypes' types where NumPy has none. Raises as `to_jax` does."""
    if t.is_meta:
        raise ValueError(f"A meta tensor of shape {tuple(t.shape)} has no values. Load its weights first.")
    if t.layout != torch.strided or t.dtype not in _NUMPY_OF:
        raise TypeError(
            f"JAX and NumPy have no counterpart of a {t.layout} tensor of {t.dtype}. Convert it to a dense one of another type first."
        )
    flat = t.detach().to("cpu", copy=True).contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().view(_NUMPY_OF[t.dtype]).reshape(t.shape)


def to_torch(a: jax.Array | np.ndarray) -> torch.Tensor:
    """A copy of `a` as a CPU tensor. Raises TypeError for types that torch lacks."""
    if jnp.issubdtype(a.dtype, jax.dtypes.extended) or np.dtype(a.dtype) not in _TORCH_OF:
        raise TypeError(f"torch has no counterpart of an array of {a.dtype}. Convert it to another type first.")
    array = np.array(a, order="C", copy=True)
    return torch.from_numpy(array.reshape(-1).view(np.uint8)).view(_TORCH_OF[array.dtype]).reshape(array.shape)


def _narrowed(array: np.ndarray) -> np.dtype:
    """The type that JAX will hold `array` in. Raises where that would change its values."""
    narrow = np.dtype(jax.dtypes.canonicalize_dtype(array.dtype))
    if narrow == array.dtype:
        return narrow
    if array.dtype.kind == "f":
        raise TypeError(f"JAX would round {array.dtype} to {narrow}. Convert the tensor first, or set jax_enable_x64.")
    limits = np.iinfo(narrow)
    if array.size and not limits.min <= array.min() <= array.max() <= limits.max:
        raise ValueError(
            f"The tensor is {array.dtype} and reaches from {array.min()} to {array.max()}, but JAX would hold it in {narrow}. "
            "Set jax_enable_x64."
        )
    return narrow
