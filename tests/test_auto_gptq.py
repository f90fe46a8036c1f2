"""Programs that were written for AutoGPTQ run with their import changed, and leave models that transformers loads."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from gptq_fn_interop.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from gptq_fn_interop.auto_gptq import modeling as auto_modeling
from gptq_fn_interop.auto_gptq.examples import samples
from gptq_fn_interop.auto_gptq.modeling import BaseGPTQForCausalLM
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.stream import load_gptq
from gptq_writer import Scheme, random_linear
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BatchEncoding,
    LlamaConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    TextGenerationPipeline,
    pipeline,
)

from gptq_fn import QuantConfig

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SIZES: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0, "eos_token_id": 0}
GATED: dict[str, Any] = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(vocab_size=259, **GATED),
    "opt": OPTConfig(vocab_size=259, ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=512, pad_token_id=0, **SIZES),
    "qwen2": Qwen2Config(vocab_size=259, tie_word_embeddings=True, **GATED),
}
COMMIT = "0123456789" * 4
IDS = torch.randint(3, 259, (2, 12), generator=torch.Generator().manual_seed(0))


def dense(kind: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def save_dense(directory: Path, kind: str) -> str:
    """A float model with a tokenizer of bytes and a chat template."""
    dense(kind).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], chat_template=CHATML)
    fast.save_pretrained(directory)
    return str(directory)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def in_transformers(directory: str | Path) -> Any:
    """The model, every tensor of which found its place."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    return loaded[0]


def quantized_linears(model: Any) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_dense(tmp_path_factory.mktemp("opt") / "opt-125m", "opt")


def test_quantization_and_inference_of_the_readme(opt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    pretrained_model_dir = opt
    quantized_model_dir = "opt-125m-4bit"

    tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
    examples = [tokenizer("auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on GPTQ algorithm.")]
    quantize_config = BaseQuantizeConfig(
        bits=4,
        group_size=128,
        desc_act=False,
    )
    model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
    model.quantize(examples)
    model.save_quantized(quantized_model_dir)
    model.save_quantized(quantized_model_dir, use_safetensors=True)
    before = logits(model)

    model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device="cpu")
    print(tokenizer.decode(model.generate(**tokenizer("auto_gptq is", return_tensors="pt").to(model.device))[0]))
    pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
    print(pipeline("auto-gptq is", max_new_tokens=4)[0]["generated_text"])

    assert capsys.readouterr().out.count("auto") == 2
    assert torch.equal(logits(model), before)
    assert torch.equal(logits(in_transformers(quantized_model_dir)), before)
    assert len(quantized_linears(model)) == 12
    assert not torch.equal(before, logits(dense("opt")))
    assert {p.name for p in Path(quantized_model_dir).iterdir()} >= {"config.json", "model.safetensors", "quantize_config.json"}
    described = json.loads(Path(quantized_model_dir, "quantize_config.json").read_text())
    assert (described["bits"], described["group_size"], described["desc_act"], described["checkpoint_format"]) == (4, 128, False, "gptq")


def test_custom_models_of_the_readme(opt: str, tmp_path: Path) -> None:
    class OPTGPTQForCausalLM(BaseGPTQForCausalLM):
        layers_block_name = "model.decoder.layers"
        outside_layer_modules = [  # noqa: RUF012 - as AutoGPTQ's README writes it
            "model.decoder.embed_tokens", "model.decoder.embed_positions", "model.decoder.project_out",
            "model.decoder.project_in", "model.decoder.final_layer_norm"
        ]  # fmt: skip
        inside_layer_modules = [  # noqa: RUF012
            ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"],
            ["self_attn.out_proj"],
            ["fc1"],
            ["fc2"],
        ]

    tokenizer = AutoTokenizer.from_pretrained(opt)
    model = OPTGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(bits=4, group_size=32))
    examples = [tokenizer("Two texts of different lengths."), tokenizer("The second one is somewhat longer than the first.")]
    report = model.quantize(examples)
    assert len(report.linears) == 12
    model.save_quantized(tmp_path / "out")
    loaded = OPTGPTQForCausalLM.from_quantized(tmp_path / "out", device="cpu")
    assert type(loaded) is OPTGPTQForCausalLM
    assert loaded.quantize_config.desc_act
    assert torch.equal(logits(loaded), logits(model))

    class Fewer(OPTGPTQForCausalLM):
        inside_layer_modules = [["fc1"], ["fc2"]]  # noqa: RUF012

    model = Fewer.from_pretrained(opt, BaseQuantizeConfig(bits=4, group_size=32))
    model.quantize(examples)
    assert {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, QuantLinear)} == {"fc1", "fc2"}

    class Wrong(BaseGPTQForCausalLM):
        layers_block_name = "transformer.h"

    with pytest.raises(ValueError, match="describes another model"):
        Wrong.from_pretrained(opt, BaseQuantizeConfig()).quantize([tokenizer("anything at all")])


def test_the_example_of_qwen(tmp_path: Path) -> None:
    model_path = save_dense(tmp_path / "Qwen2-7B-finetuned", "qwen2")
    quant_path = str(tmp_path / "your_quantized_model_path")
    quantize_config = BaseQuantizeConfig(
        bits=8,
        group_size=128,
        damp_percent=0.01,
        desc_act=False,
        static_groups=False,
        sym=True,
        true_sequential=True,
        model_name_or_path=None,
        model_file_base_name="model",
    )
    max_len = 8192
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoGPTQForCausalLM.from_pretrained(model_path, quantize_config, max_memory={i: "20GB" for i in range(4)})  # noqa: C420

    messages = [
        [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Tell me who you are."},
            {"role": "assistant", "content": "I am a large language model named Qwen..."},
        ]
    ]
    data = []
    for msg in messages:
        text = tokenizer.apply_chat_template(msg, tokenize=False, add_generation_prompt=False)
        model_inputs = tokenizer([text])
        input_ids = torch.tensor(model_inputs.input_ids[:max_len], dtype=torch.int)
        data.append(dict(input_ids=input_ids, attention_mask=input_ids.ne(tokenizer.pad_token_id)))  # noqa: C408
    model.quantize(data, cache_examples_on_gpu=False)
    model.save_quantized(quant_path, use_safetensors=True)
    tokenizer.save_pretrained(quant_path)

    loaded = in_transformers(quant_path)
    assert torch.equal(logits(loaded), logits(model))
    assert {linear.bits for linear in quantized_linears(loaded)} == {8}
    error = (logits(loaded) - logits(dense("qwen2"))).norm() / logits(dense("qwen2")).norm()
    assert 0 < error < 0.02

    # What Qwen's page says AutoGPTQ cannot do: shards, here in place of the one file.
    model.save_quantized(quant_path, max_shard_size="40KB")
    assert len(Checkpoint(quant_path).files) > 1
    assert not Path(quant_path, "model.safetensors").exists()
    assert AutoTokenizer.from_pretrained(quant_path).chat_template == CHATML
    assert torch.equal(logits(in_transformers(quant_path)), logits(loaded))


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor], Any]:
    """The directory of a model as old AutoGPTQ left it, less its weights; these; and the float model that they stand for."""
    rng, model = np.random.default_rng(0), dense("llama")
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            linear = random_linear(rng, module.in_features, module.out_features, Scheme(desc_act=True, sym=False))
            module.weight.data = torch.from_numpy(linear.weight).float()
            del tensors[f"model.{name}.weight"]
            tensors |= {f"model.{name}.{leaf}": tensor for leaf, tensor in linear.tensors.items()}
    directory = tmp_path / "old"
    model.config.save_pretrained(directory)
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": True, "sym": False, "true_sequential": True}
    (directory / "quantize_config.json").write_text(json.dumps({**old, "model_name_or_path": None, "model_file_base_name": None}))
    return directory, tensors, model


@pytest.mark.parametrize(
    ("file", "recorded", "options"),
    [
        ("gptq_model-4bit-32g", None, {"use_triton": True, "inject_fused_attention": False, "use_cuda_fp16": True}),
        ("my-own-name", "my-own-name", {"torch_dtype": torch.float32, "disable_exllama": True, "trainable": True}),
        ("model", "renamed-since", {"device_map": "auto", "low_cpu_mem_usage": True}),
        ("only", None, {"max_memory": {"cpu": "1GB"}}),
        ("one-of-two", None, {"model_basename": "one-of-two", "device": "cpu"}),
    ],
)
def test_directories_of_autogptq_load_whatever_their_file_is_called(written: Any, file: str, recorded: str | None, options: Any) -> None:
    directory, tensors, model = written
    if recorded:
        described = json.loads((directory / "quantize_config.json").read_text())
        (directory / "quantize_config.json").write_text(json.dumps({**described, "model_file_base_name": recorded}))
    save_file(tensors, directory / f"{file}.safetensors", {"format": "pt"})
    if file == "one-of-two":
        save_file({}, directory / "another.safetensors")
        with pytest.raises(FileNotFoundError, match=r"has another\.safetensors, one-of-two\.safetensors; name one"):
            AutoGPTQForCausalLM.from_quantized(directory)
    loaded = AutoGPTQForCausalLM.from_quantized(directory, **options)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert loaded.quantize_config.group_size == 32
    assert loaded.device == torch.device("cpu")

    # saving it again makes a directory that needs none of this
    loaded.save_pretrained(directory.with_name("new"))
    assert torch.equal(logits(in_transformers(directory.with_name("new"))), logits(loaded))


def test_a_quantization_that_no_file_describes_may_be_given(written: Any) -> None:
    directory, tensors, model = written
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "quantize_config.json").unlink()
    with pytest.raises(ValueError, match=r"Neither quantize_config\.json nor config\.json"):
        AutoGPTQForCausalLM.from_quantized(directory)
    with pytest.raises(ValueError, match="tells of a quantization"):
        BaseQuantizeConfig.from_pretrained(directory)
    given = BaseQuantizeConfig(bits=4, group_size=32, sym=False)
    loaded = AutoGPTQForCausalLM.from_quantized(directory, quantize_config=given)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    dense("llama").save_pretrained(directory)
    with pytest.raises(ValueError, match="holds no quantized linear"):
        AutoGPTQForCausalLM.from_quantized(directory, quantize_config=given)


@pytest.fixture
def loaded(written: Any) -> Any:
    directory, tensors, _ = written
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return AutoGPTQForCausalLM.from_quantized(directory, device="cpu")


def test_models_of_the_hub_load_by_name(written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From huggingface_hub's own cache, as when the hub cannot be reached."""
    directory, tensors, model = written
    save_file(tensors, directory / "gptq_model-4bit-32g.safetensors", {"format": "pt"})
    kept = tmp_path / "cache" / "models--me--old-GPTQ"
    (kept / "snapshots").mkdir(parents=True)
    directory.rename(kept / "snapshots" / COMMIT)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    loaded = AutoGPTQForCausalLM.from_quantized("me/old-GPTQ", device="cpu", use_safetensors=True, use_triton=False)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    (kept / "refs" / "branch").write_text(COMMIT)
    assert AutoGPTQForCausalLM.from_quantized("me/old-GPTQ", device="cpu", revision="branch").quantized
    with pytest.raises(ValueError, match="no model of this name could be fetched from the hub"):
        AutoGPTQForCausalLM.from_quantized("me/another-GPTQ")


def test_another_base_name_and_metadata(loaded: Any, tmp_path: Path) -> None:
    loaded.quantize_config.model_file_base_name = "gptq_model-4bit-32g"
    out = tmp_path / "named"
    loaded.save_quantized(out, safetensors_metadata={"trained_on": 7})
    with safe_open(out / "gptq_model-4bit-32g.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "trained_on": "7"}
    assert torch.equal(logits(in_transformers(out)), logits(loaded))  # by an entry of config.json
    assert json.loads((out / "quantize_config.json").read_text())["model_file_base_name"] == "gptq_model-4bit-32g"
    assert BaseQuantizeConfig.from_pretrained(out).model_file_base_name == "gptq_model-4bit-32g"
    assert len(load_gptq(out)[0]["blocks"]) == len(loaded.model.model.layers)

    loaded.save_quantized(out, max_shard_size="50KB")  # the file of before would be loaded beside the shards by some engines
    assert not (out / "gptq_model-4bit-32g.safetensors").exists()
    for again in (in_transformers(out), AutoGPTQForCausalLM.from_quantized(out)):
        assert torch.equal(logits(again), logits(loaded))

    loaded.quantize_config.model_file_base_name = None
    loaded.save_quantized(out)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(in_transformers(out)), logits(loaded))
    loaded.quantize_config.model_file_base_name = "../elsewhere"
    with pytest.raises(ValueError, match=r"not the path '../elsewhere'"):
        loaded.save_quantized(out)


def test_a_save_that_fails_changes_nothing(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    loaded.save_quantized(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("gptq_fn_interop.auto_gptq.files.save_file", fail)
    for place in (out, tmp_path / "new"):
        with pytest.raises(OSError, match="No space"):
            loaded.save_quantized(place, safetensors_metadata={"a": "b"}, max_shard_size="50KB")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"old", "out"}


def test_float_models_are_not_overwritten(loaded: Any, opt: str) -> None:
    with pytest.raises(FileExistsError, match="a model that is not quantized, which would be lost"):
        loaded.save_quantized(opt)
    in_transformers(opt)


def test_push_to_hub(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            calls.append((repo_id, options))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, folder_path: Any, **options: Any) -> str:
            calls.append((sorted(path.name for path in Path(folder_path).iterdir()), options))
            return "https://commit"

    monkeypatch.setattr(auto_modeling, "HfApi", Api)
    message = "AutoGPTQ model for opt: 4bits"
    assert loaded.push_to_hub("opt-4bit", commit_message=message, use_auth_token=True) == "https://commit"
    assert calls[0] == ("opt-4bit", {"token": True, "private": None, "exist_ok": True})
    assert calls[1][1] == {"repo_id": "me/opt-4bit", "commit_message": message, "token": True, "create_pr": False}
    assert {"config.json", "quantize_config.json", "model.safetensors"} <= set(calls[1][0])

    loaded.push_to_hub("opt-4bit", save_dir=tmp_path / "saved", use_safetensors=True, token="hf_x", private=True, create_pr=True)
    assert calls[2][1]["private"]
    assert calls[3][0] == sorted(path.name for path in (tmp_path / "saved").iterdir())
    assert (calls[3][1]["token"], calls[3][1]["create_pr"]) == ("hf_x", True)

    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    loaded.push_to_hub("opt-4bit")
    assert "tokenizer.json" in calls[5][0]
    BaseGPTQForCausalLM(loaded.model, True, loaded.quantize_config).push_to_hub("opt-4bit")  # saved nowhere yet
    assert "model.safetensors" in calls[7][0]


def test_it_is_used_like_the_model_within(loaded: Any, opt: str) -> None:
    inner = loaded.model
    assert loaded.config is inner.config
    assert loaded.hf_device_map is None
    assert loaded.quantized
    assert loaded.to("cpu") is loaded
    assert torch.equal(loaded.generate(input_ids=IDS, max_new_tokens=3), inner.generate(IDS, max_new_tokens=3))
    assert loaded.prepare_inputs_for_generation(IDS)["input_ids"].shape == IDS.shape
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = loaded.no_such_thing
    tokenizer = AutoTokenizer.from_pretrained(opt)
    generator = pipeline("text-generation", model=loaded, tokenizer=tokenizer)
    expected = pipeline("text-generation", model=inner, tokenizer=tokenizer)
    asked = {"text_inputs": "What is it?", "max_new_tokens": 4, "do_sample": False}
    assert generator(**asked) == expected(**asked)


def test_options_mean_the_same_here() -> None:
    assert BaseQuantizeConfig().quant_config() == QuantConfig(bits=4, group_size=None, damp=0.01, order="act")
    config = BaseQuantizeConfig(3, 64, 0.1, False, True, False, False, model_file_base_name="x")
    expected = QuantConfig(bits=3, group_size=64, damp=0.1, order="group", static_groups=True, sym=False, sequential=False)
    assert config.quant_config() == expected
    assert BaseQuantizeConfig.from_dict({**config.to_dict(), "meta": {"quantizer": "another"}}) == config
    assert BaseQuantizeConfig(damp_percent=None).quant_config().damp is None


def test_a_config_is_kept_in_a_directory(tmp_path: Path) -> None:
    config = BaseQuantizeConfig(bits=8, group_size=32, model_file_base_name="x")
    config.save_pretrained(tmp_path / "new")
    assert BaseQuantizeConfig.from_pretrained(tmp_path / "new") == config


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"bits": 5}, "bits must be one of 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size must be positive"),
        ({"damp_percent": 1.0}, "must lie in"),
        ({"is_marlin_format": True}, "this config asks for marlin"),
        ({"awq_gemm_checkpoint": True}, "this config asks for awq"),
        ({"quant_method": "awq", "checkpoint_format": "gemm"}, "this config asks for awq, gemm"),
    ],
)
def test_impossible_configs_are_refused(options: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BaseQuantizeConfig(**options)


ROWS = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=6), min_size=1, max_size=3)
FORMS = {
    "lists": lambda rows: rows,
    "arrays": np.array,
    "int32": lambda rows: torch.tensor(rows, dtype=torch.int),
    "int64": torch.tensor,
}


@given(ROWS, st.sampled_from(["left", "right"]), st.sampled_from(sorted(FORMS)), st.booleans(), st.booleans())
def test_examples_of_any_form_give_their_own_tokens(rows: Any, side: str, form: str, flat: bool, boolean: bool) -> None:
    width = max(map(len, rows))
    padded = [[0] * (width - len(r)) + r if side == "left" else r + [0] * (width - len(r)) for r in rows]
    mask = [[0] * (width - len(r)) + [1] * len(r) if side == "left" else [1] * len(r) + [0] * (width - len(r)) for r in rows]
    ids, masks = FORMS[form](padded), (torch.tensor(mask).bool() if boolean else FORMS[form](mask))
    if flat:  # one example a row, each [time]
        examples: Any = [{"input_ids": ids[i], "attention_mask": masks[i]} for i in range(len(rows))]
    else:
        examples = [BatchEncoding({"input_ids": ids, "attention_mask": masks})]
    assert [found.tolist() for found in samples(examples)] == rows
    assert [found.tolist() for found in samples([{"input_ids": rows}])] == rows  # of different lengths, without masks


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        ([], "no examples to calibrate with"),
        (["a text"], "Example 0 is of type str"),
        ({"input_ids": [1], "attention_mask": [1]}, "Example 0 is of type str"),
        ([{"input_ids": [1]}, {"input_ids": [1, 2], "attention_mask": [0, 0]}], "Example 1 has no tokens"),
        ([{"input_ids": []}], "Example 0 has no tokens"),
        ([{"input_ids": [1, 2], "attention_mask": [1]}], "differ in shape"),
    ],
)
def test_examples_that_do_not_serve_are_refused(examples: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        samples(examples)


def test_what_cannot_be_is_refused_in_a_sentence(loaded: Any, opt: str, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"use AutoGPTQForCausalLM\.from_pretrained to quantize"):
        AutoGPTQForCausalLM()
    for load in (
        lambda **options: AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig(), **options),
        AutoGPTQForCausalLM.from_quantized,
    ):
        with pytest.raises(ValueError, match="never run"):
            load(**({} if load is not AutoGPTQForCausalLM.from_quantized else {"model_name_or_path": opt}), trust_remote_code=True)
    model = AutoGPTQForCausalLM.from_pretrained(opt, BaseQuantizeConfig())
    with pytest.raises(ValueError, match="not quantized yet; call quantize first"):
        model.save_quantized(tmp_path / "out")
    with pytest.raises(ValueError, match="quantized already"):
        loaded.quantize([{"input_ids": [1, 2, 3]}])
    with pytest.raises(ValueError, match="neither read nor written"):
        loaded.save_quantized(tmp_path / "out", use_safetensors=False)
    with pytest.raises(ValueError, match="neither read nor written"):
        AutoGPTQForCausalLM.from_quantized(opt, use_safetensors=False)
    loaded.save_quantized(tmp_path / "out")
    with pytest.raises(ValueError, match="load it with from_quantized"):
        AutoGPTQForCausalLM.from_pretrained(str(tmp_path / "out"), BaseQuantizeConfig())
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "out" / "model.bin")
    with pytest.raises(FileNotFoundError, match="has no safetensors file, and pickled ones"):
        AutoGPTQForCausalLM.from_quantized(tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="model_basename='there'"):
        AutoGPTQForCausalLM.from_quantized(tmp_path / "out", model_basename="there")
