"""Heads: left alone unless a rule names them, quantized by what enters them, and given a life of their own where they are tied."""

import json
from dataclasses import replace
from pathlib import Path

import gptq_fn_interop.quantizer
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.params import read_params
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.stream import load_gptq, quantize_checkpoint
from tiny import save_tiny_llama

from gptq_fn import (
    QuantConfig,
    QuantizedLinear,
    Rule,
    add_rows,
    block,
    embed_batches,
    empty,
    factor,
    forward,
    quantize,
    quantize_head,
    solve,
    spec_from_config,
)
from gptq_fn.model.decoder import head_input

gptq_fn_interop.quantizer.register()
HEAD = QuantConfig(8, 32, grid="minmax", order="natural")
ONLY_HEAD = QuantConfig(4, 32, rules=(Rule("lm_head", HEAD), Rule("model")))
CALIB = np.random.default_rng(0).integers(0, 256, (8, 16)).astype(np.int32)


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "float", tie_word_embeddings=request.param)


def test_a_head_is_quantized_by_what_enters_it(source):
    checkpoint = Checkpoint(source)
    spec = spec_from_config(checkpoint.config)
    params = read_params(spec, checkpoint)
    result = quantize(params, spec, jnp.asarray(CALIB), QuantConfig(4, 32, untie=True, rules=(Rule("lm_head", HEAD),)))
    weight = params["top"]["embed" if spec.tied else "head"]["weight"]
    assert not result.spec.tied
    assert result.report.linears[-1].name == "lm_head"
    assert result.params["top"]["embed"] is params["top"]["embed"]
    float_blocks = {"top": params["top"], "blocks": result.params["blocks"]}
    entering = head_input(spec, params["top"], last_hidden(spec, float_blocks))
    expected, _ = solve(weight, factor(add_rows(empty(64), entering), HEAD), HEAD)
    found = result.params["top"]["head"]
    assert isinstance(found, QuantizedLinear)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-3)
    assert (np.asarray(found.codes) != np.asarray(expected.codes)).mean() < 0.01


def test_a_head_without_a_float_stream_has_the_plain_target(source):
    """Where one stream waits, an alpha that was to be chosen is 0, and one that was given is refused."""
    checkpoint = Checkpoint(source)
    spec = spec_from_config(checkpoint.config)
    top = read_params(spec, checkpoint)["top"]
    batches = embed_batches(spec, top, CALIB)
    assert all(batch.exact is None for batch in batches)

    def with_alpha(alpha):
        config = QuantConfig(4, 32, untie=True, rules=(Rule("lm_head", replace(HEAD, alpha=alpha)),))
        return quantize_head(spec, top, batches, config)

    (_, found, (report,)), (_, plain, _) = with_alpha(None), with_alpha(0.0)
    assert (report.alpha, report.restored, report.restored_held_out) == (0, 0, None)
    assert isinstance(found["head"], QuantizedLinear)
    np.testing.assert_array_equal(found["head"].codes, plain["head"].codes)
    np.testing.assert_array_equal(found["head"].scale, plain["head"].scale)
    with pytest.raises(ValueError, match=r"alpha is 0[.]5, .* one stream"):
        with_alpha(0.5)


def last_hidden(spec, params):
    ((x, *_),) = embed_batches(spec, params["top"], CALIB)
    for of_block, p in zip(spec.blocks, params["blocks"], strict=True):
        x = block(of_block, p, x)[0]
    return x


def test_a_quantized_head_is_stored_flagged_and_loaded(source, tmp_path):
    config = QuantConfig(4, 32, untie=True, rules=(Rule("lm_head", HEAD), Rule("model")))
    report = quantize_checkpoint(source, tmp_path / "q", CALIB, config)
    assert [r.name for r in report.linears] == ["lm_head"]
    written = json.loads((tmp_path / "q" / "config.json").read_text())
    assert written["quantization_config"]["lm_head"] is True
    assert written["tie_word_embeddings"] is False
    names = Checkpoint(tmp_path / "q").keys()
    assert "lm_head.qweight" in names
    assert "lm_head.weight" not in names
    params, spec = load_gptq(tmp_path / "q")
    ours = np.asarray(forward(spec, params, jnp.asarray(CALIB)))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=torch.float32)
    assert isinstance(model.lm_head, QuantLinear)
    assert type(model.model.embed_tokens) is torch.nn.Embedding
    with torch.no_grad():
        theirs = model(torch.from_numpy(CALIB).long()).logits.numpy()
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())


def test_heads_stay_as_they_are_unless_a_rule_names_them(source, tmp_path):
    quantize_checkpoint(source, tmp_path / "q", CALIB, QuantConfig(4, 32))
    before, after = Checkpoint(source), Checkpoint(tmp_path / "q")
    assert ("lm_head.weight" in after) == ("lm_head.weight" in before)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]["lm_head"] is False
    np.testing.assert_array_equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_a_tied_head_is_quantized_on_request_only(tmp_path):
    source = save_tiny_llama(tmp_path / "float", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"A rule quantizes lm_head, but this model's head is its embedding\. Pass untie=True"):
        quantize_checkpoint(source, tmp_path / "q", CALIB, ONLY_HEAD)
    assert not (tmp_path / "q").exists()
