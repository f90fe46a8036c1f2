"""Experts in files and in transformers: names for each, whatever a float checkpoint or a torch module holds fused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gptq_fn_interop.quantizer
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.experts import Experts
from gptq_fn_interop.hf import from_hf, to_hf
from gptq_fn_interop.kept import KeptHessians, keep_hessians
from gptq_fn_interop.params import read_params
from gptq_fn_interop.stream import load_gptq, quantize_checkpoint
from gptq_fn_interop.sweep import sweep
from safetensors.numpy import load_file
from test_families import built as built  # the fixture

from gptq_fn import QuantConfig, Rule, Runtime, forward, quantize

gptq_fn_interop.quantizer.register()
CALIB = np.random.default_rng(0).integers(2, 97, (8, 16)).astype(np.int32)
CONFIG = QuantConfig(4, 16, sym=False, grid="minmax", order="natural", min_rows=4)
KINDS = ("mixtral", "qwen2_moe", "gpt_oss", "granitemoe", "deepseek_v3")
"""Renamed on disk, with a shared expert, fused and interleaved with biases, fused, and with latent attention."""


@pytest.fixture(scope="module", params=KINDS)
def quantized(request: pytest.FixtureRequest, built: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    case = next(name for name, (kind, _) in CASES.items() if kind == request.param)
    source, destination = built(case).checkpoint.directory, tmp_path_factory.mktemp("experts") / "quantized"
    with keep_hessians(source, destination.with_name("hessians")) as observe:
        quantize_checkpoint(source, destination, CALIB, CONFIG, runtime=Runtime(observe=observe))
    return destination


def logits(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(CALIB, dtype=torch.long)).logits.numpy()


def load(directory: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_every_expert_has_names_of_its_own(quantized):
    names = [name for name in Checkpoint(quantized) if ".experts." in name]
    assert names
    assert {name.rpartition(".")[2] for name in names} <= {"qweight", "qzeros", "scales", "g_idx", "bias"}
    assert all(name.split(".experts.")[1].split(".")[0].isdigit() for name in names)


@pytest.mark.parametrize("quantized", ["mixtral"], indirect=True)
def test_experts_are_solved_again_from_the_hessian_of_each(quantized, built):
    hessians = quantized.with_name("hessians")
    expert = "model.layers.1.block_sparse_moe.experts.7"
    assert KeptHessians(hessians).of(f"{expert}.w1") == (f"{expert}.w1", f"{expert}.w3")
    config = replace(CONFIG, rules=(Rule(".*self_attn"),))
    (report,) = sweep(built("mixtral").checkpoint.directory, hessians, [config])
    before = {x["name"]: x for x in json.loads((quantized / "report.json").read_text())["linears"]}
    assert {x.name for x in report.linears} == {name for name in before if "experts" in name}
    for x in report.linears:
        assert (x.rows, x.dead, x.rounded) == tuple(before[x.name][key] for key in ("rows", "dead", "rounded"))
        assert (x.error, x.energy) == pytest.approx((before[x.name]["error"], before[x.name]["energy"]), rel=1e-3)


def test_transformers_saves_what_it_loaded(quantized, tmp_path):
    model = load(quantized)
    assert any(isinstance(module, Experts) for module in model.modules())
    model.save_pretrained(tmp_path)
    before, after = (load_file(directory / "model.safetensors") for directory in (quantized, tmp_path))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_dequantizing_fuses_the_experts_again(quantized, tmp_path):
    model = load(quantized)
    expected = logits(model)
    model = model.dequantize()
    assert not any(isinstance(module, Experts) for module in model.modules())
    assert_close(logits(model), expected)


def test_a_loaded_model_has_the_parameters_of_the_file(quantized):
    params, spec = load_gptq(quantized)
    found, its_spec = from_hf(load(quantized))
    assert its_spec == spec
    jax.tree.map(np.testing.assert_array_equal, found, params)


def test_a_model_in_memory_is_that_of_the_disk(quantized, built):
    kind = json.loads((quantized / "config.json").read_text())["model_type"]
    model = built(next(name for name, (other, _) in CASES.items() if other == kind)).model
    params, spec = from_hf(model)
    checkpoint = built(next(name for name, (other, _) in CASES.items() if other == kind)).checkpoint
    jax.tree.map(np.testing.assert_array_equal, params, read_params(spec, checkpoint))
    result = quantize(params, spec, jnp.asarray(CALIB), CONFIG)
    assert_close(logits(to_hf(result)), np.asarray(forward(spec, result.params, jnp.asarray(CALIB))))


@pytest.mark.parametrize("kind", ["granitemoe", "gpt_oss"])
def test_experts_that_stay_float_stay_fused(kind, built, tmp_path):
    source = built(next(name for name, (other, _) in CASES.items() if other == kind)).checkpoint
    quantize_checkpoint(source.directory, tmp_path / "q", CALIB, QuantConfig(4, 16, rules=(Rule(r".*experts"),)))
    after = Checkpoint(tmp_path / "q")
    fused = [name for name in source if source[name].ndim == 3]
    assert fused
    assert all(np.array_equal(source[name], after[name]) for name in fused)
    params, spec = load_gptq(tmp_path / "q")
    assert_close(logits(load(tmp_path / "q")), np.asarray(forward(spec, params, jnp.asarray(CALIB))))


def test_a_rule_that_leaves_out_part_of_the_experts_is_refused(built, tmp_path):
    source = built("mixtral").checkpoint.directory
    config = QuantConfig(4, 16, rules=(Rule(r".*w2$"),))
    with pytest.raises(ValueError, match=r"experts\.0\.w2: a rule leaves it out, but readers take the experts of a block only as a whole"):
        quantize_checkpoint(source, tmp_path / "q", CALIB, config)
