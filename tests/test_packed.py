"""Packed parameters compute what the quantized ones do, on CPUs and GPUs, and take the memory of their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_interop.params import write_params
from gptq_fn_interop.stream import load_gptq, save_gptq
from gptq_fn_kernels.jax import Fragments, Rows, fragments, rows
from gptq_fn_kernels.slots import slots_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import built as built  # the fixture
from test_flax import rounded

from gptq_fn import QuantConfig, QuantizedLinear, dequantize, forward, generate, interop, kernels
from gptq_fn.model.linear import Joined, linear
from gptq_fn.model.linear import linears as linears_of

FORMS = {"rows": rows.pack, "fragments": fragments.pack}


@st.composite
def linears(draw: st.DrawFn) -> QuantizedLinear:
    """Linears of any bits and grid: groups of consecutive inputs or of any, one of which may be empty or narrower."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    bits, out, inputs = draw(st.sampled_from([2, 3, 4, 8])), draw(st.sampled_from([1, 5, 24])), draw(st.sampled_from([1, 30, 96, 200, 576]))
    size = draw(st.sampled_from([8, 16, 24, 32, 50, 64, 128, 1024]))
    group_of = np.arange(inputs) // size
    shuffled = draw(st.sampled_from(["no", "act", "any"]))
    if shuffled == "act":
        group_of = rng.permutation(group_of)
    elif shuffled == "any":
        group_of = rng.integers(0, group_of.max() + 2, inputs)
    groups = group_of.max() + 1
    middle = np.full((out, groups), 2 ** (bits - 1))
    zero = middle if draw(st.booleans()) else rng.integers(0, 2**bits, (out, groups))
    scale = rng.uniform(0.5, 2, (out, groups)).astype(draw(st.sampled_from([np.float16, np.float32])))
    return QuantizedLinear(
        jnp.asarray(rng.integers(0, 2**bits, (out, inputs)), jnp.uint8),
        jnp.asarray(scale),
        jnp.asarray(zero, jnp.uint8),
        jnp.asarray(group_of, jnp.int32),
        bits,
        jnp.asarray(rng.standard_normal(out), jnp.float32) if draw(st.booleans()) else None,
    )


def packed(q: QuantizedLinear, form: str) -> Rows | Fragments:
    symmetric = bool((q.zero == 2 ** (q.bits - 1)).all())
    return FORMS[form](q.codes, q.scale, q.zero, np.asarray(q.group_of), q.bits, symmetric, q.bias)


def exact(q: QuantizedLinear, x: np.ndarray) -> np.ndarray:
    """x W^T + b in float64, and the size of what was added."""
    weight = (np.asarray(q.codes, np.float64) - np.asarray(q.zero, np.float64)[:, q.group_of]) * np.asarray(q.scale, np.float64)[
        :, q.group_of
    ]
    return x @ weight.T + (0 if q.bias is None else np.asarray(q.bias, np.float64)), np.abs(x) @ np.abs(weight.T) + 1


multiplied = jax.jit(linear)


@pytest.mark.parametrize("form", FORMS)
@given(linears(), st.sampled_from([1, 3, 7]), st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]), st.integers(0, 2**32 - 1))
def test_packed_linears_multiply_as_their_weights_do(form, q, m, dtype, seed):
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((m, q.shape[1])), dtype)
    y = multiplied(packed(q, form), x)
    assert y.dtype == dtype
    expected, size = exact(q, np.asarray(x, np.float64))
    # Of half precision, weight, product and sum with the bias are rounded once each: sums of products are in float32.
    allowed = 1e-6 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    assert (np.abs(np.asarray(y, np.float64) - expected) <= allowed * size).all()


@given(st.lists(st.integers(0, 5), min_size=1, max_size=300), st.sampled_from([32, 64, 128]), st.sampled_from([8, 16]))
def test_every_input_has_one_slot_among_those_of_its_group(group_of, chunk, smallest):
    slots = slots_of(np.asarray(group_of), chunk=chunk, smallest=smallest, largest=chunk)
    assert len(slots.inputs) % chunk == chunk % slots.share == 0
    assert slots.share >= smallest
    held = slots.inputs < slots.k
    np.testing.assert_array_equal(np.sort(slots.inputs[held]), np.arange(len(group_of)))
    np.testing.assert_array_equal(np.repeat(slots.groups, slots.share)[held], np.asarray(group_of)[slots.inputs[held]])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_the_dequantized_weight(form):
    rng = np.random.default_rng(0)
    group_of = np.arange(96) // 32
    q = QuantizedLinear(
        jnp.asarray(rng.integers(0, 16, (24, 96)), jnp.uint8),
        jnp.asarray(rng.uniform(0.5, 2, (24, 3)), jnp.float32),
        jnp.asarray(rng.integers(0, 16, (24, 3)), jnp.uint8),
        jnp.asarray(group_of),
        4,
    )
    x, p = jnp.asarray(rng.standard_normal((5, 96)), jnp.float32), packed(q, form)
    slope = jnp.asarray(rng.standard_normal((5, 24)), jnp.float32)
    found = jax.grad(lambda x: (linear(p, x) * slope).sum())(x)
    np.testing.assert_allclose(found, slope @ dequantize(q), rtol=1e-4, atol=1e-3)


def test_packing_joins_what_reads_one_input_if_the_grids_agree():
    rng = np.random.default_rng(0)

    def made(out: int, bits: int = 4, bias: bool = False) -> QuantizedLinear:
        codes, scale = jnp.asarray(rng.integers(0, 2**bits, (out, 64)), jnp.uint8), jnp.asarray(rng.uniform(1, 2, (out, 2)), jnp.float32)
        zero, group_of = jnp.full((out, 2), 2 ** (bits - 1), jnp.uint8), jnp.arange(64) // 32
        return QuantizedLinear(codes, scale, zero, group_of, bits, jnp.arange(out, dtype=jnp.float32) if bias else None)

    p = {"q": made(8), "k": made(4, bias=True), "v": made(4), "gate": made(8), "up": made(8, bits=8), "norm": {"weight": jnp.ones(64)}}
    found = kernels.pack_roles(p)
    assert {role: type(leaf) for role, leaf in found.items()} == {"q+k+v": Joined, "gate": Rows, "up": Rows, "norm": dict}
    x = jnp.asarray(rng.standard_normal((5, 64)), jnp.float32)
    for ours, theirs in zip(linears_of(found, ("q", "k", "v"), x), linears_of(p, ("q", "k", "v"), x), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("case", "bits", "sym"), [("qwen2", 4, True), ("gpt2", 3, False), ("mixtral", 8, False)])
def test_packed_models_compute_what_quantized_ones_do(case, bits, sym, built):
    params, spec, *_ = rounded(case, built, QuantConfig(bits=bits, sym=sym, group_size=16))
    small = kernels.pack(params)
    assert not [leaf for leaf in jax.tree.leaves(small, is_leaf=is_quantized) if is_quantized(leaf)]
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 97, (1, 9)), jnp.int32)
    expected = forward(spec, params, tokens)
    np.testing.assert_allclose(forward(spec, small, tokens), expected, atol=1e-5 * float(jnp.abs(expected).max()))
    if case == "qwen2":
        ours = generate(spec, small, tokens, 4)
        alone = forward(spec, params, ours)[0].argmax(-1)  # what each token is the likeliest after
        np.testing.assert_array_equal(ours[0, -4:], alone[-5:-1])


def is_quantized(leaf: object) -> bool:
    return isinstance(leaf, QuantizedLinear)


def test_packed_checkpoints_take_the_memory_of_their_bits(built, tmp_path):
    """A block at a time: what is held besides is one block with a byte for each code."""
    quantized = rounded("llama", built, QuantConfig(bits=4, group_size=16))
    save_gptq(quantized, tmp_path / "model")
    (params, _), (small, spec) = load_gptq(tmp_path / "model"), load_gptq(tmp_path / "model", packed=True)
    assert jax.tree.structure(small) == jax.tree.structure(kernels.pack(params))
    for ours, theirs in zip(jax.tree.leaves(small), jax.tree.leaves(kernels.pack(params)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    stored = [leaf.codes for leaf in jax.tree.leaves(params["blocks"], is_leaf=is_quantized) if is_quantized(leaf)]
    words = sum(leaf.words.nbytes for leaf in jax.tree.leaves(small["blocks"], is_leaf=is_packed) if is_packed(leaf))
    assert words == sum(len(codes) * -(-codes.shape[1] // 64) * 64 // 2 for codes in stored)
    for refusing in (lambda: list(write_params(spec, small, "v1")), lambda: interop.to_flax((small, spec))):
        with pytest.raises(ValueError, match="packed for products"):
            refusing()


def is_packed(leaf: object) -> bool:
    return isinstance(leaf, Rows | Fragments)


@pytest.mark.gpu
@settings(max_examples=15, deadline=None)
@given(linears(), st.sampled_from([1, 3, 12, 70, 600]), st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]))
def test_kernels_multiply_on_gpus(q, m, dtype):
    """The leaf is laid out for the kernels, runs on both devices, and takes no other form than here."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((m, q.shape[1])), dtype)
    p = packed(q, "fragments")
    expected, size = exact(q, np.asarray(x, np.float64))
    allowed = 2e-6 if dtype == jnp.float32 else 3 * float(jnp.finfo(dtype).eps)
    for device in (jax.devices("gpu")[0], jax.devices("cpu")[0]):
        y = multiplied(jax.device_put(p, device), jax.device_put(x, device))
        again = multiplied(jax.device_put(p, device), jax.device_put(x, device))
        np.testing.assert_array_equal(y, again)
        assert (np.abs(np.asarray(y, np.float64) - expected) <= allowed * size).all(), (device, m)


@pytest.mark.gpu
def test_gpus_generate_from_packed_weights_what_cpus_do(built):
    params, spec, *_ = rounded("llama", built, QuantConfig(bits=4, group_size=16))
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 97, (2, 9)), jnp.int32)
    (gpu,), (cpu,) = jax.devices("gpu")[:1], jax.devices("cpu")[:1]
    there = kernels.pack(jax.device_put(params, gpu))
    assert [leaf for leaf in jax.tree.leaves(there, is_leaf=is_packed) if isinstance(leaf, Fragments)]
    with jax.default_device(cpu):
        expected = generate(spec, jax.device_put(params, cpu), tokens, 20)
    np.testing.assert_array_equal(generate(spec, there, jax.device_put(tokens, gpu), 20), expected)
