"""The door between torch and JAX keeps every bit and shares no memory."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from gptq_fn_interop.tensors import to_jax, to_numpy, to_torch
from hypothesis import given, settings
from hypothesis import strategies as st

SAME = {
    torch.bool: jnp.bool_,
    torch.uint8: jnp.uint8,
    torch.uint16: jnp.uint16,
    torch.uint32: jnp.uint32,
    torch.int8: jnp.int8,
    torch.int16: jnp.int16,
    torch.int32: jnp.int32,
    torch.float8_e4m3fn: jnp.float8_e4m3fn,
    torch.float8_e5m2: jnp.float8_e5m2,
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.float32: jnp.float32,
}

shapes = st.lists(st.integers(0, 5), max_size=3)


def random_tensor(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    """Random bits, so NaNs with payloads and subnormal numbers too."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    count = int(np.prod(shape)) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


def bits_of(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@settings(max_examples=60)
@given(st.sampled_from(list(SAME)), shapes, st.integers(0, 2**32 - 1))
def test_there_and_back_keeps_every_bit(dtype: torch.dtype, shape: list[int], seed: int) -> None:
    t = random_tensor(dtype, shape, seed)
    a = to_jax(t)
    back = to_torch(a)
    assert a.dtype == SAME[dtype]
    assert a.shape == tuple(shape)
    assert back.dtype == dtype
    assert bits_of(back) == bits_of(t)
    assert bits_of(to_torch(to_numpy(t))) == bits_of(t)


@settings(max_examples=20)
@given(st.sampled_from([d for d in SAME if d != torch.bool]), st.integers(0, 2**32 - 1))
def test_strided_tensors_keep_their_order(dtype: torch.dtype, seed: int) -> None:
    t = random_tensor(dtype, [4, 6], seed)
    assert bits_of(to_torch(to_jax(t.T[::2]))) == bits_of(t.T[::2])


@pytest.mark.parametrize("size", [1, 64, 4096])
def test_nothing_is_shared(size: int) -> None:
    t = torch.arange(size, dtype=torch.float32)
    a, n = to_jax(t), to_numpy(t)
    t.add_(1)
    np.testing.assert_array_equal(a, np.arange(size))
    np.testing.assert_array_equal(n, np.arange(size))
    back = to_torch(a)
    back.add_(1)
    np.testing.assert_array_equal(a, np.arange(size))
    to_torch(n).add_(1)
    np.testing.assert_array_equal(n, np.arange(size))


def test_tensors_that_require_grad_are_detached() -> None:
    np.testing.assert_array_equal(to_jax(torch.ones(3, requires_grad=True)), np.ones(3))


@pytest.mark.parametrize("value", [2**31 - 1, -(2**31), 0])
def test_int64_is_narrowed_where_it_fits(value: int) -> None:
    a = to_jax(torch.tensor([value]))
    assert a.dtype == jnp.int32
    assert a[0] == value


@pytest.mark.parametrize("value", [2**31, -(2**31) - 1])
def test_int64_that_does_not_fit_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=rf"int64 and reaches from {value} to {value}.*int32"):
        to_jax(torch.tensor([value]))


def test_64_bits_pass_where_jax_has_them() -> None:
    with jax.enable_x64(True):
        for t in (torch.tensor([2**40]), torch.tensor([0.1], dtype=torch.float64)):
            a = to_jax(t)
            assert a.dtype.itemsize == 8
            assert torch.equal(to_torch(a), t)


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        (torch.ones(2, device="meta"), ValueError, "meta tensor of shape \\(2,\\) has no values"),
        (torch.ones(2, dtype=torch.float64), TypeError, "would round float64 to float32"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "no counterpart of a torch.strided tensor of torch.complex64"),
        (torch.eye(2).to_sparse(), TypeError, "no counterpart of a torch.sparse_coo tensor"),
    ],
)
def test_what_jax_cannot_hold_is_refused(t: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        to_jax(t)


@pytest.mark.parametrize("a", [jnp.ones(2, jnp.int4), np.ones(2, ml_dtypes.float8_e3m4), np.array(["a"])])
def test_what_torch_cannot_hold_is_refused(a: np.ndarray) -> None:
    with pytest.raises(TypeError, match="torch has no counterpart"):
        to_torch(a)


def test_random_keys_are_refused() -> None:
    with pytest.raises(TypeError, match="torch has no counterpart"):
        to_torch(jax.random.key(0))


@pytest.mark.parametrize(("chosen", "expected"), [(None, "false"), ("true", "true")])
def test_jax_is_asked_to_leave_memory_to_torch_unless_the_user_chose(chosen: str | None, expected: str) -> None:
    name = "XLA_PYTHON_CLIENT_PREALLOCATE"
    told = {key: value for key, value in os.environ.items() if key != name} | ({} if chosen is None else {name: chosen})
    program = f"import os, gptq_fn_interop; print(os.environ[{name!r}])"
    found = subprocess.run([sys.executable, "-c", program], env=told, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected
