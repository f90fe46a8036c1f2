"""Models quantized in memory are what they would be if they had been quantized on disk and loaded."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gptq_fn_interop.in_memory import quantize_model
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.quantizer import register
from gptq_fn_interop.stream import quantize_checkpoint
from gptq_fn_interop.traced import TracedReport
from safetensors.torch import load_file

from gptq_fn import QuantConfig, Rule, interop

register()
CONFIG = QuantConfig(4, 16, grid="minmax", min_rows=4)
SAMPLES = [np.random.default_rng(n).integers(3, 97, length).astype(np.int32) for n, length in enumerate((16, 9, 16, 5, 30))]
SHAPE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
GATED: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
MODELS: dict[str, Any] = {
    "llama": (transformers.LlamaConfig(**GATED), CONFIG),
    "a tied head": (transformers.LlamaConfig(**GATED, tie_word_embeddings=True), CONFIG),
    "an untied head": (
        transformers.Qwen2Config(**GATED, tie_word_embeddings=True),
        QuantConfig(4, 16, sym=False, untie=True, rules=(Rule("lm_head", QuantConfig(8, 16)), Rule(".*down_proj"))),
    ),
    "gpt2": (transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64), CONFIG),
    "mixtral": (transformers.MixtralConfig(**GATED, **EXPERTS), CONFIG),
}


def dense(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for p in model.parameters():
        p.data += 0.02 * torch.randn_like(p)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor(SAMPLES[4][None], dtype=torch.long)).logits


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_that_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    config, how = MODELS[name]
    model = dense(config)
    model.save_pretrained(tmp_path / "dense")
    on_disk = quantize_checkpoint(tmp_path / "dense", tmp_path / "on_disk", SAMPLES, how)
    seen = []
    report = quantize_model(model, SAMPLES, how, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]
    assert [x.name for x in report.linears] == [x.name for x in on_disk.linears]
    assert not isinstance(report, TracedReport)
    assert any(isinstance(m, QuantLinear) for m in model.modules())
    model.save_pretrained(tmp_path / "saved")
    expected, found = (load_file(tmp_path / d / "model.safetensors") for d in ("on_disk", "saved"))
    assert expected.keys() == found.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, found[key]), key
    described = [json.loads((tmp_path / d / "config.json").read_text()) for d in ("on_disk", "saved")]
    assert described[0]["quantization_config"] == described[1]["quantization_config"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(logits(model), logits(loaded), rtol=0, atol=0)


def test_the_float_type_of_a_model_stays(tmp_path: Path) -> None:
    model = dense(transformers.LlamaConfig(**GATED), torch.bfloat16)
    quantize_model(model, SAMPLES, CONFIG)
    assert model.dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16


def test_what_no_row_describes_is_traced(tmp_path: Path) -> None:
    model = dense(transformers.LlamaConfig(**GATED))
    model.model.layers[0].extra = torch.nn.Linear(32, 32)  # which no row of the table knows
    report = quantize_model(model, SAMPLES, CONFIG)
    assert isinstance(report, TracedReport)
    assert [name for name, _ in report.left] == ["model.layers.0.extra"]
    assert all(x.rows == sum(map(len, SAMPLES)) for x in report.linears)
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantLinear)


@pytest.mark.parametrize(
    ("samples", "message"),
    [([np.array([1, 97])], "reach from 1 to 97 but the model knows 97"), ([], "no calibration samples"), ([[0.5]], "whole numbers")],
)
def test_tokens_that_are_none_are_refused(samples: Any, message: str) -> None:
    model = dense(transformers.LlamaConfig(**GATED))
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        quantize_model(model, samples, CONFIG)
    assert torch.equal(before, logits(model))


def test_what_is_no_model_is_told_where_to_go() -> None:
    with pytest.raises(TypeError, match="takes a torch model, not a str; quantize_checkpoint takes directories"):
        quantize_model("path/to/model", SAMPLES)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="takes a transformers model, not a str; load_gptq reads directories"):
        interop.from_hf("path/to/model")  # pyright: ignore[reportArgumentType]
