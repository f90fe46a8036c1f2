"""Packed parameters compute what the quantized ones do, on CPUs and GPUs, and take the memory of their bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_kernels.jax import Fragments, Rows, fragments, rows
from gptq_fn_kernels.jax.slots import slots_of
from hypothesis import given
from hypothesis import strategies as st

from gptq_fn import QuantizedLinear, dequantize, kernels
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
    slots = slots_of(np.asarray(group_of), chunk=chunk, smallest=smallest)
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
    x, p = jnp.asarray(rng.standard_normal((2, 96)), jnp.float32), packed(q, form)
    slope = jnp.asarray(rng.standard_normal((2, 24)), jnp.float32)
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
    for roles in (("q", "k", "v"), ("gate", "up")):
        for ours, theirs in zip(linears_of(found, roles, x), linears_of(p, roles, x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)
