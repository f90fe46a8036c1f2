"""The Triton tier computes x W^T: under Triton's interpreter everywhere, compiled on a GPU, and compiled without one for several."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gptq_fn_kernels import Packed, dequantize, explain, problem_of
from gptq_fn_kernels.triton import backend
from gptq_fn_kernels.triton.layout import FROM_TRITON, chunk_of, pack_words, unpack_words
from gptq_fn_kernels.triton.plan import Gpu, constants_of, plan_of
from gptq_fn_kernels.triton.weight import prepare
from gptq_writer import SCALE_DTYPES, Linear, Scheme, random_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreter

BITS = (2, 3, 4, 8)
GROUPS = (-1, 8, 16, 24, 32, 48, 64, 96, 128, 256)
seeds = st.integers(0, 2**32 - 1)
H100 = Gpu(132, 232448, True, True)


def packed_of(linear: Linear, scheme: Scheme, device: str = "cpu") -> Packed:
    tensors = {name: tensor.to(device) for name, tensor in linear.tensors.items()}
    return Packed(**tensors, bits=scheme.bits, zero_offset=1 if scheme.zeros == "v1" else 0)


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    return Scheme(
        bits=draw(st.sampled_from(BITS)),
        group_size=draw(st.sampled_from(GROUPS)),
        sym=draw(st.booleans()),
        desc_act=draw(st.booleans()),
        zeros=draw(st.sampled_from(("v1", "v2"))),
        scales=draw(st.sampled_from(SCALE_DTYPES)),
    )


@st.composite
def linears(draw: st.DrawFn) -> tuple[Linear, Scheme]:
    scheme = draw(schemes())
    step = 32 if scheme.bits == 3 else 4
    inputs, outputs = step * draw(st.integers(1, 640 // step)), step * draw(st.integers(1, 160 // step))
    return random_linear(np.random.default_rng(draw(seeds)), inputs, outputs, scheme), scheme


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


# layout


@settings(max_examples=20)
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 5), seeds)
def test_words_hold_every_code(bits: int, chunks: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, chunks * chunk_of(bits))).astype(np.int32)
    words, high = pack_words(torch.from_numpy(codes), bits)
    assert words.shape == (chunks, n, 16)
    assert torch.equal(unpack_words(words, high, bits, torch.stack), torch.from_numpy(codes))
    assert np.array_equal(unpack_words(*pack_words(codes, bits), bits, np.stack), codes)
    assert (high is None) == (bits != 3)
    assert words.numel() * 32 + (0 if high is None else high.numel() * 16) == bits * codes.size


@settings(max_examples=40)
@given(linears())
def test_the_prepared_weight_is_the_weight(drawn: tuple[Linear, Scheme]) -> None:
    linear, scheme = drawn
    w = prepare(packed_of(linear, scheme))
    words, high = (None if part is None else part[..., FROM_TRITON] for part in (w.words, w.high))
    codes = unpack_words(words, high, w.bits, torch.stack).double()
    zeros = torch.full_like(w.scales, 2 ** (w.bits - 1), dtype=torch.float64) if w.zeros is None else w.zeros.double()
    groups = torch.arange(w.width) // w.group
    weight = (codes - zeros.T[:, groups]) * w.scales.double().T[:, groups]
    inputs = torch.arange(w.width).where(torch.arange(w.width) < w.k, w.k) if w.gather is None else w.gather.long()
    expected = torch.cat([torch.from_numpy(linear.weight), torch.zeros(w.n, 1, dtype=torch.float64)], 1)
    # Without a gather, slots behind the last input are never multiplied.
    used = slice(w.k) if w.gather is None else slice(None)
    assert torch.equal(weight[:, used], expected[:, inputs][:, used])
    assert sorted(inputs[inputs < w.k].tolist()) == list(range(w.k))


# the choice


@settings(max_examples=200)
@given(
    st.integers(1, 70_000),
    st.integers(1, 300_000),
    st.integers(1, 60_000),
    st.sampled_from(BITS),
    st.sampled_from((2, 4)),
    st.sampled_from((H100, Gpu(40, 65_536, False, False), Gpu(108, 166_912, True, False), Gpu(128, 101_376, True, False))),
)
def test_every_plan_fits_the_gpu(m: int, n: int, k: int, bits: int, itemsize: int, gpu: Gpu) -> None:
    plan = plan_of(m, n, k, bits=bits, itemsize=itemsize, gpu=gpu)
    if m == 1:
        assert plan is not None
    if plan is not None:
        assert plan.stages >= 1
        assert plan.kernel == "many_rows" or m <= plan.rows
        parts = plan.split if plan.kernel == "few_rows" else 1
        assert plan.stages * parts * (plan.outputs * 64 + chunk_of(bits) * plan.rows * itemsize) <= gpu.shared


def test_many_rows_are_dequantized_once() -> None:
    assert plan_of(4096, 4096, 4096, bits=4, itemsize=2, gpu=H100) is None


def test_reasons() -> None:
    scheme = Scheme()
    problem = problem_of(packed_of(random_linear(np.random.default_rng(0), 64, 32, scheme), scheme), torch.float16)
    assert backend.unsupported(problem) == "runs on a GPU, not on cpu"
    assert backend.unsupported(replace(problem, device="cuda")) is None
    assert "not torch.float64" in str(backend.unsupported(replace(problem, device="cuda", dtype=torch.float64)))
    assert "32 bits" in str(backend.unsupported(replace(problem, device="cuda", n=2**18, k=2**18)))
    assert "triton" in explain(problem)


# the product


def exact_of(x: torch.Tensor, packed: Packed) -> torch.Tensor:
    return x.double() @ dequantize(packed, torch.float64).T


def check(packed: Packed, x: torch.Tensor, exact: torch.Tensor) -> None:
    """As accurate as the dense layer with the weight rounded to x's dtype, the same again, and wherever x lies in memory."""
    weight = prepare(packed)
    y = backend.matmul(x, weight)
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    tolerance = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 2e-6}[x.dtype]
    assert relative(y, exact) < tolerance, (x.shape, x.dtype, weight.bits, weight.group)
    assert torch.equal(backend.matmul(x, weight), y)
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=x.device)
    padded[..., : x.shape[-1]] = x
    assert torch.equal(backend.matmul(padded[..., : x.shape[-1]], weight), y)
    assert torch.equal(backend.matmul(x.T.contiguous().T, weight), y)
    found = backend.gradient(y, weight)
    assert found.shape == x.shape
    assert relative(found, y.double() @ dequantize(packed, torch.float64)) < tolerance


@interpreter
@settings(max_examples=8)
@given(linears(), st.sampled_from((1, 3, 9, 20)), st.sampled_from((torch.float16, torch.float32)), seeds)
def test_products_in_the_interpreter(drawn: tuple[Linear, Scheme], m: int, dtype: torch.dtype, seed: int) -> None:
    packed = packed_of(*drawn)
    x = torch.randn(m, packed.k, generator=torch.Generator().manual_seed(seed)).to(dtype)
    check(packed, x, exact_of(x, packed))


@interpreter
@pytest.mark.parametrize("m", [0, 12, 40, 400])
def test_every_plan_in_the_interpreter(m: int) -> None:
    scheme = Scheme(3, 64, sym=False, desc_act=True)
    packed = packed_of(random_linear(np.random.default_rng(m), 544, 96, scheme), scheme)
    x = torch.randn(m, packed.k, dtype=torch.float16)
    check(packed, x, exact_of(x, packed))


@interpreter
def test_operators_in_the_interpreter() -> None:
    scheme = Scheme(4, 32, desc_act=True)
    packed = packed_of(random_linear(np.random.default_rng(0), 96, 40, scheme), scheme)
    weight, utilities = prepare(packed), ("test_schema", "test_faketensor")
    arguments = (list(weight.parts), weight.bits, weight.group, weight.k)
    torch.library.opcheck(torch.ops.gptq_fn.triton_multiply.default, (torch.randn(3, 96).half(), *arguments), test_utils=utilities)
    torch.library.opcheck(torch.ops.gptq_fn.triton_gradient.default, (torch.randn(3, 40).half(), *arguments), test_utils=utilities)


@pytest.mark.parametrize(
    ("name", "dtype", "bits", "capability", "instruction"),
    [
        ("few_rows", "fp16", 4, 90, "mma.sync.aligned.m16n8k16"),
        ("many_rows", "bf16", 3, 90, "wgmma.mma_async"),
        ("many_rows", "fp16", 4, 80, "mma.sync.aligned.m16n8k16"),
        ("dequantized", "fp32", 8, 80, "st.global"),
        ("gathered", "fp16", 4, 75, "st.global"),
    ],
)
def test_kernels_compile_for_gpus_that_are_not_here(name: str, dtype: str, bits: int, capability: int, instruction: str) -> None:
    import triton
    from gptq_fn_kernels.triton import kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = dict.fromkeys(("x", "y", "weight"), f"*{dtype}") | {"words": "*i32", "high": "*i16", "scales": "*fp16", "gather": "*i32"}
    blocks = {"BM": 8 if name == "few_rows" else 64, "BN": 16 if name == "few_rows" else 64, "SPLIT": 4, "STAGES": 2, "PRECISION": "ieee"}
    around = {"norm": None, "bias": None, "plus": None, "ONE": True, "WIDTH": 1, "EPS": 0.0, "OFFSET": 0.0, "GATE": 0.0, "BEND": 0.0}
    given = {"zeros": None, "OVERLAP": capability >= 90, "BLOCK": 256, **around, **blocks, **constants_of(bits, 32, dtype == "bf16")}
    if bits != 3:
        given["high"] = None
    given = {argument: value for argument, value in given.items() if argument in getattr(kernels, name).arg_names}
    arguments = getattr(kernels, name).arg_names
    signature = {argument: "constexpr" if argument in given else pointers.get(argument, "i32") for argument in arguments}
    source = ASTSource(getattr(kernels, name), signature, given, {})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    assert instruction in made.asm["ptx"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=12, deadline=None)
@given(linears(), st.integers(1, 600), seeds)
def test_products_on_a_gpu(part: int, dtype: torch.dtype, drawn: tuple[Linear, Scheme], m: int, seed: int) -> None:
    packed = packed_of(*drawn, "cuda")
    x = torch.randn(m, packed.k, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()
    check(packed, x, exact_of(x, packed))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("k", "n"), [(576, 1536), (4096, 1024), (1536, 576), (11008, 4096), (896, 151_936)])
def test_shapes_of_models_on_a_gpu(k: int, n: int, bits: int) -> None:
    scheme = Scheme(bits, 128, sym=bits != 8)
    packed = packed_of(random_linear(np.random.default_rng(bits), k, n, scheme), scheme, "cuda")
    weight, prepared = dequantize(packed, torch.float64), prepare(packed)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        dense = weight.to(dtype)
        for m in (1, 3, 8, 16, 24, 48, 96, 200, 300, 700):
            x = torch.randn(m, k, device="cuda").to(dtype)
            exact = x.double() @ weight.T
            y = backend.matmul(x, prepared)
            assert relative(y, exact) < max(1.2 * relative(x @ dense.T, exact), 1e-6) + (0 if dtype == torch.float32 else 1e-4)
