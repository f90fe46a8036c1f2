"""Packed parameters compute what the quantized ones do, on CPUs and GPUs, and take the memory of their bits."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_interop.params import write_params
from gptq_fn_interop.stream import load_gptq, save_gptq
from gptq_fn_kernels.jax import Fragments, Rows, fragments, rows
from gptq_fn_kernels.jax.around import Around
from gptq_fn_kernels.slots import slots_of
from gptq_fn_kernels.triton.plan import Gpu, constants_of, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreter import interpreter
from test_families import built as built  # the fixture
from test_flax import rounded

from gptq_fn import QuantConfig, QuantizedLinear, dequantize, forward, generate, interop, kernels
from gptq_fn.model.block import block
from gptq_fn.model.linear import Joined, linear
from gptq_fn.model.linear import linears as linears_of
from gptq_fn.model.norm import norm
from gptq_fn.spec import NormSpec

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


# what is done on the way

EPS, GATE = 1e-3, (1.5, 0.07)
Way = tuple[bool, bool, bool, float]
"""Whether x is normalized before, something is added and the outputs are gated, and the offset of the norm's weights."""
ways: st.SearchStrategy[Way] = st.tuples(st.booleans(), st.booleans(), st.booleans(), st.sampled_from([0.0, 1.0]))
dtypes = st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16])


def check_way(form: str, q: QuantizedLinear, m: int, dtype: Any, way: Way, seed: int, multiply: Any) -> None:
    """That a product with more on the way is right to some roundings of what was added up; activations in half precision may be large."""
    rng, (out, k), (norm, plus, gate, offset) = np.random.default_rng(seed), q.shape, way
    gate = gate and out % 2 == 0
    p, wide = packed(q, form), out // 2 if gate else out
    x = jnp.asarray(rng.standard_normal((m, k)) * (1000 if norm else 1), dtype)
    weight = jnp.asarray(rng.uniform(0.5, 30, k), dtype) if norm else None
    more = jnp.asarray(rng.standard_normal((m, wide)), dtype) if plus and not gate else None
    y = multiply(p, x, None if weight is None else (weight, EPS, offset), more, GATE if gate else None)
    assert y.dtype == dtype
    exact_x = np.asarray(x, np.float64)
    if weight is not None:
        exact_x *= (np.asarray(weight, np.float64) + offset) / np.sqrt((exact_x**2).mean(-1, keepdims=True) + EPS)
    expected, size = exact(q, exact_x)
    if gate:
        (z, other), (near, far), (a, b) = np.split(expected, 2, -1), np.split(size, 2, -1), GATE
        open_ = 1 / (1 + np.exp(-np.clip(z * (a + b * z * z), -700, 700)))
        expected, size = z * open_ * other, 2 * (near + 1) * (np.abs(other) + 1) + far * np.abs(z * open_)
    expected = expected + (0 if more is None else np.asarray(more, np.float64))
    eps = float(jnp.finfo(dtype).eps)
    finite = np.abs(expected) < float(jnp.finfo(dtype).max) / 2
    assert (np.abs(np.asarray(y, np.float64) - expected) <= 3 * eps * (size + 1))[finite].all()


@pytest.mark.parametrize("form", FORMS)
@given(linears(), st.sampled_from([1, 3]), dtypes, ways, st.integers(0, 2**32 - 1))
def test_products_do_on_the_way_what_is_asked(form, q, m, dtype, way, seed):
    check_way(form, q, m, dtype, way, seed, lambda p, x, norm, plus, gate: p.multiply(x, norm=norm, plus=plus, gate=gate))


def interpreted(
    kernel: str, inputs: dict[str, Any], outs: list[Any], grid: tuple[int, ...], constants: dict[str, Any], *, warps: int
) -> list[jax.Array]:
    """What `launch` does, by Triton's interpreter."""
    import torch
    from gptq_fn_kernels.triton import kernels as triton_kernels

    assert kernel == "kernels.few_rows"

    y = torch.tensor(np.full(outs[0].shape, np.nan, outs[0].dtype))
    tensors = {name: None if a is None else torch.tensor(np.asarray(a)) for name, a in inputs.items()}
    triton_kernels.few_rows[grid](**tensors, y=y, **constants)
    return [jnp.asarray(y.numpy())]


@interpreter
@settings(max_examples=20)
@given(linears(), st.sampled_from([1, 3]), st.sampled_from([jnp.float32, jnp.float16]), ways, st.integers(0, 2**32 - 1))
def test_products_do_on_the_way_what_is_asked_in_the_interpreter(q, m, dtype, way, seed):
    def multiply(p: Fragments, x: jax.Array, norm: Any, plus: Any, gate: Any) -> jax.Array:
        weight, eps, offset = norm or (None, 0.0, 0.0)
        return fragments._by_kernel(Around(eps, offset, gate), p, x, weight, plus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fragments, "gpu", lambda: Gpu(132, 2**17, tensor_float=True, overlap=False))
        patch.setattr(fragments, "launch", interpreted)
        check_way("fragments", q, m, dtype, way, seed, multiply)


@pytest.mark.parametrize("capability", [80, 90])
def test_chunks_are_under_way_before_the_norm_is_known(capability):
    import triton
    from gptq_fn_kernels.jax.launch import source_of
    from triton.backends.compiler import GPUTarget

    plan = plan_of(1, 4096, 4096, bits=4, itemsize=2, gpu=Gpu(132, 2**17, tensor_float=True, overlap=False))
    assert plan is not None
    blocks = {"BM": plan.rows, "BN": plan.outputs, "SPLIT": plan.split, "STAGES": plan.stages, "PRECISION": "ieee", "OVERLAP": False}
    sizes = {"m": 1, "n": 4096, "k": 4096, "chunks": 32, "stride": 4096, "ONE": True, "WIDTH": 4096, **constants_of(4, 32, False)}
    way = {"EPS": 1e-5, "OFFSET": 0.0, "GATE": 1.0, "BEND": 0.0}
    absent = dict.fromkeys(["gather", "high", "zeros", "plus"])
    inputs = [("x", "*fp16"), ("words", "*i32"), ("scales", "*fp16"), ("norm", "*fp16"), ("bias", "*fp16")]
    source = source_of("kernels.few_rows", inputs, ["*fp16"], list((blocks | sizes | way | absent).items()))
    ptx = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": plan.warps}).asm["ptx"]
    assert ptx.index("cp.async") < ptx.index("rsqrt")
    assert ".local " not in ptx


@pytest.mark.parametrize(("case", "norms"), [("llama", 2), ("gemma2", 2), ("phi", 0), ("olmo2", 0)])
def test_blocks_leave_to_products_what_they_can_do_on_the_way(case, norms, built, monkeypatch):
    """RMS norms before them, residuals where no norm stands between, and gates."""
    params, spec, *_ = rounded(case, built, QuantConfig(group_size=16))
    plain, asked = Rows.multiply, []
    monkeypatch.setattr(Rows, "multiply", lambda p, x, **way: asked.append(way) or plain(p, x, **way))
    tokens = jnp.asarray(np.random.default_rng(0).integers(2, 97, (1, 5)), jnp.int32)
    x = jnp.zeros((1, 5, params["blocks"][0]["o"].shape[0]), jnp.float32)
    small = kernels.pack_roles(params["blocks"][0])
    block(spec.blocks[0], small, x)
    counts = {what: sum(way.get(what) is not None for way in asked) for what in ("norm", "plus", "gate")}
    assert counts == {"norm": norms, "plus": 2 if case in ("llama", "phi") else 0, "gate": 0 if case == "phi" else 1}
    np.testing.assert_allclose(forward(spec, kernels.pack(params), tokens), forward(spec, params, tokens), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(4))
@settings(max_examples=8, deadline=None)
@given(linears(), st.sampled_from([1, 3, 9, 20]), dtypes, ways, st.integers(0, 2**32 - 1))
def test_products_do_on_the_way_what_is_asked_on_a_gpu(part, q, m, dtype, way, seed):
    @partial(jax.jit, static_argnums=(2, 5))
    def compiled(p: Fragments, x: jax.Array, about: tuple[float, float], weight: Any, plus: Any, gate: Any) -> jax.Array:
        return p.multiply(x, norm=None if weight is None else (weight, *about), plus=plus, gate=gate)

    def multiply(p: Fragments, x: jax.Array, norm: Any, plus: Any, gate: Any) -> jax.Array:
        weight, *about = norm or (None, 0.0, 0.0)
        return compiled(p, x, tuple(about), weight, plus, gate)

    check_way("fragments", q, m, dtype, way, seed, multiply)


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

    def ours(x: jax.Array, weight: jax.Array, plus: jax.Array) -> jax.Array:
        return (p.multiply(x, norm=(weight, EPS, 1.0), plus=plus) * slope).sum()

    def theirs(x: jax.Array, weight: jax.Array, plus: jax.Array) -> jax.Array:
        return ((plus + norm(NormSpec("rms", EPS, 1.0), {"weight": weight}, x) @ dequantize(q).T) * slope).sum()

    given = x, jnp.asarray(rng.standard_normal(96), jnp.float32), jnp.zeros((5, 24), jnp.float32)
    for found, expected in zip(jax.grad(ours, (0, 1, 2))(*given), jax.grad(theirs, (0, 1, 2))(*given), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


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
