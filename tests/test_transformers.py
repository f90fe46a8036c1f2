"""transformers loads GPTQ checkpoints, and their logits are those of the dense model with the weights they stand for."""

import copy
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from checkpoints import FAMILIES, GATED, IDS, TOKENS, VOCAB, assert_equal_logits, checkpoint, load, logits, relative
from gptq_fn_interop import qlinear
from gptq_fn_interop.gptq_config import GPTQConfig as ours
from gptq_fn_interop.hf import from_hf, to_hf
from gptq_fn_interop.qlinear import QuantLinear
from gptq_writer import SCALE_DTYPES, Scheme, quantization_config, random_linear, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.tree_util import tree_leaves_with_path
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GPTQConfig, LlamaConfig

from gptq_fn import ModelSpec, QuantConfig, Quantized, Report, Rule, forward, round_to_nearest


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    bits = draw(st.sampled_from((2, 3, 4, 8)))
    sym, desc_act = draw(st.booleans()), draw(st.booleans())
    # Asymmetric version 1 files come in two kinds: one taken from each field, or from whole words by GPTQModel (not in 3 bits).
    kinds = ("v1", "v2") if sym or bits == 3 else ("v1", "v2", "v1_carry")
    return Scheme(
        bits=bits,
        group_size=draw(st.sampled_from((-1, 16, 32, 64))),
        sym=sym,
        desc_act=desc_act,
        zeros=draw(st.sampled_from(kinds)),
        scales=draw(st.sampled_from(SCALE_DTYPES)),
        g_idx=desc_act or draw(st.booleans()),
    )


# loading


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(scheme=schemes(), shards=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_logits_are_those_of_the_dense_model(
    family: str, scheme: Scheme, shards: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    case = checkpoint(tmp_path_factory.mktemp("checkpoint"), family, scheme, shards=shards, seed=seed)
    assert_equal_logits(load(case.directory, dtype=torch.float32), case)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("stored", "claimed"), [("v2", "gptq"), ("v1", "gptq_v2"), ("v1", None)])
def test_symmetric_zero_points_are_told_by_their_content(tmp_path: Path, bits: int, stored: str, claimed: str | None) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(bits, zeros=stored))
    case.edit(checkpoint_format=claimed)
    assert_equal_logits(load(tmp_path), case)


def test_who_wrote_asymmetric_zero_points_decides_how_they_are_read(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(sym=False, zeros="v1_carry"))
    assert_equal_logits(load(tmp_path), case)
    case.edit(meta=None)  # no longer by gptqmodel: borrows between fields are not undone
    assert relative(logits(load(tmp_path)), logits(case.dense)) > 1e-3


def test_a_rule_decides_whether_a_linear_is_symmetric(tmp_path: Path) -> None:
    """All zero points of a linear may happen to be the middle code less one; only where it is symmetric does that mean v1."""
    scheme = Scheme(sym=False, zeros="v2")
    case = checkpoint(tmp_path, "llama", scheme)
    name = case.quantized[0]
    zeros = torch.full_like(case.tensors[f"{name}.qzeros"], 0x77777777)
    case.rewrite(lambda tensors: tensors.__setitem__(f"{name}.qzeros", zeros))
    assert (load(tmp_path).get_submodule(name).packed.zeros == 7).all()
    case.edit(dynamic={f"+:{name}": {"sym": True}})
    assert (load(tmp_path).get_submodule(name).packed.zeros == 8).all()


def test_a_quantized_head(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(8, sym=False, zeros="v2", group_size=-1), head=True)
    assert "lm_head" in case.quantized
    model = load(tmp_path)
    assert_equal_logits(model, case)
    base = AutoModel.from_pretrained(tmp_path)  # has no head, and other names
    with torch.no_grad():  # quantized layers add up in another order than dense ones
        found, dense = base(IDS).last_hidden_state, case.dense.model(IDS).last_hidden_state
        exact = case.dense.model.double()(IDS).last_hidden_state
    assert relative(found, exact) < 2 * relative(dense, exact)


def test_a_quantized_head_is_not_tied(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "qwen2", Scheme())  # its config says that the head is the embedding
    head = random_linear(np.random.default_rng(1), 64, VOCAB, Scheme(8))
    case.rewrite(lambda tensors: tensors.update({f"lm_head.{leaf}": t for leaf, t in head.tensors.items()}))
    model = load(tmp_path)
    torch.testing.assert_close(model.lm_head(torch.eye(64)).T, torch.from_numpy(head.weight).float())
    assert torch.equal(model.get_input_embeddings().weight, case.dense.get_input_embeddings().weight)
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == case.tensors.keys()


def test_a_bfloat16_model(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    model = load(tmp_path, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    found = logits(model)
    layer = model.get_submodule(case.quantized[0])
    assert [p.backend.name for p in layer._derived.prepared.values()] == ["cpu_vectors"]
    exact = logits(case.dense)
    assert relative(found, exact) < 2 * relative(logits(case.dense.bfloat16()), exact)


@pytest.mark.parametrize("asked", [{"device_map": "auto"}, {"device_map": "auto", "max_memory": {"cpu": "1GiB"}}, {"device_map": "cpu"}])
def test_device_map(tmp_path: Path, asked: dict[str, Any]) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(), shards=2)
    assert_equal_logits(load(tmp_path, **asked), case)


@pytest.mark.parametrize("buffers", [False, True])
def test_weights_may_stay_on_the_disk(tmp_path: Path, buffers: bool) -> None:
    """Offloading to a folder, as accelerate does it with what max_memory leaves no room for. `buffers`: the codes, too."""
    case = checkpoint(tmp_path, "llama", Scheme(desc_act=True), shards=2)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= dict.fromkeys(["model.layers.1", "model.norm", "lm_head"], "disk")
    model = load(tmp_path, device_map=places, offload_folder=tmp_path / "offloaded", offload_buffers=buffers)
    assert model.model.layers[1].mlp.down_proj.scales.is_meta
    assert model.model.layers[1].mlp.down_proj.qweight.is_meta == buffers
    assert_equal_logits(model, case)
    assert_equal_logits(model, case)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved.keys() == case.tensors.keys()
    assert all(torch.equal(saved[name], t) for name, t in case.tensors.items())


def test_what_max_memory_leaves_no_room_for_stays_on_the_disk(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    model = load(tmp_path, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path / "offloaded")
    assert {"cpu", "disk"} == set(model.hf_device_map.values())
    assert_equal_logits(model, case)


def test_generate_and_pipeline(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "qwen2", Scheme(3, group_size=64))
    model = load(tmp_path)
    ask = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(model.generate(IDS, **ask), case.dense.generate(IDS, **ask))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0")
    tokenizer.save_pretrained(tmp_path)
    pipeline: Any = transformers.pipeline("text-generation", str(tmp_path))
    (found,) = pipeline("w5 w6 w7", max_new_tokens=4, do_sample=False)
    assert found["generated_text"].startswith("w5 w6 w7")
    assert len(found["generated_text"]) > len("w5 w6 w7")


# the config


def test_the_users_config_may_name_a_backend(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    case.edit(backend="marlin")  # some other package's kernel, written by whoever quantized
    assert_equal_logits(load(tmp_path), case)
    with pytest.warns(UserWarning, match="loading attributes"):
        model = load(tmp_path, quantization_config=GPTQConfig(bits=4, backend="reference"))
    assert model.get_submodule(case.quantized[0]).backend == "reference"
    with pytest.warns(UserWarning, match="loading attributes"):
        model = load(tmp_path, quantization_config=GPTQConfig(bits=4, backend="triton"))  # which may be about to go to a GPU
    with pytest.raises(ValueError, match=r"(?s)Backend 'triton' does not serve.*reference: serves it"):
        logits(model)
    config = GPTQConfig(bits=4, backend="marlin")
    with pytest.warns(UserWarning, match="loading"), pytest.raises(ValueError, match=r"no backend 'marlin'; there are .*reference"):
        load(tmp_path, quantization_config=config)


@pytest.mark.parametrize("form", ["marlin", "gptq_p", "bitblas"])
def test_other_formats_are_refused(tmp_path: Path, form: str) -> None:
    checkpoint(tmp_path, "llama", Scheme()).edit(checkpoint_format=form)
    with pytest.raises(ValueError, match=f"gptq and gptq_v2 can be read, but this one is '{form}'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_bits_are_refused(tmp_path: Path) -> None:
    checkpoint(tmp_path, "llama", Scheme()).edit(bits=5)
    with pytest.raises(ValueError, match="2, 3, 4 or 8 bits can be read, but this one has 5"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


EXLLAMA: list[dict[str, Any]] = [
    {"use_exllama": False},
    {"use_exllama": True},
    {"disable_exllama": True},
    {"exllama_config": {"version": 2}},
    {"exllama_config": {"version": 1}, "max_input_length": 4096, "use_cuda_fp16": True},
    {"backend": "auto_trainable"},
]


@pytest.mark.parametrize("asked", EXLLAMA, ids=str)
def test_kernels_of_other_packages_are_no_matter(tmp_path: Path, asked: dict[str, Any]) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    case.edit(use_exllama=True, exllama_config={"version": 1})
    with pytest.warns(UserWarning, match="loading attributes"):
        model = load(tmp_path, quantization_config=GPTQConfig(bits=4, **asked))
    assert_equal_logits(model, case)
    assert model.get_submodule(case.quantized[0]).backend is None
    model.save_pretrained(tmp_path / "saved")
    found = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert found == case.config()["quantization_config"]


def test_a_config_from_before_this_package_was_imported_loads(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    assert GPTQConfig is transformers.GPTQConfig is ours
    (stock,) = (cls for cls in ours.__bases__ if cls.__name__ == "GPTQConfig")
    with pytest.warns(UserWarning, match="loading attributes"):
        assert_equal_logits(load(tmp_path, quantization_config=stock(bits=4, use_exllama=False)), case)


def test_a_file_of_another_name_is_found_where_the_config_names_it(tmp_path: Path) -> None:
    """As AutoGPTQ calls it. transformers looks for model.safetensors unless it is told."""
    case = checkpoint(tmp_path, "llama", Scheme())
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.transformers_weights = "gptq_model-4bit-32g.safetensors"
    model = load(tmp_path, config=config)
    assert_equal_logits(model, case)
    model.save_pretrained(tmp_path / "saved")
    assert_equal_logits(load(tmp_path / "saved"), case)


def test_a_state_dict_does_not_tell_what_is_quantized(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"not from a state_dict; see gptq_fn.interop.to_hf"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=case.tensors)


# what goes wrong in transformers unless it is prevented: one test for each trap


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_absent_g_idx_is_derived_not_uninitialized(tmp_path: Path, family: str) -> None:
    case = checkpoint(tmp_path, family, Scheme(4, 40, g_idx=False))  # 40 + 24: only the config tells where groups end
    model = load(tmp_path)
    assert_equal_logits(model, case)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    for name in case.quantized:
        inputs = model.get_submodule(name).in_features
        assert torch.equal(saved[f"{name}.g_idx"], torch.arange(inputs, dtype=torch.int32) // 40)


def test_an_absent_g_idx_follows_the_tensors_where_the_config_contradicts_them(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(4, 32, g_idx=False))
    case.edit(group_size=128)
    assert_equal_logits(load(tmp_path), case)


def test_an_absent_g_idx_that_cannot_be_known_is_refused(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(4, 13, g_idx=False))
    case.edit(group_size=128)
    with pytest.raises(ValueError, match=r"has no g_idx, and 5 groups of 64 inputs do not tell"):
        load(case.directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("scales", SCALE_DTYPES)
def test_scales_keep_their_bits_whatever_the_models_dtype(tmp_path: Path, dtype: torch.dtype, scales: torch.dtype) -> None:
    case = checkpoint(tmp_path, "qwen2", Scheme(scales=scales))
    model = load(tmp_path, dtype=dtype)
    assert model.dtype == dtype
    state = model.state_dict()
    for name in case.quantized:
        for leaf in ("qweight", "qzeros", "scales", "g_idx"):
            assert state[f"{name}.{leaf}"].dtype == case.tensors[f"{name}.{leaf}"].dtype
            assert torch.equal(state[f"{name}.{leaf}"], case.tensors[f"{name}.{leaf}"])
    logits(model)


def test_scales_cast_with_the_whole_model_still_work(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(3))
    model = load(tmp_path)
    logits(model)  # so that there is something derived to forget
    model.bfloat16()
    assert relative(logits(model), logits(case.dense)) < 0.05


def test_nothing_quantized_is_trainable_but_gradients_pass(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "qwen2", Scheme()).directory)
    assert model.hf_quantizer.is_trainable
    for module in model.modules():
        if isinstance(module, QuantLinear):
            assert not any(p.requires_grad for p in module.parameters(recurse=False))
    model(IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_loading_never_dequantizes(tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers initializes `c_proj.weight` of GPT-2 and the weight of every nn.Linear, loaded or not."""
    case = checkpoint(tmp_path, family, Scheme())
    with monkeypatch.context() as patch:
        patch.setattr(qlinear, "dequantize", lambda *_: pytest.fail("the weight was dequantized"))
        model = load(tmp_path)
    assert model.get_submodule(case.quantized[0]).weight.device.type == "cpu"


def test_experts_that_are_not_quantized_as_a_whole_are_refused(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **GATED, **TOKENS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    rng = np.random.default_rng(0)
    tensors = {f"model.layers.0.mlp.experts.0.gate_proj.{leaf}": t for leaf, t in random_linear(rng, 64, 32, Scheme()).tensors.items()}
    described = {**json.loads(config.to_json_string()), "quantization_config": quantization_config(Scheme())}
    write(tmp_path, {**described, "architectures": ["Qwen3MoeForCausalLM"]}, tensors)
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.experts: Expert 0 has quantized linears for gate, but Qwen3MoeExperts needs down, gate, up"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_files_decide_what_is_quantized_and_in_how_many_bits(tmp_path: Path) -> None:
    def choose(name: str) -> Scheme | None:
        if "down_proj" in name:
            return None
        return Scheme(8, 16) if "layers.1" in name else Scheme(3, 64) if "q_proj" in name else Scheme()

    case = checkpoint(tmp_path, "llama", Scheme(), choose=choose)  # the config says 4 bits and group 32 of all
    model = load(tmp_path)
    assert_equal_logits(model, case)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert model.model.layers[0].self_attn.q_proj.bits == 3


MORE: dict[str, Any] = {
    "dynamic": {"z_first": {"group_size": 64}, "-:.*m_second": {}, "+:.*a_third": {"bits": 8}},
    "backend": "marlin",
    "lm_head": False,
    "pack_dtype": "int32",
    "static_groups": False,
    "modules_in_block_to_quantize": [["self_attn.q_proj"]],
    "meta": {"quantizer": ["gptqmodel:7.7.0"], "uri": "https://example.org", "damp_percent": 0.05},
    "something_of_the_future": [1, {"b": 2, "a": 1}],
}


@pytest.mark.parametrize(("family", "shard"), [*((family, "50GB") for family in FAMILIES), ("llama", "20KB"), ("gpt2", "20KB")])
def test_saving_changes_nothing(tmp_path: Path, family: str, shard: str) -> None:
    scheme = Scheme(3, 64, sym=False, desc_act=True, zeros="v2", scales=torch.bfloat16)
    case = checkpoint(tmp_path, family, scheme)
    case.edit(**MORE)
    model = load(tmp_path)
    logits(model)
    model.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert (len(files) > 2) == (tmp_path / "saved" / "model.safetensors.index.json").exists() == (shard != "50GB")
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert saved.keys() == case.tensors.keys()
    assert all(torch.equal(saved[name], t) and saved[name].dtype == t.dtype for name, t in case.tensors.items())
    found = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert found == json.loads((tmp_path / "saved" / "quantize_config.json").read_text()) == case.config()["quantization_config"]
    for file in ("config.json", "quantize_config.json"):  # transformers sorts keys, but of rules the first match wins
        text = (tmp_path / "saved" / file).read_text()
        assert text.index("z_first") < text.index("m_second") < text.index("a_third")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_saving_in_shards_keeps_a_head_and_experts(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        **GATED, **TOKENS, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, decoder_sparse_step=1
    )
    rng = np.random.default_rng(0)
    dense = AutoModelForCausalLM.from_config(config)
    tensors = {name: t for name, t in dense.state_dict().items() if ".experts." not in name and name != "lm_head.weight"}
    shapes = {"gate_proj": (64, 32), "up_proj": (64, 32), "down_proj": (32, 64)}
    experts = [(f"model.layers.{i}.mlp.experts.{n}.{role}", s) for i in (0, 1) for n in (0, 1) for role, s in shapes.items()]
    for name, (inputs, outputs) in [("lm_head", (64, VOCAB)), *experts]:
        tensors |= {f"{name}.{leaf}": t for leaf, t in random_linear(rng, inputs, outputs, Scheme(desc_act=True)).tensors.items()}
    described = {**json.loads(config.to_json_string()), "quantization_config": quantization_config(Scheme(), lm_head=True)}
    write(tmp_path, {**described, "architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32"}, tensors, shards=2)
    model = load(tmp_path)
    model.save_pretrained(tmp_path / "saved", max_shard_size="20KB")
    files = sorted((tmp_path / "saved").glob("*.safetensors"))
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(files) > 2
    assert saved.keys() == tensors.keys()
    assert all(torch.equal(saved[name], t) for name, t in tensors.items())
    assert torch.equal(logits(load(tmp_path / "saved")), logits(model))


def test_only_quantized_models_leave_a_quantize_config(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    case.dense.save_pretrained(tmp_path / "dense")
    load(tmp_path).dequantize().save_pretrained(tmp_path / "dequantized")
    assert not [*(tmp_path / "dense").glob("quantize*"), *(tmp_path / "dequantized").glob("quantize*")]


@pytest.mark.parametrize("zeros", ["v1", "v1_carry"])
def test_saving_keeps_zero_points_as_they_were_stored(tmp_path: Path, zeros: str) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(4, sym=False, zeros=zeros))
    model = load(tmp_path)
    logits(model)
    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[f"{name}.qzeros"], case.tensors[f"{name}.qzeros"]) for name in case.quantized)
    assert_equal_logits(load(tmp_path / "saved"), case)


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantize_gives_the_dense_model_back(tmp_path: Path, family: str) -> None:
    case = checkpoint(tmp_path, family, Scheme(4, sym=False, zeros="v2"))
    model = load(tmp_path).dequantize()
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds == {name: type(module) for name, module in case.dense.named_modules()}
    model.save_pretrained(tmp_path / "dense")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert relative(logits(again), logits(case.dense)) < 1e-6


# damage


HALF = (("qweight", 32), ("qzeros", 4), ("scales", 32))
"""Leaves of a linear of 4 bits, and what of them makes half its outputs."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(f"{name}.qzeros"), "has a qweight but no qzeros; the checkpoint is incomplete"),
        (lambda t, name: t.__setitem__(f"{name}.qweight", t[f"{name}.qweight"][:3]), "does not hold 64 inputs"),
        (lambda t, name: t.__setitem__(f"{name}.scales", t[f"{name}.scales"][:1]), "qzeros is"),
        (lambda t, name: t.__setitem__("model.layers.0.other.qweight", t.pop(f"{name}.qweight")), "has no such linear"),
        (lambda t, name: t.__setitem__("model.embed_tokens.qweight", t.pop(f"{name}.qweight")), "is of type Embedding; only linear"),
        (lambda t, name: t[f"{name}.g_idx"].add_(1), "q_proj: g_idx reaches from 1 to 2 but there are 2 groups; the checkpoint is damaged"),
        (lambda t, name: t[f"{name}.g_idx"].sub_(7), "q_proj: g_idx reaches from -7 to -6 but"),
        (lambda t, name: t[f"{name}.scales"].view(-1)[3:4].fill_(torch.inf), "q_proj: some scales are infinite or NaN"),
        (
            lambda t, name: t.update({f"{name}.{leaf}": t[f"{name}.{leaf}"][:, :n] for leaf, n in HALF}),
            "has 32 outputs but the model's",
        ),
    ],
)
def test_damaged_checkpoints_are_refused_by_name(tmp_path: Path, change: Callable[[dict, str], Any], message: str) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    case.rewrite(lambda tensors: change(tensors, case.quantized[0]))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_config_that_promises_more_blocks_is_refused(tmp_path: Path) -> None:
    """transformers would fill them with random numbers and only warn."""
    case = checkpoint(tmp_path, "gpt2", Scheme())
    config = case.config()
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    with pytest.raises(ValueError, match=r"promises 3 transformer[.]h, but the files hold nothing of number 2; it is of another model"):
        load(tmp_path)


def test_whole_numbers_in_the_place_of_a_norm_are_refused(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme())
    case.rewrite(lambda tensors: tensors.__setitem__("model.norm.weight", tensors["model.norm.weight"].to(torch.int32)))
    with pytest.raises(ValueError, match=r"model[.]norm[.]weight holds int32, but floating numbers are expected"):
        load(tmp_path)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    case = checkpoint(tmp_path, "llama", Scheme(), shards=2)
    whole = (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model-00001-of-00002.safetensors is not a readable safetensors file.*not copied completely"):
        load(tmp_path)
    (tmp_path.parent / "outside.safetensors").write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-of-00002", "../outside"))
    with pytest.raises(ValueError, match=r"points to .*outside[.]safetensors, which is no file of its directory"):
        load(case.directory)


# the layer


def layer_of(scheme: Scheme, seed: int = 0) -> tuple[QuantLinear, torch.Tensor]:
    linear = random_linear(np.random.default_rng(seed), 64, 32, scheme)
    layer = QuantLinear({**linear.tensors, "bias": torch.arange(32.0)}, scheme.bits, quantization_config(scheme))
    return layer, torch.from_numpy(linear.weight).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_layer_is_a_linear_with_a_bias(dtype: torch.dtype) -> None:
    layer, weight = layer_of(Scheme(8, scales=torch.bfloat16))
    x = torch.randn(2, 3, 64).to(dtype)
    y = layer(x)
    assert isinstance(layer, nn.Linear)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), x.double() @ weight.double().T + torch.arange(32.0).double(), rtol=0.02, atol=0.05)
    assert layer.weight.dtype == torch.bfloat16
    assert "in_features=64, out_features=32, bits=8, groups=2, bias=True" in str(layer)


def test_the_layer_notices_new_tensors() -> None:
    """Loading, casting and assigning reach a layer in three ways; its prepared weight must follow each."""
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    layer, _ = layer_of(Scheme())
    other, _ = layer_of(Scheme(), seed=1)
    expected = other(x)
    assert not torch.equal(layer(x), expected)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), expected)

    layer, _ = layer_of(Scheme())
    layer(x)
    for name, tensor in other.state_dict().items():
        setattr(layer, name, nn.Parameter(tensor, requires_grad=False) if name in ("scales", "bias") else tensor)
    assert torch.equal(layer(x), expected)

    layer(x.float())
    layer.bfloat16()  # rounds the scales
    fresh = QuantLinear(layer.state_dict(), 4, layer.scheme)
    assert torch.equal(layer(x.float()), fresh(x.float()))
    assert not torch.equal(layer(x.float()), other(x.float()))


def test_copies_and_pickles_of_the_layer_compute_the_same() -> None:
    layer, _ = layer_of(Scheme())
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other._derived is None
        assert torch.equal(other(x), expected)


def test_a_layer_without_values_says_so() -> None:
    layer, _ = layer_of(Scheme())
    with pytest.raises(ValueError, match="no values yet: its tensors are on the meta device"):
        layer.to("meta")(torch.ones(1, 64))


# without a directory


def rounded(params: Mapping[str, Any], spec: ModelSpec, config: QuantConfig) -> Quantized:
    """The model with every linear of its blocks rounded to nearest, as `config` says of it; irregular groups for act-order."""
    blocks = [dict(block) for block in params["blocks"]]
    for i, block in enumerate(spec.blocks):
        for linear in block.linears:
            if mine := config.resolve(spec.name_of(i, linear)):
                leaf = blocks[i][linear.role]
                q = replace(round_to_nearest(leaf["weight"], mine), bias=leaf.get("bias"))
                blocks[i][linear.role] = replace(q, group_of=q.group_of[::-1]) if mine.order == "act" else q
    return Quantized({**params, "blocks": blocks}, spec, Report(config, ()))


def jax_logits(params: Mapping[str, Any], spec: ModelSpec) -> torch.Tensor:
    return torch.from_numpy(np.array(forward(spec, params, jnp.asarray(IDS.numpy(), jnp.int32)))).double()


MIXED = QuantConfig(group_size=32, rules=(Rule(".*(down_proj|fc2|c_proj)$"), Rule(".*[.]1[.]", QuantConfig(bits=8, group_size=None))))
ASYMMETRIC = QuantConfig(bits=3, group_size=32, sym=False, order="act", grid="minmax")


@pytest.mark.parametrize(("family", "config"), [("llama", ASYMMETRIC), ("qwen2", MIXED), ("gpt2", MIXED), ("opt", ASYMMETRIC)])
def test_to_hf_and_back(tmp_path: Path, family: str, config: QuantConfig) -> None:
    torch.manual_seed(0)
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()
    params, spec = from_hf(dense)
    quantized = rounded(params, spec, config)
    model = to_hf(quantized)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert relative(logits(model), jax_logits(quantized.params, spec)) < 1e-5
    again, spec_again = from_hf(model)
    assert spec_again == spec
    left, right = ({str(path): leaf for path, leaf in tree_leaves_with_path(tree)} for tree in (again, quantized.params))
    assert left.keys() == right.keys()
    assert all(np.array_equal(left[path], right[path]) for path in left)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))
    assert relative(logits(model.dequantize()), jax_logits(quantized.params, spec)) < 1e-5


def test_to_hf_says_what_it_needs() -> None:
    params, spec = from_hf(AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES["llama"])))
    by_hand = rounded(params, replace(spec, origin=None), QuantConfig(group_size=32))
    with pytest.raises(ValueError, match=r"written by hand.*pass one as config="):
        to_hf(by_hand)
    assert isinstance(to_hf(by_hand, copy.deepcopy(FAMILIES["llama"])), transformers.LlamaForCausalLM)
    with pytest.raises(ValueError, match="describe different models"):
        to_hf(by_hand, transformers.Qwen3Config(**GATED, head_dim=16))  # which has norms of queries and keys
    with pytest.raises(ValueError, match="it is of another model"):
        to_hf(by_hand, LlamaConfig(**{**GATED, "num_hidden_layers": 3}))
