"""Specs derived from configs compute what transformers computes, from the tensors as they lie on disk."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_cases import CASES
from family_cases_gpt import PUBLISHED, Published
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.params import dense_shapes, read_params
from safetensors.numpy import load_file, save_file

from gptq_fn import FAMILIES, ModelSpec, check, forward, generate, spec_from_config
from gptq_fn.check import arrays, ignores

TOKENS = np.random.default_rng(0).integers(2, 97, (2, 17)).astype(np.int32)


class Built(NamedTuple):
    """A small model of a case, and what it saved."""

    model: transformers.PreTrainedModel
    spec: ModelSpec
    checkpoint: Checkpoint
    shapes: dict[str, tuple[int, ...]]
    """Those of the checkpoint, experts one by one."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    """What a case builds, once for all tests."""

    @cache
    def build(case: str) -> Built:
        model, directory = perturbed(case), tmp_path_factory.mktemp(case)
        model.save_pretrained(directory)
        publish(*CASES[case], directory)
        checkpoint = Checkpoint(directory)
        spec = spec_from_config(checkpoint.config)
        return Built(model, spec, checkpoint, dense_shapes(checkpoint.shapes, spec))

    return build


def perturbed(case: str) -> transformers.PreTrainedModel:
    """A model of which no tensor is 0 or 1: initial values hide biases and norms."""
    kind, options = CASES[case]
    config = transformers.AutoConfig.for_model(published(kind).kind, **options)
    torch.manual_seed(0)
    attention = options.get("attn_implementation", "eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).float().eval()
    with torch.no_grad():
        for tensor in model.state_dict().values():  # saved buffers, too: DeepSeek's routing has one
            tensor.add_(0.08 * torch.randn_like(tensor))
        for module in model.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as transformers makes it at each load
    return model


def published(kind: str) -> Published:
    """How checkpoints of this model type differ from what transformers saves."""
    return PUBLISHED.get(kind, Published(kind))


def publish(kind: str, options: Mapping[str, Any], directory: Path) -> None:
    """Turn what transformers saved into what lies in checkpoints of this model type."""
    if kind in PUBLISHED:
        config, tensors = directory / "config.json", directory / "model.safetensors"
        config.write_text(json.dumps(PUBLISHED[kind].config(json.loads(config.read_text()))))
        save_file(load_file(tensors) | PUBLISHED[kind].buffers(options), tensors)


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


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_transformers(case, built):
    model, spec, checkpoint, shapes = built(case)
    assert check(spec, shapes) == ()
    tensors = Counted(checkpoint)
    params = read_params(spec, tensors)
    assert tensors.reads == {name: 1 for name in checkpoint if not ignores(spec, name)}
    assert difference(forward(spec, params, jnp.asarray(TOKENS)), model) < 1e-5


def difference(logits: jax.Array, model: transformers.PreTrainedModel) -> float:
    """The largest one from the model's logits, relative to the largest of those."""
    with torch.no_grad():
        expected = model.forward(torch.from_numpy(TOKENS).long()).logits.numpy()
    return float(np.abs(np.asarray(logits) - expected).max() / np.abs(expected).max())


def test_mpt_has_the_steepest_slope_that_its_config_says(built, monkeypatch):
    """transformers 5.23 builds the slopes for alibi_bias_max = 8 whatever the config says, so it is told here."""
    model, _, checkpoint, _ = built("mpt-clipped")
    config = checkpoint.config
    steep = spec_from_config({**config, "attn_config": {**config["attn_config"], "alibi_bias_max": 16}})
    logits = forward(steep, read_params(steep, checkpoint), jnp.asarray(TOKENS))
    assert difference(logits, model) > 1e-3
    monkeypatch.setattr(model.transformer, "build_mpt_alibi_tensor", partial(model.transformer.build_mpt_alibi_tensor, alibi_bias_max=16))
    assert difference(logits, model) < 1e-5


@pytest.mark.parametrize("case", ["llama", "mistral-window", "opt-350m", "gpt2", "falcon-rw", "cohere2", "xglm"])
def test_generating_with_a_cache_takes_the_likeliest_tokens(case, built):
    _, spec, checkpoint, _ = built(case)
    params = read_params(spec, checkpoint)
    prompt = jnp.asarray(TOKENS[:, :9])
    tokens = generate(spec, params, prompt, 8)
    assert tokens.shape == TOKENS.shape
    np.testing.assert_array_equal(tokens[:, :9], prompt)
    np.testing.assert_array_equal(tokens[:, 9:], forward(spec, params, tokens).argmax(-1)[:, 8:-1])


def test_sampling_is_decided_by_its_key(built):
    _, spec, checkpoint, _ = built("llama")
    params, prompt = read_params(spec, checkpoint), jnp.asarray(TOKENS)
    a, b, c = (generate(spec, params, prompt, 8, temperature=1.0, key=jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    cold = generate(spec, params, prompt, 8, temperature=1e-6, key=jax.random.key(3))
    np.testing.assert_array_equal(cold, generate(spec, params, prompt, 8))
    with pytest.raises(ValueError, match="needs a PRNG key"):
        generate(spec, params, prompt, 1, temperature=1.0)


@pytest.mark.parametrize("case", ["llama-tied-wide-heads", "opt", "gpt2", "gpt_neox-half-tied", "bloom", "biogpt"])
def test_a_base_model_is_read_under_the_names_of_the_whole(case, built, tmp_path):
    model, spec, whole, _ = built(case)
    getattr(model, model.base_model_prefix).save_pretrained(tmp_path)
    base = Checkpoint(tmp_path)
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
    config = transformers.AutoConfig.for_model(published(kind).kind, **options)
    return published(kind).config(json.loads(config.to_json_string(use_diff=False)))


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
    "case",
    [
        *("llama", "llama-linear-rope", "llama-llama3-rope", "mistral-window", "qwen2-window", "gpt_neox-half-tied"),
        *("falcon-7b", "phi", "persimmon", "stablelm", "starcoder2-window", "nemotron", "cohere"),
    ],
)
def test_configs_of_transformers_4_are_understood(case):
    config = config_of(case)
    assert "rope_theta" not in config
    assert spec_from_config(older(config)) == spec_from_config(config)
    renamed = older(config)
    if renamed["rope_scaling"]:
        renamed["rope_scaling"]["rope_type"] = renamed["rope_scaling"].pop("type")
        assert spec_from_config(renamed) == spec_from_config(config)


@pytest.mark.parametrize(
    ("case", "new", "old"),
    [
        ("bloom", "hidden_size", {"n_embed": 64}),
        ("bloom", "n_head", {"num_attention_heads": 8}),
        ("cohere2", "layer_types", {"sliding_window_pattern": 2}),
        ("cohere2", "layer_types", {"layer_switch": 2, "use_gated_activation": True, "order_of_interleaved_layers": "local_attn_first"}),
        ("falcon-40b", "num_kv_heads", {"n_head_kv": 2}),
        ("gpt_bigcode", "num_key_value_heads", {}),
        ("gpt_neo", "attention_layers", {}),
        ("mpt", "attn_config", {}),
        ("nemotron", "rope_parameters", {"rope_percent": 0.5, "rope_theta": 10000.0}),
    ],
)
def test_older_keys_mean_the_same(case, new, old):
    config = config_of(case)
    assert config.pop(new) is not None
    assert spec_from_config({**config, **old}) == spec_from_config(config_of(case))


MPT_7B_INSTRUCT = """
{"architectures": ["MPTForCausalLM"], "attn_config": {"alibi": true, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
"attn_type": "multihead_attention", "attn_uses_sequence_id": false, "clip_qkv": null, "prefix_lm": false, "qk_ln": false,
"softmax_scale": null}, "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"}, "d_model": 4096, "emb_pdrop": 0,
"embedding_fraction": 1.0, "expansion_ratio": 4, "init_config": {"emb_init_std": null, "fan_mode": "fan_in", "init_std": 0.02},
"init_device": "cpu", "learned_pos_emb": true, "logit_scale": null, "max_seq_len": 2048, "model_type": "mpt", "n_heads": 32,
"n_layers": 32, "no_bias": true, "norm_type": "low_precision_layernorm", "resid_pdrop": 0, "tokenizer_name": "EleutherAI/gpt-neox-20b",
"torch_dtype": "bfloat16", "transformers_version": "4.28.1", "use_cache": false, "verbose": 0, "vocab_size": 50432}
"""


def test_a_config_from_before_transformers_had_the_family_is_understood():
    spec = spec_from_config(json.loads(MPT_7B_INSTRUCT))
    assert len(spec.blocks) == 32
    assert spec.blocks[0].attn.head_dim == 128


def test_a_bias_beside_a_tied_head_is_not_overlooked(built):
    _, spec, _, shapes = built("gptj")
    without = {name: shape for name, shape in shapes.items() if name != "lm_head.weight"}
    assert check(replace(spec, tied=True), without) == ("lm_head.bias [97] is not read by anything in the spec.",)
    tied = spec_from_config({**config_of("gptj"), "tie_word_embeddings": True})
    assert check(tied, shapes) == ("lm_head.bias [97] is not read by anything in the spec.",)


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
        ("llama", {"model_type": "mamba"}, r"model_type 'mamba' is not in the table of architectures \(.*gpt2, .*llama"),
        ("llama", {"model_type": None}, "model_type None is not in the table"),
        ("llama", {"hidden_act": "relu6"}, "hidden_act = 'relu6'; the activations that are understood are relu, silu"),
        ("llama", {"num_attention_heads": None}, "this llama model has no num_attention_heads"),
        ("llama", {"num_key_value_heads": 3}, "8 query heads cannot share 3 key and value heads"),
        ("llama", {"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "rope scaling of type 'spiral'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0, "twist": 1}}, "not understood: twist"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True, but only False is described"),
        ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights = False, but only True is described"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine = False"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "only False is described for bloom models"),
        ("cohere2", {"position_embedding_type": "rope"}, "position_embedding_type = 'rope', but only 'rope_gptj'"),
        ("cohere2", {"layer_types": ["chunked_attention"] * 3}, "layers of type chunked_attention"),
        ("gpt_neo", {"attention_layers": ["ring", "global"]}, "attention of type ring; global and local are described"),
        ("gptj", {"rotary": False}, "rotary = False, but only True is described for gptj models"),
        ("moss", {"wbits": 4}, "wbits = 4, but only 32 is described for moss models"),
        ("mpt", {"attn_config": {"alibi": False}}, "alibi = False, but only True is described for mpt models"),
        ("mpt", {"attn_config": {"kv_n_heads": 2, "qk_ln": True}}, r"attn_config\.kv_n_heads = 2, attn_config\.qk_ln = True"),
        ("mpt", {"logit_scale": 0.5}, r"not understood: logit_scale = 0\.5"),
        ("mpt", {"norm_type": "rmsnorm"}, "norm_type = 'rmsnorm', but only 'layernorm'"),
        ("starcoder2", {"mlp_type": "gated"}, "mlp_type = 'gated', but only 'default'"),
    ],
)
def test_what_no_family_describes_is_refused_in_a_sentence(case, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        spec_from_config({**config_of(case), **changes})


@pytest.mark.parametrize("case", CASES)
def test_one_tensor_too_many_or_too_few_is_named(case, built):
    _, spec, _, shapes = built(case)
    for name in shapes:
        without = {other: shape for other, shape in shapes.items() if other != name}
        needed = name.endswith(".weight") or name in set(arrays(spec))  # biases are optional
        missing = (f"{name} is missing.",) if needed else ()
        assert check(spec, without)[: len(missing)] == missing
        extra = {**shapes, f"{name}_scale": (1,)}
        assert check(spec, extra) == (f"{name}_scale [1] is not read by anything in the spec.",)


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_width_is_named(case, built):
    _, spec, _, shapes = built(case)
    embed = dict(spec.tensors)["embed"]
    for name, (*outer, last) in shapes.items():
        if not ignores(spec, name):
            complaints = check(spec, {**shapes, name: (*outer, last + 1)})
            module = name.rpartition(".")[0]
            assert complaints if module == embed else any(module in sentence for sentence in complaints), name


def test_a_spec_that_contradicts_itself_is_named(built):
    _, spec, checkpoint, _ = built("llama")

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
