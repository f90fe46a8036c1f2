"""The Triton kernel of the column loop rounds as the plain loops do: in Triton's interpreter, compiled without a GPU, and on one."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_kernels.jax import columns
from interpreter import interpreter

from gptq_fn import Hessian, QuantConfig, Runtime, factor, quantize_linears, solve
from gptq_fn._grid import Grid, find_grid
from gptq_fn._solve import Rounded, round_in_loops
from gptq_fn.kernels import round_block
from gptq_fn.testing import hessian_of

WIDTHS = (16, 32, 48, 64, 128)
OUT = 21
"""Rows that no program divides."""


def block_of(width: int, bits: int, *, each: bool, seed: int = 0) -> tuple[jax.Array, jax.Array, Grid]:
    """Weights [width, OUT], a factor's square and a grid of the whole block or of each of its columns."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.normal(size=(width, OUT)), jnp.float32)
    upper = jnp.asarray(np.triu(rng.normal(size=(width, width)) / width**0.5, 1) + np.diag(rng.uniform(0.5, 2, width)), jnp.float32)
    grid = find_grid(w.T, bits=bits, sym=bits == 4, method="minmax")
    if not each:
        return w, upper, Grid(*(a[None] for a in grid))
    return (
        w,
        upper,
        Grid(grid.scale[None] * jnp.asarray(rng.uniform(0.8, 1.2, (width, 1)), jnp.float32), jnp.broadcast_to(grid.zero, (width, OUT))),
    )


def assert_alike(found: Rounded, w: jax.Array, upper: jax.Array, grid: Grid, bits: int) -> None:
    """Codes are those of the plain loops, or where a float fell on a tie those of rows that are as good."""
    codes, errors = (np.asarray(a) for a in found)
    expected, exact = (np.asarray(a) for a in round_in_loops(w, upper, grid, bits))
    assert codes.dtype == np.uint8
    assert errors.dtype == np.float32
    same = (codes == expected).all(0)
    assert same.mean() > 0.9
    np.testing.assert_allclose(errors[:, same], exact[:, same], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose((errors**2).sum(), (exact**2).sum(), rtol=1e-3 if same.all() else 0.05)


# in the interpreter


def _launched(kernel: str, inputs: dict[str, Any], outs: list[Any], grid: tuple[int, ...], constants: dict[str, Any], *, warps: int) -> Any:
    """What `launch` does, by Triton's interpreter, called back from JAX programs."""
    import torch
    from gptq_fn_kernels.triton import columns as kernels

    assert (kernel, warps) == ("columns.round_columns", 1)

    def call(*arrays: np.ndarray) -> list[np.ndarray]:
        tensors = {name: torch.tensor(np.asarray(a)) for name, a in zip(inputs, arrays, strict=True)}
        codes, errors = torch.full(outs[0].shape, 255, dtype=torch.uint8), torch.full(outs[1].shape, float("nan"))
        kernels.round_columns[grid](**tensors, codes=codes, errors=errors, **constants)
        return [codes.numpy(), errors.numpy()]

    return jax.pure_callback(call, outs, *inputs.values())


def _by_kernel(w: jax.Array, upper: jax.Array, grid: Grid, bits: int) -> Rounded:
    return columns.round_columns(w, upper, *grid, bits)


@interpreter
@pytest.mark.parametrize(("width", "bits", "each"), [(16, 4, False), (32, 3, True), (48, 2, False), (64, 8, True), (128, 4, False)])
def test_blocks_in_the_interpreter(width: int, bits: int, each: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "launch", _launched)
    block = block_of(width, bits, each=each)
    assert_alike(_by_kernel(*block, bits), *block, bits)


@interpreter
def test_ties_go_to_the_even_level_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "launch", _launched)
    values = jnp.asarray([-2e9, -9.0, -8.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.5, 9.0, 2e9, 0.0, -0.0, 1e-30])
    w, grid = jnp.tile(values[:, None], (1, OUT)), Grid(jnp.ones((1, OUT)), jnp.full((1, OUT), 8.0))
    codes = _by_kernel(w, jnp.eye(16), grid, 4)[0]
    np.testing.assert_array_equal(codes[:, 0], np.clip(np.round(np.asarray(values)) + 8, 0, 15))
    np.testing.assert_array_equal(codes, round_in_loops(w, jnp.eye(16), grid, 4)[0])


@interpreter
@pytest.mark.parametrize("config", [QuantConfig(4, 16, sym=False), QuantConfig(3, 16, static_groups=True)], ids=["fitted", "static"])
def test_solving_many_at_once_in_the_interpreter(config: QuantConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under vmap and jit, inside the solver's scans, the kernel gives what each problem alone gives."""
    monkeypatch.setattr(columns, "launch", _launched)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(2, 5, 32)), jnp.float32)
    h = jax.tree.map(lambda *a: jnp.stack(a), *(hessian_of(jnp.asarray(rng.normal(size=(99, 32)), jnp.float32)) for _ in range(2)))

    @partial(jax.jit, static_argnames="rounds")
    @partial(jax.vmap, in_axes=(0, 0, None))
    def solved(w: jax.Array, h: Hessian, rounds: Any) -> Any:
        return solve(w, factor(h, config), config, rounds)

    (found, loss), (plain, exact) = solved(w, h, _by_kernel), solved(w, h, round_in_loops)
    assert (np.asarray(found.codes) == np.asarray(plain.codes)).mean() > 0.99
    np.testing.assert_allclose(loss.sum(), exact.sum(), rtol=1e-3)


# compiled


@pytest.mark.parametrize(("columns_", "bits", "each", "capability"), [(128, 4, False, 90), (48, 3, True, 90), (32, 2, False, 80)])
def test_the_kernel_compiles_for_gpus_that_are_not_here(columns_: int, bits: int, each: bool, capability: int) -> None:
    import triton
    from gptq_fn_kernels.jax.launch import source_of
    from triton.backends.compiler import GPUTarget

    numbers = columns.constants_of(columns_, 4096, bits, each=each, rows=columns.ROWS)
    inputs = [(name, "*fp32") for name in ("w", "upper", "scale", "zero")]
    source = source_of("columns.round_columns", inputs, ["*u8", "*fp32"], list(numbers.items()))
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
    ptx = made.asm["ptx"]
    assert "div.rn.f32" in ptx  # as exact as XLA's, unlike div.full
    assert ".local " not in ptx  # the block stays in registers


def test_machines_without_gpus_round_in_loops() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("this machine has one")
    assert round_block() is round_in_loops


# on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("each", [False, True], ids=["one grid", "a grid each"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [*WIDTHS, 7, 100])
def test_blocks_on_a_gpu(width: int, bits: int, each: bool) -> None:
    rounds = round_block()
    assert rounds is round_block()
    assert rounds is not round_in_loops
    block = block_of(width, bits, each=each)
    assert_alike(jax.jit(rounds, static_argnums=3)(*block, bits), *block, bits)


@pytest.mark.gpu
def test_many_blocks_on_a_gpu() -> None:
    """Under vmap, with and without a shared factor, and inside a scan."""
    blocks = [block_of(64, 4, each=False, seed=seed) for seed in range(3)]
    w, upper, grid = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
    rounds = round_block()

    def one(w: jax.Array, upper: jax.Array, grid: Grid) -> Rounded:
        return rounds(w, upper, grid, 4)

    for n, found in enumerate(zip(*jax.jit(jax.vmap(one))(w, upper, grid), strict=True)):
        assert_alike(found, *blocks[n], 4)
    for n, found in enumerate(zip(*jax.jit(jax.vmap(one, (0, None, 0)))(w, upper[0], grid), strict=True)):
        assert_alike(found, blocks[n][0], upper[0], blocks[n][2], 4)
    scanned = jax.jit(lambda *blocks: jax.lax.scan(lambda _, block: (None, one(*block)), None, blocks)[1])(w, upper, grid)
    for n, found in enumerate(zip(*scanned, strict=True)):
        assert_alike(found, *blocks[n], 4)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(4, 128),
        QuantConfig(3, 64, sym=False, order="natural", grid="mse"),
        QuantConfig(4, 32, order="act"),
        QuantConfig(2, 128, order="act", static_groups=True),
        QuantConfig(8, None, order="act"),
        QuantConfig(4, 256, sym=False),
        QuantConfig(3, 64, grid="loop", negative_scales=True),
        QuantConfig(4, 256, grid="loop"),
    ],
    ids=str,
)
def test_solutions_on_a_gpu_lose_as_little_as_the_plain_ones(config: QuantConfig) -> None:
    rng = np.random.default_rng(0)
    mixing = np.eye(1200) + rng.normal(size=(1200, 1200)) / 1200**0.5
    h = hessian_of(jnp.asarray(rng.normal(size=(4096, 1200)) @ mixing, jnp.float32))
    w = {name: {"weight": jnp.asarray(rng.normal(size=(out, 1200)), jnp.float32)} for name, out in (("a", 500), ("b", 71))}
    losses = {}
    for name, runtime in {"kernel": Runtime(round_block=round_block()), "plain": Runtime()}.items():
        found = quantize_linears(w, h, dict.fromkeys(w, config), runtime=runtime)
        losses[name] = sum(report.error**2 * len(w[linear]["weight"]) for linear, _, report in found)
    assert losses["kernel"] < 1.001 * losses["plain"]
