"""Specs derived from configs compute what transformers computes, from the tensors as they lie on disk."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.params import read_params

from gptq_fn import FAMILIES, ModelSpec, check, forward, generate, spec_from_config

TOKENS = np.random.default_rng(0).integers(2, 97, (2, 17)).astype(np.int32)


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> transformers.PreTrainedModel:
    return build(*CASES[request.param])


def build(kind: str, options: Mapping[str, object]) -> transformers.PreTrainedModel:
    """A small model of which no parameter is 0 or 1: initial values hide biases and norms."""
    config = transformers.AutoConfig.for_model(kind, **options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn_like(parameter))
    return model


class Counted(Mapping[str, np.ndarray]):
    """Tensors that count how often each one is read."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors, self.reads = tensors, Counter()

    def __getitem__(self, name: str) -> np.ndarray:
        self.reads[name] += 1
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def saved(model: transformers.PreTrainedModel, directory: Path) -> tuple[ModelSpec, Checkpoint]:
    model.save_pretrained(directory)
    checkpoint = Checkpoint(directory)
    return spec_from_config(checkpoint.config), checkpoint


def test_the_logits_are_those_of_transformers(model, tmp_path):
    spec, checkpoint = saved(model, tmp_path)
    assert check(spec, checkpoint.shapes) == ()
    tensors = Counted(checkpoint)
    params = read_params(spec, tensors)
    assert tensors.reads == dict.fromkeys(checkpoint, 1)
    with torch.no_grad():
        expected = model.forward(torch.from_numpy(TOKENS).long()).logits.numpy()
    logits = np.asarray(forward(spec, params, jnp.asarray(TOKENS)))
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt-350m", "gpt2", "gpt_neox"])
def test_generating_with_a_cache_takes_the_likeliest_tokens(case, tmp_path):
    spec, checkpoint = saved(build(*CASES[case]), tmp_path)
    params = read_params(spec, checkpoint)
    prompt = jnp.asarray(TOKENS[:, :9])
    tokens = generate(spec, params, prompt, 8)
    assert tokens.shape == TOKENS.shape
    np.testing.assert_array_equal(tokens[:, :9], prompt)
    np.testing.assert_array_equal(tokens[:, 9:], forward(spec, params, tokens).argmax(-1)[:, 8:-1])


def test_sampling_is_decided_by_its_key(tmp_path):
    spec, checkpoint = saved(build(*CASES["llama"]), tmp_path)
    params, prompt = read_params(spec, checkpoint), jnp.asarray(TOKENS)
    a, b, c = (generate(spec, params, prompt, 8, temperature=1.0, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    cold = generate(spec, params, prompt, 8, temperature=1e-6, key=jax.random.key(3))
    np.testing.assert_array_equal(cold, generate(spec, params, prompt, 8))
    with pytest.raises(ValueError, match="needs a PRNG key"):
        generate(spec, params, prompt, 1, temperature=1.0)


@pytest.mark.parametrize("case", ["llama-tied-wide-heads", "opt", "gpt2", "gpt_neox-half-tied"])
def test_a_base_model_is_read_under_the_names_of_the_whole(case, tmp_path):
    model = build(*CASES[case])
    spec, whole = saved(model, tmp_path / "whole")
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path / "base")
    base = Checkpoint(tmp_path / "base")
    assert base.keys() != whole.keys()
    aligned = base.aligned(spec)
    assert check(spec, aligned.shapes) == ()
    assert aligned.keys() == aligned.shapes.keys() == whole.keys()
    assert all(np.array_equal(aligned[name], whole[name]) for name in whole)
    assert whole.aligned(spec) is whole


def test_every_family_is_tried():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def config_of(case: str) -> dict[str, Any]:
    kind, options = CASES[case]
    return json.loads(transformers.AutoConfig.for_model(kind, **options).to_json_string(use_diff=False))


def older(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 wrote it."""
    old = {name: value for name, value in config.items() if name != "layer_types"}
    rope = dict(old.pop("rope_parameters"))
    old |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": old.pop("dtype", None) or "float16"}
    for name in ("rotary_pct", "partial_rotary_factor"):
        old[name] = rope.pop("partial_rotary_factor", None)
    kind = rope.pop("rope_type")
    return old | {"rope_scaling": None if kind == "default" else {"type": kind, **rope}}


@pytest.mark.parametrize(
    "case", ["llama", "llama-linear-rope", "llama-llama3-rope", "mistral-window", "qwen2-window", "gpt_neox-half-tied"]
)
def test_configs_of_transformers_4_are_understood(case):
    config = config_of(case)
    assert "rope_theta" not in config
    assert spec_from_config(older(config)) == spec_from_config(config)
    renamed = older(config)
    if renamed["rope_scaling"]:
        renamed["rope_scaling"]["rope_type"] = renamed["rope_scaling"].pop("type")
        assert spec_from_config(renamed) == spec_from_config(config)


@pytest.mark.parametrize("case", CASES)
def test_a_spec_is_a_key_and_remembers_its_config(case):
    config = config_of(case)
    spec = spec_from_config(config)
    assert hash(spec) == hash(spec_from_config(dict(reversed(config.items()))))
    assert json.loads(spec.origin or "") == config


@pytest.mark.parametrize("case", CASES)
def test_a_key_that_is_not_understood_is_refused_by_name(case):
    config = config_of(case)
    for off in (None, False, "", [], {}):
        assert spec_from_config({**config, "logit_twist": off}) == spec_from_config(config)
    with pytest.raises(ValueError, match=r"logit_twist = 1\.5"):
        spec_from_config({**config, "logit_twist": 1.5})
    assert spec_from_config({**config, "logit_twist": 1.5}, ignore=["logit_twist"]) == spec_from_config(config)


@pytest.mark.parametrize(
    ("case", "changes", "sentence"),
    [
        ("llama", {"model_type": "mamba"}, r"model_type 'mamba' is not in the table of architectures \(gpt2, gpt_neox, llama"),
        ("llama", {"model_type": None}, "model_type None is not in the table"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act = 'relu6'; the activations that are understood are relu, silu"),
        ("llama", {"num_attention_heads": None}, "this llama model has no num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "8 query heads cannot share 3 key and value heads"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope scaling of type 'spiral'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "twist": 1}}, "not understood: twist"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True, but only False is described"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False, but only True is described"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
    ],
)
def test_what_no_family_describes_is_refused_in_a_sentence(case, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        spec_from_config({**config_of(case), **changes})


@pytest.mark.parametrize("case", CASES)
def test_one_tensor_too_many_or_too_few_is_named(case, tmp_path):
    spec, checkpoint = saved(build(*CASES[case]), tmp_path)
    for name in checkpoint:
        without = {other: shape for other, shape in checkpoint.shapes.items() if other != name}
        missing = (f"{name} is missing.",) if name.endswith(".weight") else ()  # biases are optional
        assert check(spec, without)[: len(missing)] == missing
        extra = {**checkpoint.shapes, f"{name}_scale": (1,)}
        assert check(spec, extra) == (f"{name}_scale [1] is not read by anything in the spec.",)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_width_is_named(case, tmp_path):
    spec, checkpoint = saved(build(*CASES[case]), tmp_path)
    embed = dict(spec.tensors)["embed"]
    for name, (*outer, last) in checkpoint.shapes.items():
        complaints = check(spec, {**checkpoint.shapes, name: (*outer, last + 1)})
        module = name.rpartition(".")[0]
        assert complaints if module == embed else any(module in sentence for sentence in complaints), name


def test_a_spec_that_contradicts_itself_is_named(tmp_path):
    spec, checkpoint = saved(build(*CASES["llama"]), tmp_path)

    def complaints(*linears) -> str:
        return " ".join(check(replace(spec, blocks=(replace(spec.blocks[0], linears=linears),) * 2), checkpoint.shapes))

    q, k, *others = spec.blocks[0].linears
    assert complaints(q, k, *others) == ""
    assert "model.layers.0.self_attn.k_proj is read 2 times." in complaints(q, replace(q, name=k.name), k, *others)
    assert "Block 0 has 2 linears with the role 'q'." in complaints(q, replace(k, role="q"), *others)
    assert "Block 0 has no linear with the role 'k', which its spec needs." in complaints(q, *others)
    assert "Block 0 has a linear with the role 'router', which is in no stage." in complaints(q, k, replace(k, role="router"), *others)
    wrong = complaints(q, replace(k, tap="mlp_in"), *others)
    assert "Block 0: self_attn.k_proj (k) reads tap 'attn_in', but its spec says 'mlp_in'." in wrong
