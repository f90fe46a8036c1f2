"""transformers quantizes while it loads: every field of a GPTQConfig means what the table in `request` says."""

import copy
import inspect
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
import transformers
from gptq_fn_interop import on_load
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.gptq_config import GPTQConfig
from gptq_fn_interop.gptq_format import scheme_of
from gptq_fn_interop.hf import from_hf
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.quantizer import register
from gptq_fn_interop.request import FIELDS, read, samples
from gptq_writer import Scheme, random_linear
from safetensors.torch import load_file
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_fn import QuantConfig, QuantizedLinear, Rule, quantize

register()

(STOCK,) = (cls for cls in GPTQConfig.__bases__ if cls.__name__ == "GPTQConfig")
TEXTS = ["GPTQ quantizes the weights of a model.", "Some calibration text of another length, which is longer.", "Short."]
USUAL: dict[str, Any] = {"bits": 4, "dataset": TEXTS, "group_size": 32, "min_rows": 10_000, "grid": "minmax"}
"""Too few rows, so all is rounded to nearest: what is solved does not matter to most tests, and compiling that takes long."""
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("dense") / "llama", num_hidden_layers=1)


def load(directory: Path, config: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, quantization_config=config, **kwargs)


def linears(model: Any) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS if model.device.type == "meta" else IDS.to(model.device)).logits


# the whole way


@pytest.mark.parametrize("cls", [GPTQConfig, STOCK])
@pytest.mark.parametrize("name", [True, False])
def test_codes_are_those_of_quantize(dense: Path, tmp_path: Path, cls: type, name: bool) -> None:
    """With transformers' own class and ours, the tokenizer an object or a name, and after saving and loading again."""
    tokenizer = str(dense) if name else AutoTokenizer.from_pretrained(dense)
    model = load(dense, cls(bits=4, dataset=TEXTS, tokenizer=tokenizer, group_size=32))
    ids = [np.asarray(AutoTokenizer.from_pretrained(dense)(text)["input_ids"], np.int32) for text in TEXTS]
    params, spec = from_hf(AutoModelForCausalLM.from_pretrained(dense))
    expected = quantize(params, spec, ids, QuantConfig(group_size=32, damp=0.1)).params["blocks"]
    found = from_hf(model)[0]["blocks"]
    for mine, theirs in zip(found, expected, strict=True):
        for role, leaf in theirs.items():
            if isinstance(leaf, QuantizedLinear):
                assert np.array_equal(mine[role].codes, leaf.codes)
                assert np.array_equal(mine[role].scale, leaf.scale)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.generate(IDS, max_new_tokens=4, do_sample=False), model.generate(IDS, max_new_tokens=4, do_sample=False))
    for file in ("config.json", "quantize_config.json"):
        text = (tmp_path / file).read_text()
        assert "checkpoint_format" in text
        assert "dataset" not in text
        assert "tokenizer" not in text


def test_negative_scales_multiply_in_transformers(dense: Path, tmp_path: Path) -> None:
    """Packed and through dequantize(), against a float model with (code - 8) * scale from the words of the file, one nibble at a time."""
    load(dense, GPTQConfig(**{**USUAL, "grid": "mse"}, negative_scales=True)).save_pretrained(tmp_path)
    tensors, plain = load_file(tmp_path / "model.safetensors"), AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    for name in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
        words, scales = tensors[f"{name}.qweight"].numpy().view(np.uint32), tensors[f"{name}.scales"].float()
        assert 0.2 < (scales < 0).float().mean() < 0.8
        codes = np.stack([words >> 4 * i & 15 for i in range(8)], 1).reshape(-1, words.shape[1]).astype(np.int64)
        weight = torch.from_numpy(codes - 8) * scales[tensors[f"{name}.g_idx"].long()]
        plain.get_submodule(name).weight.data = weight.T.contiguous()
    expected, packed = logits(plain), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (logits(packed) - expected).norm() < 1e-5 * expected.norm()
    assert (logits(packed.dequantize()) - expected).norm() < 1e-5 * expected.norm()


def test_a_model_in_no_table_is_traced(tmp_path: Path, dense: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=320, hidden_size=64, n_layer=1, n_head=2)
    config.apply_residual_connection_post_layernorm = True  # which the table does not describe
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path / "dense")
    model = load(tmp_path / "dense", GPTQConfig(**USUAL, tokenizer=str(dense), sym=False))
    assert len(linears(model)) == 4
    model.save_pretrained(tmp_path / "saved")
    told = json.loads((tmp_path / "saved" / "quantize_config.json").read_text())
    assert told["checkpoint_format"] == "gptq_v2"  # whatever was asked for: the older has no room for a zero point of 0
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_the_device_map_may_be_auto(dense: Path) -> None:
    model = load(dense, GPTQConfig(**USUAL), device_map="auto", max_memory={"cpu": "1GiB"})
    model.to("cpu")
    assert torch.equal(logits(model), logits(load(dense, GPTQConfig(**USUAL))))


def test_a_model_in_half_precision(dense: Path, tmp_path: Path) -> None:
    """Asked for with the config as plain data."""
    model = load(dense, {**USUAL, "quant_method": "gptq"}, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))


@pytest.mark.gpu
def test_a_model_that_the_gpu_does_not_hold(dense: Path) -> None:
    """Half on the GPU and half on the CPU, before and after."""
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers": 0, "model.norm": "cpu", "lm_head": "cpu"}
    model = load(dense, GPTQConfig(**USUAL), device_map=places)
    assert {q.qweight.device.type for q in linears(model).values()} == {"cuda"}
    torch.testing.assert_close(logits(model).cpu(), logits(load(dense, GPTQConfig(**USUAL))), rtol=1e-3, atol=1e-3)
    whole = load(dense, GPTQConfig(**USUAL), device_map="auto")
    assert whole.device.type == "cuda"
    torch.testing.assert_close(logits(whole).cpu(), logits(model).cpu(), rtol=1e-3, atol=1e-3)


def test_weights_on_the_disk_are_refused_before_they_are_loaded(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="puts weights on the disk, where they cannot be quantized"):
        load(dense, GPTQConfig(**USUAL), device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path)
    with pytest.raises(ValueError, match="Give more memory with max_memory"):
        load(dense, GPTQConfig(**USUAL), device_map="auto", max_memory={"cpu": "100KB"}, offload_folder=tmp_path)


def test_offloaded_weights_are_gathered_and_spread_again(dense: Path) -> None:
    """As with a GPU that does not hold the model; here, the CPU takes its place."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    expected = load(dense, GPTQConfig(**USUAL))
    accelerate.dispatch_model(model, {"model": "cpu", "lm_head": "cpu"}, main_device="cpu", force_hooks=True)
    accelerate.cpu_offload(model.model, "cpu")
    model.hf_device_map = {"model": "cpu", "lm_head": torch.device("cpu")}
    assert model.model.embed_tokens.weight.is_meta
    on_load.quantize(model, GPTQConfig(**USUAL))
    assert torch.equal(logits(model), logits(expected))


# fields


def test_every_field_of_transformers_has_a_meaning() -> None:
    assert set(inspect.signature(STOCK).parameters) - {"kwargs"} <= FIELDS.keys()
    assert all(FIELDS.values())


BASE = QuantConfig(damp=0.1)
ASKED: list[tuple[dict[str, Any], QuantConfig]] = [
    ({}, BASE),
    ({"bits": 3, "group_size": 32, "sym": False}, replace(BASE, bits=3, group_size=32, sym=False)),
    ({"alpha": 0.5}, replace(BASE, alpha=0.5)),
    ({"group_size": -1, "true_sequential": False}, replace(BASE, group_size=None, sequential=False)),
    ({"damp_percent": 0.01, "desc_act": True, "act_group_aware": False}, replace(BASE, damp=0.01, order="act")),
    ({"damp_percent": None, "act_group_aware": False}, replace(BASE, damp=None, order="natural")),
    ({"desc_act": True, "act_group_aware": True, "static_groups": True}, replace(BASE, order="act", static_groups=True)),
    ({"grid": "minmax", "experts": "all", "min_rows": 1}, replace(BASE, grid="minmax", experts="all", min_rows=1)),
    ({"grid": "hid", "negative_scales": True}, replace(BASE, grid="hid", negative_scales=True)),
    (
        {"dynamic": {"-:.*q_proj": {}, "+:.*[.]1[.]": {"bits": 8, "desc_act": True}, ".*v_proj": {"group_size": -1}}},
        replace(
            BASE,
            rules=(
                Rule(".*q_proj"),
                Rule(".*[.]1[.]", replace(BASE, bits=8, order="act")),
                Rule(".*v_proj", replace(BASE, group_size=None)),
            ),
        ),
    ),
    (dict.fromkeys(["use_exllama", "disable_exllama", "use_cuda_fp16", "cache_block_outputs"], True), BASE),
    ({"exllama_config": {"version": 2}, "max_input_length": 2048, "batch_size": 8, "pad_token_id": 1, "pack_dtype": "int32"}, BASE),
    ({"module_name_preceding_first_block": ["model.embed_tokens"], "model_seqlen": 100}, BASE),
]


@pytest.mark.parametrize(("fields", "expected"), ASKED)
def test_fields_are_options_of_the_solver(fields: dict[str, Any], expected: QuantConfig) -> None:
    assert read(GPTQConfig(**{"bits": 4, "dataset": TEXTS, **fields})).config == expected


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dataset": None}, "needs calibration text, but dataset is missing; pass GPTQConfig"),
    ({"dataset": [1, 2]}, "dataset is no text"),
    ({"dataset": []}, "dataset is no text"),
    ({"rotation": "hadamard"}, "rotation='hadamard', which means nothing here; there are bits, group_size"),
    ({"dynamic": {".*": {"bit": 8}}}, "The dynamic rule '.[*]' sets 'bit'; a rule may set bits"),
    ({"group_size": 0}, "group_size must be positive"),
    ({"damp_percent": 1.5}, "damp is relative to .* got 1.5"),
    ({"pack_dtype": "int16"}, "words of int32, not of int16"),
    ({"modules_in_block_to_quantize": [["self_attn.q_proj"], ["other"]]}, "names 'other', but the linears of a block are mlp.down_proj"),
    ({"block_name_to_quantize": "model.other"}, "The model has no module 'model.other'. Blocks may be in model.layers"),
    ({"dataset": "no/such/file.txt"}, "There is no file 'no/such/file.txt'"),
    ({"dataset": ["text", ""]}, "Text 1 of the dataset, '', has no tokens"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_done_is_refused_in_a_sentence(
    dense: Path, fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        load(dense, GPTQConfig(**{"bits": 4, "dataset": TEXTS, **fields}))


def test_other_formats_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="format gptq and gptq_v2"):
        GPTQConfig(bits=4, dataset=TEXTS, format="marlin")
    with pytest.raises(ValueError, match="saved in format gptq or gptq_v2, not 'marlin'"):
        read(STOCK(bits=4, dataset=TEXTS, format="marlin"))


def test_a_field_of_a_later_transformers_is_no_matter_at_its_default() -> None:
    class Later(STOCK):
        def __init__(self, bits: int, novelty: int = 1, **more: Any):
            super().__init__(bits, **more)
            self.novelty = novelty

    assert read(Later(bits=4, dataset=TEXTS)).config == BASE
    with pytest.raises(ValueError, match="novelty=2, which means nothing"):
        read(Later(bits=4, dataset=TEXTS, novelty=2))


# the text


@pytest.mark.parametrize("named", ["tokenizer", "its name", "the model's own"])
def test_texts_are_samples_as_they_are(dense: Path, named: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(dense)
    given = {"tokenizer": tokenizer, "its name": str(dense), "the model's own": None}[named]
    model = AutoModelForCausalLM.from_pretrained(dense)
    found = samples(read(GPTQConfig(bits=4, dataset=TEXTS, tokenizer=given, model_seqlen=7)), model)
    assert [list(ids) for ids in found] == [tokenizer(text)["input_ids"][:7] for text in TEXTS]


def test_a_named_dataset_is_cut_into_as_many_samples_as_transformers_takes(dense: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense)
    found = samples(read(GPTQConfig(bits=4, dataset="pydoc", model_seqlen=50)), model)
    assert np.array_equal(found, tokens("pydoc", dense, samples=128, length=50))
    (tmp_path / "text").write_text("more words for a file of text. " * 5000)
    assert np.shape(samples(read(GPTQConfig(bits=4, dataset=str(tmp_path / "text"), nsamples=3)), model)) == (3, 2048)
    model.config.max_position_embeddings = 100_000
    with pytest.raises(ValueError, match="windows of 4028 tokens, but 128 were asked for"):
        samples(read(GPTQConfig(bits=4, dataset=str(tmp_path / "text"))), model)
    assert read(GPTQConfig(bits=4, dataset="c4-new")).dataset == "c4"


# where


@pytest.mark.parametrize("blocks", [None, "model.layers"])
def test_only_the_named_linears_of_a_block(dense: Path, tmp_path: Path, blocks: str | None) -> None:
    named = [["self_attn.k_proj", "self_attn.q_proj"], ["mlp.down_proj"]]
    model = load(dense, GPTQConfig(**USUAL, modules_in_block_to_quantize=named, block_name_to_quantize=blocks))
    assert sorted(linears(model)) == [f"model.layers.0.{name}" for name in ("mlp.down_proj", "self_attn.k_proj", "self_attn.q_proj")]
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "quantize_config.json").read_text())
    for role in ("self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"):
        assert (scheme_of(f"model.layers.0.{role}", told) is None) == (f"model.layers.0.{role}" not in linears(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_rules_and_the_head(dense: Path, tmp_path: Path) -> None:
    rules = {"-:.*[.]o_proj": {}, "-:.*mlp": {}}
    model = load(dense, GPTQConfig(**USUAL, dynamic=rules, lm_head=True))
    found = linears(model)
    assert {"lm_head", "model.layers.0.self_attn.q_proj"} <= found.keys()
    assert not [name for name in found if "o_proj" in name or "mlp" in name]
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "quantize_config.json").read_text())
    assert told["lm_head"]
    assert list(told["dynamic"])[:2] == list(rules)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


# what it says and holds


@pytest.mark.parametrize("asked", ["gptq", "gptq_v2"])
def test_the_version_of_zero_points(dense: Path, tmp_path: Path, asked: str) -> None:
    config = GPTQConfig(**USUAL, format=asked, meta={"by": "me"}, backend="reference")
    model = load(dense, config)
    assert {q.backend for q in linears(model).values()} == {"reference"}
    before = logits(model)
    model.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "quantize_config.json").read_text())
    assert told["checkpoint_format"] == asked
    assert told["meta"]["by"] == "me"
    assert told["meta"]["quantizer"][0].startswith("gptq_fn")
    words = load_file(tmp_path / "model.safetensors")["model.layers.0.self_attn.q_proj.qzeros"]
    assert set(words.flatten().tolist()) == {{"gptq": 0x77777777, "gptq_v2": 0x88888888 - 2**32}[asked]}
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    for linear in linears(again).values():
        linear.backend = "reference"  # which is no part of a checkpoint
    assert torch.equal(logits(again), before)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_become_those_of_version_2(bits: int) -> None:
    older, newer = (random_linear(np.random.default_rng(0), 64, 32, Scheme(bits, zeros=zeros)).tensors for zeros in ("v1", "v2"))
    assert torch.equal(on_load._version_2(QuantLinear(older, bits)), newer["qzeros"])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal(
    dense: Path, terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    load(dense, GPTQConfig(**USUAL))
    assert ("Quantizing blocks" in screen.getvalue()) == terminal


def test_a_config_may_be_printed_and_copied(dense: Path) -> None:
    """Its tokenizer is told by name."""
    config = GPTQConfig(bits=4, dataset=TEXTS, tokenizer=AutoTokenizer.from_pretrained(dense))
    assert json.loads(config.to_json_string())["tokenizer"] == str(dense)
    assert GPTQConfig(4, "name", TEXTS).to_dict() == {"quant_method": "gptq", "bits": 4, "tokenizer": "name", "dataset": TEXTS}
    assert copy.deepcopy(config).dataset == TEXTS
