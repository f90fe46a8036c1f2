"""Every backend computes x W^T for the W that the tensors stand for, says what it does not do, and lets gradients through."""

import subprocess
import sys

import gptq_fn_kernels
import numpy as np
import pytest
import torch
from gptq_fn_kernels import BACKENDS, Backend, Packed, choose, dequantize, explain, matmul, problem_of
from gptq_fn_kernels.words import pack, unpack, words_of
from gptq_writer import SCALE_DTYPES, Linear, Scheme, random_linear, stream
from hypothesis import given, settings
from hypothesis import strategies as st

few = settings(max_examples=40)
BITS = (2, 3, 4, 8)
seeds = st.integers(0, 2**32 - 1)


def packed_of(linear: Linear, scheme: Scheme) -> Packed:
    return Packed(**linear.tensors, bits=scheme.bits, zero_offset=1 if scheme.zeros == "v1" else 0)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Any scheme that the kernels take; "v1" with a zero point of 0 wraps around to a field of all ones."""
    sym = draw(st.booleans())
    return Scheme(
        bits=draw(st.sampled_from(BITS)),
        group_size=draw(st.sampled_from((-1, 8, 32, 64))),
        sym=sym,
        desc_act=draw(st.booleans()),
        zeros=draw(st.sampled_from(("v1", "v2"))),
        scales=draw(st.sampled_from(SCALE_DTYPES)),
    )


@st.composite
def linears(draw: st.DrawFn) -> tuple[Linear, Scheme]:
    scheme = draw(schemes())
    step = 32 if scheme.bits == 3 else 4  # 2, 4 and 8 bits may leave a last word partly empty
    inputs, outputs = step * draw(st.integers(1, 96 // step)), step * draw(st.integers(1, 64 // step))
    return random_linear(np.random.default_rng(draw(seeds)), inputs, outputs, scheme), scheme


# layouts


@few
@given(linears())
def test_a_prepared_weight_tells_its_codes(drawn: tuple[Linear, Scheme]) -> None:
    linear, scheme = drawn
    packed = packed_of(linear, scheme)
    for backend in BACKENDS:
        if backend.restored and (scheme.bits in (4, 8) or backend.name not in ("cuda", "multistage")):
            assert torch.equal(backend.restored(backend.prepare(packed)), packed.qweight), backend.name


# words


@few
@given(st.sampled_from(BITS), st.integers(1, 3), st.integers(1, 3), seeds)
def test_words_are_the_bit_stream(bits: int, chunks: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (32 * chunks, columns)).astype(np.int32)
    words = stream(codes, bits)
    np.testing.assert_array_equal(pack(codes, bits, np), words)
    np.testing.assert_array_equal(unpack(words, bits, len(codes), np), codes)
    assert torch.equal(pack(torch.from_numpy(codes), bits, torch), torch.from_numpy(words))
    assert torch.equal(unpack(torch.from_numpy(words), bits, len(codes), torch), torch.from_numpy(codes))


def test_words_are_imported_without_torch() -> None:
    code = "import sys, gptq_fn_kernels.words; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_exists() -> None:
    assert all(getattr(gptq_fn_kernels, name) is not None for name in gptq_fn_kernels.__all__)
    assert set(gptq_fn_kernels.__all__) <= set(dir(gptq_fn_kernels))
    with pytest.raises(AttributeError, match="no attribute 'marlin'"):
        _ = gptq_fn_kernels.marlin


# the weight


@few
@given(linears())
def test_dequantize_is_exact_in_float64_and_rounded_once_below(drawn: tuple[Linear, Scheme]) -> None:
    linear, scheme = drawn
    expected, packed = torch.from_numpy(linear.weight), packed_of(linear, scheme)
    assert torch.equal(dequantize(packed, torch.float64), expected)
    assert torch.equal(dequantize(packed, torch.float32), expected.float())
    assert torch.equal(dequantize(packed, torch.bfloat16), expected.float().bfloat16())


def test_large_weights_are_dequantized_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptq_fn_kernels.reference._BLOCK", 32 * 64)
    for bits in BITS:
        linear = random_linear(np.random.default_rng(bits), 160, 64, Scheme(bits, 48, desc_act=True))
        assert torch.equal(dequantize(packed_of(linear, Scheme(bits)), torch.float64), torch.from_numpy(linear.weight))


@few
@given(st.integers(1, 96), st.integers(1, 128), seeds)
def test_group_size_is_read_from_g_idx(inputs: int, size: int, seed: int) -> None:
    scheme = Scheme(8, size)
    regular = packed_of(random_linear(np.random.default_rng(seed), inputs, 4, scheme), scheme)
    assert regular.group_size == min(size, inputs)
    shuffled = np.random.default_rng(seed).permutation(regular.g_idx.numpy())
    irregular = Packed(regular.qweight, regular.qzeros, regular.scales, torch.from_numpy(shuffled), 8, 1)
    assert (irregular.group_size is None) == bool((shuffled != regular.g_idx.numpy()).any())


def test_symmetry_is_read_from_the_zero_points() -> None:
    for bits in BITS:
        for zeros in ("v1", "v2"):
            scheme = Scheme(bits, zeros=zeros)
            linear = random_linear(np.random.default_rng(0), 64, 32, scheme)
            assert packed_of(linear, scheme).symmetric
            assert not packed_of(linear, scheme._replace(zeros="v2" if zeros == "v1" else "v1")).symmetric


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 5}, "2, 3, 4 or 8 bits"),
        ({"bits": 8}, "Check the bits"),
        ({"zero_offset": 2}, "zero_offset"),
        ({"qweight": torch.zeros(8, 31, dtype=torch.int32)}, r"qweight is \(8, 31\) but must be \(8, 32\)"),
        ({"qzeros": torch.zeros(2, 3, dtype=torch.int32)}, "qzeros is"),
        ({"qzeros": torch.zeros(2, 4, dtype=torch.int64)}, "words of torch.int32"),
        ({"scales": torch.zeros(2, 32, dtype=torch.int32)}, "scales are floating"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(change: dict, message: str) -> None:
    tensors = random_linear(np.random.default_rng(0), 64, 32, Scheme()).tensors
    with pytest.raises(ValueError, match=message):
        Packed(**{**tensors, "bits": 4, "zero_offset": 1, **change})


def test_a_group_that_does_not_exist_is_refused() -> None:
    tensors = random_linear(np.random.default_rng(0), 64, 32, Scheme()).tensors
    tensors["g_idx"][3] = 2
    with pytest.raises(ValueError, match="g_idx reaches from 0 to 2 but there are 2 groups"):
        matmul(torch.ones(1, 64), Packed(**tensors, bits=4, zero_offset=1))


# the product


@few
@given(linears(), st.sampled_from((torch.float16, torch.bfloat16, torch.float32, torch.float64)), seeds)
def test_the_reference_is_the_dense_layer(drawn: tuple[Linear, Scheme], dtype: torch.dtype, seed: int) -> None:
    linear, scheme = drawn
    packed, weight = packed_of(linear, scheme), torch.from_numpy(linear.weight)
    x = torch.randn(3, packed.k, 2, generator=torch.Generator().manual_seed(seed)).to(dtype).transpose(1, 2)
    y = matmul(x, packed, backend="reference")
    assert y.dtype == dtype
    assert y.shape == (3, 2, packed.n)
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert relative(y, x.double() @ weight.T) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows_and_one_vector(dtype: torch.dtype) -> None:
    linear = random_linear(np.random.default_rng(0), 64, 32, Scheme())
    packed, x = packed_of(linear, Scheme()), torch.randn(64).to(dtype)
    assert matmul(x[None][:0], packed).shape == (0, 32)
    assert matmul(x, packed).shape == (32,)
    assert torch.equal(matmul(x, packed), matmul(x[None], packed)[0])


def test_activations_of_another_width_are_refused() -> None:
    packed = packed_of(random_linear(np.random.default_rng(0), 64, 32, Scheme()), Scheme())
    with pytest.raises(ValueError, match=r"63 features.*64 inputs"):
        matmul(torch.ones(2, 63), packed)


# gradients


@few
@given(linears(), seeds)
def test_gradients_reach_the_activations(drawn: tuple[Linear, Scheme], seed: int) -> None:
    linear, scheme = drawn
    packed = packed_of(linear, scheme)
    x = torch.randn(2, packed.k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    y = matmul(x, packed)
    grad = torch.randn_like(y)
    y.backward(grad)
    torch.testing.assert_close(x.grad, grad @ torch.from_numpy(linear.weight))


def test_every_backend_has_the_gradient_of_the_reference() -> None:
    linear = random_linear(np.random.default_rng(0), 64, 32, Scheme())
    packed, x = packed_of(linear, Scheme()), torch.ones(5, 64, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(5, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    names = [name for name, reason in explain(problem_of(packed, x.dtype)).items() if reason is None]
    assert len(names) > 1
    for name in names:
        (found,) = torch.autograd.grad(matmul(x, packed, backend=name), x, grad)
        assert torch.equal(found, grad @ dequantize(packed, torch.bfloat16))
        with torch.no_grad():
            assert matmul(x, packed, backend=name).grad_fn is None


# the choice

NEVER = Backend("never", lambda _: "is for tests", lambda packed: packed, lambda x, packed: x)
ONES = Backend("ones", lambda _: None, lambda packed: packed.n, lambda x, n: torch.ones(*x.shape[:-1], n))


def test_the_first_that_serves_is_chosen_unless_one_is_named() -> None:
    packed = packed_of(random_linear(np.random.default_rng(0), 64, 32, Scheme()), Scheme())
    problem, mine = problem_of(packed, torch.float32), (NEVER, ONES, *BACKENDS)
    assert choose(problem, backends=mine) is ONES
    assert choose(problem, "reference", mine).name == "reference"
    assert torch.equal(matmul(torch.randn(2, 64), packed, backends=mine), torch.ones(2, 32))


def test_a_failed_choice_lists_every_backend_with_its_reason() -> None:
    packed = packed_of(random_linear(np.random.default_rng(0), 64, 32, Scheme()), Scheme())
    problem = problem_of(packed, torch.float32)
    for wanted, start in (("never", "Backend 'never' does not serve"), ("marlin", "There is no backend 'marlin'")):
        with pytest.raises(ValueError, match=rf"(?s){start}.*never: is for tests.*ones: serves it"):
            choose(problem, wanted, (NEVER, ONES))
    with pytest.raises(ValueError, match=r"(?s)No backend serves Problem\(bits=4.*never: is for tests"):
        choose(problem, backends=(NEVER,))
    with pytest.raises(ValueError, match="multiplies floating activations"):
        matmul(torch.ones(1, 64, dtype=torch.int32), packed)


def test_a_partly_filled_last_word_is_accepted() -> None:
    assert words_of(12, 4) == 2
    scheme = Scheme(4, 4)
    linear = random_linear(np.random.default_rng(0), 12, 20, scheme)
    assert torch.equal(dequantize(packed_of(linear, scheme), torch.float64), torch.from_numpy(linear.weight))


def test_outputs_may_be_changed_in_place() -> None:
    """Adapters add to them; autograd forbids that for views which a function of its own returns."""
    packed = packed_of(random_linear(np.random.default_rng(0), 64, 32, Scheme()), Scheme())
    for backend in ("cpu_vectors", "reference"):
        for shape in ((64,), (3, 64), (2, 3, 64)):
            x = torch.ones(shape, requires_grad=True)
            y = matmul(x, packed, backend=backend)
            y += 1
            y.sum().backward()
            assert x.grad is not None
