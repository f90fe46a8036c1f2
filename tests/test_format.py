"""A quantized linear as the five tensors of the GPTQ format, as written here and by others."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptq_fn_interop.gptq_format import (
    from_tensors,
    quantization_config,
    scheme_of,
    to_tensors,
    unpackable,
    zero_points,
    zeros_of,
    zeros_version,
)
from gptq_writer import Scheme, random_linear, stored_zeros, stream
from gptq_writer import quantization_config as written_config
from hypothesis import given
from hypothesis import strategies as st

from gptq_fn import QuantConfig, QuantizedLinear, Report, Rule, dequantize, factor, solve
from gptq_fn.testing import hessian_of, quantized_linears

SHAPES = [(32, 64), (20, 36), (1, 7)]
KEPT = [(out, inputs, bits) for out, inputs in SHAPES for bits in (2, 3, 4, 8) if unpackable((out, inputs), bits) is None]


def assert_identical(a: QuantizedLinear, b: QuantizedLinear) -> None:
    assert a.bits == b.bits
    for field in ("codes", "scale", "zero", "group_of", "bias"):
        mine, other = getattr(a, field), getattr(b, field)
        assert (mine is None) == (other is None), field
        if mine is not None:
            assert mine.dtype == other.dtype, field
            np.testing.assert_array_equal(mine, other, field)


@pytest.mark.parametrize(("out", "inputs", "bits"), KEPT)
@pytest.mark.parametrize("zeros", ["v1", "v2"])
@pytest.mark.parametrize("sym", [True, False])
@given(data=st.data())
def test_a_linear_survives_the_format_bit_for_bit(out, inputs, bits, zeros, sym, data):
    q = data.draw(quantized_linears(out, inputs, bits, sym=sym))
    if zeros == "v1":  # which has no room for a zero point of 0
        q = QuantizedLinear(q.codes, q.scale, jnp.maximum(q.zero, 1), q.group_of, q.bits, q.bias)
    tensors = to_tensors(q, zeros)
    groups = q.scale.shape[1]
    assert {name: (a.shape, str(a.dtype)) for name, a in tensors.items() if name != "bias"} == {
        "qweight": ((-(-inputs * bits // 32), out), "int32"),
        "qzeros": ((groups, -(-out * bits // 32)), "int32"),
        "scales": ((groups, out), "float16"),
        "g_idx": ((inputs,), "int32"),
    }
    assert all(a.flags.c_contiguous for a in tensors.values())
    described = {"bits": bits, "sym": sym, "checkpoint_format": "gptq" if zeros == "v1" else "gptq_v2"}
    assert_identical(from_tensors(tensors, "a", described), q)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@given(seed=st.integers(0, 2**32 - 1))
def test_what_is_written_is_what_an_independent_writer_writes(bits, seed):
    rng = np.random.default_rng(seed)
    scheme = Scheme(bits, 16, sym=False, zeros="v2")
    theirs = {name: a.numpy() for name, a in random_linear(rng, 64, 32, scheme).tensors.items()}
    ours = to_tensors(from_tensors(theirs, "a", written_config(scheme)), "v2")
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], name)


WRITERS = [
    Scheme(bits, size, sym=sym, desc_act=desc_act, zeros=zeros, scales=scales, g_idx=g_idx)
    for bits in (2, 3, 4, 8)
    for size, desc_act, scales, g_idx in [
        (16, False, torch.float16, True),
        (-1, False, torch.float32, False),
        (48, True, torch.float16, True),
        (16, False, torch.float16, False),
    ]
    for sym, zeros in [(True, "v1"), (True, "v2"), (False, "v1"), (False, "v2"), *([(False, "v1_carry")] * (bits != 3))]
]


@pytest.mark.parametrize(
    "scheme", WRITERS, ids=lambda s: f"{s.bits}-{s.group_size}-{'sym' if s.sym else 'asym'}-{s.zeros}{'-act' * s.desc_act}"
)
def test_linears_of_other_writers_mean_what_they_meant(scheme):
    theirs = random_linear(np.random.default_rng(0), 64, 32, scheme)
    tensors = {name: a.numpy() for name, a in theirs.tensors.items()}
    np.testing.assert_allclose(dequantize(from_tensors(tensors, "a", written_config(scheme))), theirs.weight, rtol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("how", ["v1", "v2", "v1_carry"])
@given(seed=st.integers(0, 2**32 - 1), often=st.booleans())
def test_every_zero_point_is_read_back_even_zero(bits, how, seed, often):
    if bits == 3 and how == "v1_carry":
        return  # GPTQModel subtracts from 3-bit fields one by one
    rng = np.random.default_rng(seed)
    zero = rng.integers(0, 2**bits, (5, 32)) * (rng.random((5, 32)) < 0.5 if often else 1)
    np.testing.assert_array_equal(zero_points(stored_zeros(zero, bits, how), bits, 32, how), zero)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_points_are_told_by_what_they_are(bits):
    """Some files that call themselves version 1 hold version 2; what a symmetric file has to hold is known."""
    middle = np.full((3, 32), 2 ** (bits - 1))
    for how in ("v1", "v2"):
        stored = stored_zeros(middle, bits, how)
        for says in ({}, {"checkpoint_format": "gptq"}, {"checkpoint_format": "gptq_v2"}, {"sym": True, "format": "gptq_v2"}):
            assert zeros_of(stored, bits, 32, says) == how
    mixed = stored_zeros(np.where(np.arange(32) % 2, middle, 1), bits, "v1")
    assert zeros_of(mixed, bits, 32, {"checkpoint_format": "gptq"}) == "v1"
    assert zeros_of(mixed, bits, 32, {"checkpoint_format": "gptq_v2"}) == "v2"


MODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}


@pytest.mark.parametrize(
    ("bits", "says", "expected"),
    [
        (4, {}, "v1"),
        (4, {"checkpoint_format": "gptq", "meta": None}, "v1"),
        (4, {"checkpoint_format": "gptq", **MODEL}, "v1_carry"),
        (8, {"format": "gptq", **MODEL}, "v1_carry"),
        (2, MODEL, "v1_carry"),
        (3, {"checkpoint_format": "gptq", **MODEL}, "v1"),
        (4, {"checkpoint_format": "gptq_v2", **MODEL}, "v2"),
        (4, {"format": "gptq_v2", **MODEL}, "v2"),
    ],
)
def test_asymmetric_zero_points_are_stored_as_their_writer_stores_them(bits, says, expected):
    anything = stored_zeros(np.random.default_rng(0).integers(1, 2**bits, (3, 32)), bits, "v2")
    assert zeros_of(anything, bits, 32, {"sym": False, **says}) == expected


def test_a_zero_point_of_zero_is_not_written_in_version_1():
    q = QuantizedLinear(jnp.zeros((8, 8), jnp.uint8), jnp.ones((8, 1)), jnp.zeros((8, 1), jnp.uint8), jnp.zeros(8, jnp.int32), 4)
    with pytest.raises(ValueError, match="write gptq_v2"):
        to_tensors(q, "v1")


@pytest.mark.parametrize("shape", [(31, 64), (32, 63)])
def test_three_bits_need_whole_chunks(shape):
    q = QuantizedLinear(
        jnp.zeros(shape, jnp.uint8), jnp.ones((shape[0], 1)), jnp.full((shape[0], 1), 4, jnp.uint8), jnp.zeros(shape[1], jnp.int32), 3
    )
    with pytest.raises(ValueError, match="3-bit codes are stored in chunks of 32, but the weight is"):
        to_tensors(q, "v1")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("says", [{}, {"bits": 2}, {"bits": 3}, {"bits": 4}, {"bits": 8}])
def test_bits_are_those_of_the_tensors_whatever_the_config_says(bits, says):
    theirs = random_linear(np.random.default_rng(0), 64, 32, Scheme(bits, 16))
    found = from_tensors({name: a.numpy() for name, a in theirs.tensors.items()}, "a", says)
    assert found.bits == bits
    np.testing.assert_allclose(dequantize(found), theirs.weight, rtol=1e-6)


def test_without_g_idx_the_config_has_to_tell_the_bits():
    tensors = {name: a.numpy() for name, a in random_linear(np.random.default_rng(0), 64, 32, Scheme(4, 16, g_idx=False)).tensors.items()}
    with pytest.raises(ValueError, match="a has no g_idx and its quantization config names no bits"):
        from_tensors(tensors, "a", {})
    with pytest.raises(ValueError, match="a has no g_idx, and 3 groups of 64 inputs do not tell"):
        from_tensors({**tensors, "scales": tensors["scales"][:3], "qzeros": tensors["qzeros"][:3]}, "a", {"bits": 4, "group_size": 16})


def damaged(**changes: Any) -> dict[str, np.ndarray]:
    tensors = {name: a.numpy() for name, a in random_linear(np.random.default_rng(0), 64, 32, Scheme(4, 16)).tensors.items()}
    return {**tensors, **changes}


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        (damaged(g_idx=np.full(64, 4, np.int32)), "a.b.g_idx reaches from 4 to 4, but there are 4 groups"),
        (damaged(g_idx=np.full(64, -1, np.int32)), "a.b.g_idx reaches from -1 to -1"),
        (damaged(scales=np.full((4, 32), np.inf, np.float16)), "a.b: a scale is not finite"),
        (damaged(qweight=np.zeros((9, 32), np.int32)), "a.b: a qweight of 9 rows does not hold 64 inputs"),
        (
            damaged(qzeros=np.zeros((4, 5), np.int32)),
            r"a.b.qzeros has shape \[4, 5\], but 4 bits, 64 inputs, .* ask for \[4, 4\]",
        ),
        (damaged(qzeros=np.full((3, 4), 0x77777777, np.int32)), r"a.b.qzeros has shape \[3, 4\]"),
        (damaged(qweight=np.zeros((8, 31), np.int32)), r"a.b.scales has shape \[4, 32\]"),
        (damaged(qweight=np.zeros((8, 32), np.int64)), "a.b.qweight holds int64, but int32 is expected"),
        (damaged(scales=np.ones((4, 32), np.int32)), "a.b.scales holds int32, but float16 or bfloat16"),
        (damaged(g_idx=np.full(64, 2**32, np.int64)), "a.b.g_idx reaches from 4294967296"),
        (damaged(scales=np.ones(32, np.float16)), r"a.b.scales has shape \[32\], but it has 2 dimensions"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(tensors, sentence):
    with pytest.raises(ValueError, match=sentence):
        from_tensors(tensors, "a.b", {"bits": 4})


CONFIG = QuantConfig(
    4,
    128,
    rules=(
        Rule(r".*z", QuantConfig(8, None)),
        Rule(r".*a"),
        Rule(r"model\.layers\.1\.", QuantConfig(4, 32, order="act", grid="minmax")),
        Rule(r".*b", QuantConfig(4, 32, order="act", static_groups=True)),
    ),
)


def test_rules_are_written_in_their_order_and_read_as_they_were_meant():
    described = quantization_config(Report(CONFIG, ()))
    assert list(described["dynamic"]) == ["+:.*z", "-:.*a", r"+:model\.layers\.1\.", "+:.*b"]
    for name in ("model.z", "model.za", "model.az", "model.layers.1.a", "model.layers.1.q", "model.layers.10.q", "b"):
        resolved, found = CONFIG.resolve(name), scheme_of(name, described)
        if resolved is None:
            assert found is None
        else:
            assert found is not None
            group_size = -1 if resolved.group_size is None else resolved.group_size
            desc_act = resolved.order == "act" and not resolved.static_groups
            assert (found["bits"], found["group_size"], found["sym"], found["desc_act"]) == (
                resolved.bits,
                group_size,
                resolved.sym,
                desc_act,
            )


def test_the_config_has_the_keys_that_engines_need():
    described = quantization_config(Report(QuantConfig(), ()))
    needed = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True, "quant_method": "gptq", "checkpoint_format": "gptq"}
    assert needed.items() <= described.items()
    assert "dynamic" not in described
    assert described["lm_head"] is False


@given(sym=st.booleans(), inner=st.lists(st.sampled_from((None, True, False)), max_size=3))
def test_version_2_wherever_a_grid_may_be_asymmetric(sym, inner):
    rules = tuple(Rule(str(i), None if s is None else QuantConfig(sym=s)) for i, s in enumerate(inner))
    config = QuantConfig(sym=sym, rules=rules)
    assert zeros_version(config) == ("v2" if not sym or False in inner else "v1")
    assert quantization_config(Report(config, ()))["checkpoint_format"] == {"v1": "gptq", "v2": "gptq_v2"}[zeros_version(config)]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_negative_scales_mean_what_they_say_by_the_formula_of_every_reader(bits):
    """(code - zero) * scale, from the bits of the words and with one added to stored zero points, as AutoGPTQ does."""
    rng = np.random.default_rng(bits)
    w = jnp.asarray(rng.normal(size=(32, 64)), jnp.float32)
    config = QuantConfig(bits, 32, grid="hid", negative_scales=True, order="natural")
    q, _ = solve(w, factor(hessian_of(jnp.asarray(rng.normal(size=(200, 64)), jnp.float32)), config), config)
    tensors = to_tensors(q, zeros_version(config))

    def fields(words: np.ndarray, count: int) -> np.ndarray:
        stream = (words.view(np.uint32)[:, None] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
        one = stream.reshape(-1, words.shape[1])[: count * bits].reshape(count, bits, -1).astype(np.int64)
        return (one << np.arange(bits)[None, :, None]).sum(1)

    codes, zeros = fields(tensors["qweight"], 64), fields(np.ascontiguousarray(tensors["qzeros"].T), 32).T + 1
    group, scales = tensors["g_idx"], tensors["scales"].astype(np.float32)
    weight = (codes - zeros[group]) * scales[group]
    assert 0.2 < (scales < 0).mean() < 0.8
    np.testing.assert_array_equal(weight.T, dequantize(q))
    assert np.square(weight.T - w).sum() < 0.3 * np.square(w).sum()


def test_the_writer_of_these_tests_streams_bits():
    """The independent writer against a number written out by hand: 3-bit codes 0..7 twice are 0o7654321076543210."""
    words = stream(np.array([*range(8), *range(8)])[:, None], 3).view(np.uint32)
    assert int(words[0, 0]) | int(words[1, 0]) << 32 == 0o7654321076543210
