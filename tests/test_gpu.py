"""What a GPU computes is what the CPU computes."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptq_fn_interop.tensors import to_jax, to_torch

from gptq_fn import Hessian, QuantConfig, add_rows, dequantize, empty, factor, solve

pytestmark = pytest.mark.gpu


def solved(device: jax.Device, w: np.ndarray, x: np.ndarray, config: QuantConfig) -> tuple[Hessian, np.ndarray, np.ndarray]:
    with jax.default_device(device):
        h = add_rows(empty(x.shape[1]), jnp.asarray(x))
        q, loss = solve(jnp.asarray(w), factor(h, config), config)
        return h, np.asarray(dequantize(q), np.float64), np.asarray(loss, np.float64)


@pytest.mark.parametrize("order", ["natural", "act", "group"])
@pytest.mark.parametrize(("bits", "sym", "group_size"), [(4, True, 128), (3, False, 64), (2, True, None)])
def test_solutions_agree(order: str, bits: int, sym: bool, group_size: int | None) -> None:
    config = QuantConfig(bits=bits, sym=sym, group_size=group_size, order=order)
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((2048, 448)) @ rng.standard_normal((448, 448)) / 20).astype(np.float32)
    w = rng.standard_normal((96, 448)).astype(np.float32)
    (gpu,), (cpu,) = jax.devices("gpu")[:1], jax.devices("cpu")[:1]
    h, ours, loss = solved(gpu, w, x, config)
    oracle = x.astype(np.float64).T @ x.astype(np.float64)
    assert np.abs(np.asarray(h.xx) - oracle).max() < 1e-5 * np.abs(oracle).max()  # TF32 would be off by 1e-4
    _, _, reference = solved(cpu, w, x, config)
    # Ties that fall the other way change what comes after them in a row, hence not the codes but the objective is compared.
    damped = oracle + damping(oracle, 448 / 2048)
    error = ours - w
    np.testing.assert_allclose(loss.sum(), np.einsum("oi,ij,oj->", error, damped, error), rtol=1e-3)
    np.testing.assert_allclose(loss.sum(), reference.sum(), rtol=1e-2)


def damping(h: np.ndarray, damp: float) -> np.ndarray:
    return damp * np.diag(h).mean() * np.eye(len(h))


def test_jax_leaves_the_memory_of_the_gpu_to_torch() -> None:
    """Behind `gptq_fn_interop` JAX takes what it needs and not three quarters of the GPU, of which other processes may hold some."""
    program = (
        "import torch, gptq_fn_interop, jax.numpy as jnp\n"
        "before, total = torch.cuda.mem_get_info()\n"
        "held = jnp.ones((1024, 1024)) @ jnp.ones((1024, 1024))\n"
        "assert float(held[0, 0]) == 1024\n"
        "assert before - torch.cuda.mem_get_info()[0] < 0.2 * total"
    )
    free, total = torch.cuda.mem_get_info()
    if free < 0.4 * total:
        pytest.skip("other processes leave too little of the GPU to tell")
    asked_by_nobody = {name: value for name, value in os.environ.items() if not name.startswith("XLA_PYTHON_CLIENT")}
    subprocess.run([sys.executable, "-c", program], env=asked_by_nobody, check=True)


def test_the_door_takes_tensors_of_a_gpu() -> None:
    t = torch.randn(33, 7, dtype=torch.bfloat16, device="cuda")
    a = to_jax(t)
    assert next(iter(a.devices())).platform == "gpu"
    expected = t.cpu().clone()
    t.zero_()  # would be seen in memory that is shared
    assert torch.equal(to_torch(a), expected)
