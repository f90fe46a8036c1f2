"""The CPU's vector loops multiply with what the tensors stand for, as accurately as a dense layer, and say what they lack."""

import importlib.util
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from gptq_fn_kernels import Packed, Prepared, choose, explain, matmul, multiply, prepare, problem_of
from gptq_fn_kernels.cpu import vectors
from gptq_writer import SCALE_DTYPES, Linear, Scheme, random_linear
from hypothesis import given, settings
from hypothesis import strategies as st

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
seeds = st.integers(0, 2**32 - 1)
many = settings(max_examples=60)


def packed_of(linear: Linear, scheme: Scheme) -> Packed:
    return Packed(**linear.tensors, bits=scheme.bits, zero_offset=1 if scheme.zeros == "v1" else 0)


def prepared_of(
    inputs: int, outputs: int, scheme: Scheme, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Prepared, torch.Tensor]:
    """A prepared weight and, in float64, what it stands for."""
    linear = random_linear(np.random.default_rng(seed), inputs, outputs, scheme)
    return prepare(packed_of(linear, scheme), dtype, "cpu_vectors"), torch.from_numpy(linear.weight)


def activations(rows: int, inputs: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """With a mean, which shows what is lost where zero points are subtracted late."""
    return (1 + torch.randn(rows, inputs, generator=torch.Generator().manual_seed(seed))).to(dtype)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    return Scheme(
        bits=draw(st.sampled_from(BITS)),
        group_size=draw(st.sampled_from((-1, 1, 8, 16, 24, 32, 128))),
        sym=draw(st.booleans()),
        desc_act=draw(st.booleans()),
        zeros=draw(st.sampled_from(("v1", "v2"))),
        scales=draw(st.sampled_from(SCALE_DTYPES)),
    )


@many
@given(
    schemes(),
    st.integers(1, 420),
    st.integers(1, 200),
    st.sampled_from((1, 2, 4, 7, 16, 17, 33, 50)),
    st.sampled_from(DTYPES),
    st.booleans(),
    seeds,
)
def test_the_product_is_as_accurate_as_a_dense_layers(
    scheme: Scheme, inputs: int, outputs: int, rows: int, dtype: torch.dtype, strided: bool, seed: int
) -> None:
    if scheme.bits == 3:  # 32 codes fill three words, and no writer leaves a chunk unfinished
        inputs, outputs = 32 * -(-inputs // 32), 32 * -(-outputs // 32)
    prepared, weight = prepared_of(inputs, outputs, scheme, dtype, seed)
    x = activations(rows, inputs, dtype, seed)
    y = multiply(x.T.contiguous().T if strided else x, prepared)
    assert y.dtype == dtype
    assert y.shape == (rows, outputs)
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.T.abs()  # a sum whose terms cancel is as accurate as they are
    dense = relative(torch.nn.functional.linear(x, weight.to(dtype)), exact)
    allowed = 5e-7 + 2e-7 * float(terms.norm() / exact.norm().clamp_min(1e-300)) if dtype == torch.float32 else 1.5 * dense + 1e-3
    assert relative(y, exact) < allowed


@pytest.mark.parametrize("bits", BITS)
def test_panels_are_the_weight_rounded_once(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One input at a time: the identity's product is the weight itself, over several panels."""
    monkeypatch.setattr(vectors, "_PANEL", 96 * 64 * 4)
    scheme = Scheme(bits, 24, sym=False, desc_act=True)
    for dtype in (torch.float32, torch.bfloat16):
        prepared, weight = prepared_of(96, 224, scheme, dtype)
        assert torch.equal(multiply(torch.eye(96, dtype=dtype), prepared).T, weight.float().to(dtype))


@many
@given(schemes(), st.integers(1, 32), seeds)
def test_rows_are_what_they_are_alone(scheme: Scheme, rows: int, seed: int) -> None:
    prepared, _ = prepared_of(160, 96, scheme, seed=seed)
    x = activations(rows, 160, torch.float32, seed)
    together = multiply(x, prepared)
    assert torch.equal(together, torch.cat([multiply(row[None], prepared) for row in x]))
    both = multiply(torch.cat([x] * 40), prepared)[:rows]  # so many go through panels, which sum in another order
    assert relative(both, together) < 1e-6


def test_rounding_errors_hardly_grow_with_the_inputs() -> None:
    for group_size in (32, -1):
        prepared, weight = prepared_of(32_768, 64, Scheme(4, group_size))
        x = activations(1, 32_768, torch.float32, 0)
        assert relative(multiply(x, prepared), x.double() @ weight.T) < 5e-7


@pytest.mark.parametrize("rows", [1, 9, 64])
def test_the_same_input_gives_the_same_bits_in_any_number_of_threads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_THREAD", 1)
    prepared, _ = prepared_of(512, 640, Scheme(4, 64))
    x = activations(rows, 512, torch.float32, 0)
    found = []
    for count in (1, 2, 2, 7):
        # Only the loops' threads: torch's own matmul of a panel may sum in another order in another number of threads.
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        found.append(multiply(x, prepared))
    assert all(torch.equal(y, found[0]) for y in found)


def test_several_threads_may_multiply_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    prepared, _ = prepared_of(512, 640, Scheme(4, 64))
    xs = [activations(1 + i, 512, torch.float32, i) for i in range(6)]
    expected, found = [multiply(x, prepared) for x in xs], {}

    def work(i: int) -> None:
        for _ in range(20):
            found[i] = multiply(xs[i], prepared)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(xs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(found[i], y) for i, y in enumerate(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows_one_vector_and_many_axes(dtype: torch.dtype) -> None:
    prepared, _ = prepared_of(64, 40, Scheme(), dtype)
    x = activations(6, 64, dtype, 0)
    y = multiply(x, prepared)
    assert multiply(x[:0], prepared).shape == (0, 40)
    assert torch.equal(multiply(x[0], prepared), y[0])
    assert torch.equal(multiply(x.reshape(2, 3, 64).transpose(0, 1), prepared), y.reshape(2, 3, 40).transpose(0, 1))


def test_a_group_without_inputs_changes_nothing() -> None:
    linear = random_linear(np.random.default_rng(0), 64, 32, Scheme(4, 16))
    tensors = {**linear.tensors, "g_idx": torch.where(linear.tensors["g_idx"] == 1, 3, linear.tensors["g_idx"]).int()}
    packed = Packed(**tensors, bits=4, zero_offset=1)
    x = activations(3, 64, torch.float32, 0)
    torch.testing.assert_close(matmul(x, packed, "cpu_vectors"), matmul(x, packed, "reference"))


@pytest.mark.parametrize("rows", [0, 1, 40])
def test_the_operator_is_described_as_it_is(rows: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        form = prepared_of(64, 40, Scheme(), dtype)[0].form
        arguments = (activations(rows, 64, dtype, 0), form.words, form.scales, form.zeros, form.runs, form.inputs, form.n, form.bits)
        torch.library.opcheck(torch.ops.gptq_fn.cpu_vectors.default, arguments)
        grad = activations(rows, 40, dtype, 0)
        torch.library.opcheck(torch.ops.gptq_fn.cpu_vectors_gradient.default, (grad, *arguments[1:6], form.k, form.bits))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("rows", [0, 1, 5, 40])
def test_gradients_pass(dtype: torch.dtype, tolerance: float, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through one panel and through several, the last of them with fewer outputs than it has room for."""
    prepared, weight = prepared_of(64, 288, Scheme(3, 24), dtype)
    for room in (vectors._PANEL, 64 * 64 * dtype.itemsize):
        monkeypatch.setattr(vectors, "_PANEL", room)
        x = activations(rows, 64, dtype, 0).requires_grad_()
        y = multiply(x, prepared)
        grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        y.backward(grad)
        exact = grad.double() @ weight.double()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        assert (x.grad.double() - exact).norm() <= tolerance * exact.norm()


def test_it_says_what_it_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = packed_of(random_linear(np.random.default_rng(0), 64, 32, Scheme()), Scheme())
    problem = problem_of(packed, torch.float32)
    assert choose(problem).name == "cpu_vectors"
    assert "not on cuda" in str(vectors.unsupported(replace(problem, device="cuda")))
    assert "not torch.float64" in str(vectors.unsupported(replace(problem, dtype=torch.float64)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert choose(problem).name == "reference"
    assert "pip install numba" in str(explain(problem)["cpu_vectors"])
    with pytest.raises(ValueError, match="Backend 'cpu_vectors' does not serve"):
        matmul(torch.ones(1, 64), packed, backend="cpu_vectors")


def test_numba_is_imported_when_it_is_needed() -> None:
    code = "import sys, gptq_fn_kernels.registry; assert not {'numba', 'llvmlite'} & {m.split('.')[0] for m in sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
