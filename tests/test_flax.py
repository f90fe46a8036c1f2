"""A Flax module of a quantized model: the same function, the memory of a checkpoint, and every bit back."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from gptq_fn_interop.flax import Model, Packed
from gptq_fn_interop.params import read_params
from gptq_fn_interop.stream import load_gptq, save_gptq
from test_families import built as built  # the fixture

from gptq_fn import QuantConfig, Quantized, QuantizedLinear, Report, forward, interop, round_to_nearest

TOKENS = jnp.asarray(np.random.default_rng(0).integers(2, 97, (2, 7)), jnp.int32)


def rounded(case: str, built, config: QuantConfig) -> Quantized:
    """The model of a case with all its linears rounded to nearest."""
    _, spec, checkpoint, _ = built(case)
    params = read_params(spec, checkpoint)

    def quantized(weight) -> QuantizedLinear:
        return jax.vmap(quantized)(weight) if weight.ndim > 2 else round_to_nearest(weight, config)

    blocks = [
        {
            **p,
            **{x.role: quantized(p[x.role]["weight"]).with_bias(p[x.role].get("bias")) for x in s.linears if x.quantize},
        }
        for s, p in zip(spec.blocks, params["blocks"], strict=True)
    ]
    return Quantized({**params, "blocks": blocks}, spec, Report(config, ()))


@pytest.fixture(scope="module", params=[("opt", 4, True), ("gpt2", 3, True), ("mixtral", 2, False)], ids=lambda case: case[0])
def quantized(request, built) -> Quantized:
    case, bits, sym = request.param
    return rounded(case, built, QuantConfig(bits, 16, sym=sym, grid="minmax"))


@pytest.fixture(scope="module")
def opt(built) -> Quantized:
    return rounded("opt", built, QuantConfig(4, 16, grid="minmax"))


def equal(a, b) -> bool:
    """Whether these are the same containers of the same bits."""
    together = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return jax.tree.structure(a) == jax.tree.structure(b) and all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in together)


def test_every_bit_comes_back(quantized):
    model = interop.to_flax(quantized)
    for one in (model, nnx.merge(*nnx.split(model)), interop.to_flax(interop.from_flax(model))):
        params, spec = interop.from_flax(one)
        assert spec == quantized.spec
        assert equal(params, quantized.params)


@pytest.mark.parametrize("case", ["opt", "mixtral"])
def test_the_module_is_the_same_function(case, built):
    params, spec, _ = quantized = rounded(case, built, QuantConfig(4, 16, grid="minmax"))
    expected = np.asarray(forward(spec, params, TOKENS))
    logits = interop.to_flax(quantized)(TOKENS)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


def test_the_module_can_be_compiled_as_a_whole(opt):
    model = interop.to_flax(opt)
    expected = np.asarray(model(TOKENS))
    np.testing.assert_allclose(nnx.jit(Model.__call__)(model, TOKENS), expected, atol=1e-5 * np.abs(expected).max())


def test_the_state_is_what_lies_in_a_checkpoint(quantized, tmp_path):
    save_gptq(quantized, tmp_path / "saved")
    file = (tmp_path / "saved" / "model.safetensors").read_bytes()
    tensors = len(file) - 8 - int.from_bytes(file[:8], "little")
    state = nnx.state(interop.to_flax(quantized))
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state)) == tensors
    assert equal(nnx.state(interop.to_flax(load_gptq(tmp_path / "saved"))), state)


def test_orbax_saves_and_restores_the_state(quantized, tmp_path):
    zeros = interop.to_flax((jax.tree.map(jnp.zeros_like, quantized.params), quantized.spec))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.state(interop.to_flax(quantized)))
        checkpointer.wait_until_finished()
        nnx.update(zeros, checkpointer.restore(tmp_path / "state", nnx.state(zeros)))
    assert equal(interop.from_flax(zeros)[0], quantized.params)


def test_training_finds_floats_and_leaves_codes(opt):
    shape, trained, packed = nnx.split(interop.to_flax(opt), nnx.Param, Packed)
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(trained))
    linears = sum(isinstance(leaf, QuantizedLinear) for p in opt.params["blocks"] for leaf in p.values())
    assert len(jax.tree.leaves(packed)) == 4 * linears

    def loss(trained):
        logits = jax.nn.log_softmax(nnx.merge(shape, trained, packed)(TOKENS[:, :-1]))
        return -jnp.take_along_axis(logits, TOKENS[:, 1:, None], -1).mean()

    first, slope = jax.value_and_grad(loss)(trained)
    assert loss(jax.tree.map(lambda w, g: w - 0.01 * g, trained, slope)) < first


def test_a_float_model_is_a_module_too(built):
    _, spec, checkpoint, _ = built("opt")
    params = read_params(spec, checkpoint)
    model = interop.to_flax((params, spec))
    assert equal(interop.from_flax(model)[0], params)
    assert not jax.tree.leaves(nnx.state(model, Packed))


def test_without_flax_the_rest_works():
    program = """
import sys
sys.modules["flax"] = None
from gptq_fn import interop
try:
    interop.to_flax
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "need Flax" in found
