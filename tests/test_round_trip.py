"""Every model type: quantized on disk, loaded by transformers and by this library with equal logits, generating equal texts.

`make table` runs this file and writes what passed into docs/architectures.md.
"""

import json
from collections.abc import Callable
from pathlib import Path

import gptq_fn_interop.quantizer
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from architectures import BEGIN, END, PAGE
from family_cases import CASES
from gptq_fn_interop.stream import load_gptq, quantize_checkpoint
from test_families import built as built  # the fixture
from test_families import published

from gptq_fn import FAMILIES, QuantConfig, QuantizedLinear, forward, generate

gptq_fn_interop.quantizer.register()
CONFIG = QuantConfig(4, 16, grid="minmax", order="natural", min_rows=4)
VARIANTS = ("falcon-40b", "falcon-rw", "opt-350m")
FIRST = {kind: case for case, (kind, _) in reversed(CASES.items())}
CALIB = np.random.default_rng(3).integers(2, 97, (8, 16)).astype(np.int32)
PROMPT = np.random.default_rng(4).integers(2, 97, (2, 9)).astype(np.int32)
KEEP = np.arange(9) >= np.array([[0], [3]])
"""The second prompt has three tokens of padding before it."""


@pytest.mark.parametrize("case", [*FIRST.values(), *(case for case in VARIANTS if case in CASES)])
def test_round_trip(case: str, built: Callable, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    kind, _ = CASES[case]
    record_property("kind", kind)
    original = built(case)
    report = quantize_checkpoint(original.checkpoint.directory, tmp_path / "quantized", CALIB, CONFIG)
    params, spec = load_gptq(tmp_path / "quantized")
    quantized = [leaf for p in params["blocks"] for role, leaf in p.items() if isinstance(leaf, QuantizedLinear)]
    stacked = sum(len(leaf.codes) if leaf.codes.ndim == 3 else 1 for leaf in quantized)
    usual = [linear for block in spec.blocks for linear in block.linears if linear.quantize]
    assert stacked == len(report.linears)
    assert len(quantized) == len(usual)
    record_property("quantize", True)

    model = loaded(tmp_path / "quantized", case, original.model.config)
    assert sum(isinstance(m, gptq_fn_interop.quantizer.QuantLinear) for m in model.modules()) == len(report.linears)
    prompt = torch.tensor(PROMPT, dtype=torch.long)
    with torch.no_grad():
        theirs = model(prompt).logits.numpy()
    logits = np.asarray(forward(spec, params, jnp.asarray(PROMPT)))
    assert np.abs(theirs - logits).max() < 1e-4 * np.abs(logits).max()
    if published(kind).kind == kind:
        record_property("transformers", True)

    options = model.generation_config
    told = {"attention_mask": torch.tensor(KEEP).long(), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    found = model.generate(prompt, **told, return_dict_in_generate=True, output_logits=True)
    end = () if options.eos_token_id is None else options.eos_token_id
    tokens = np.asarray(generate(spec, params, jnp.asarray(PROMPT), 6, keep=jnp.asarray(KEEP), end=end, pad=1))
    assert_same_up_to_ties(tokens[:, 9:], found.sequences.numpy()[:, 9:], torch.stack(found.logits, 1).numpy())
    record_property("generate", True)


def loaded(directory: Path, case: str, config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """The quantized model in transformers; one of a type that is not there, as the type that holds the same tensors."""
    kind, options = CASES[case]
    if published(kind).kind != kind:
        described = json.loads((directory / "config.json").read_text())["quantization_config"]
        (directory / "config.json").write_text(json.dumps({**config.to_dict(), "quantization_config": described}))
    attention = options.get("attn_implementation", "eager")
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention).eval()


def assert_same_up_to_ties(ours: np.ndarray, theirs: np.ndarray, logits: np.ndarray) -> None:
    """Rows of tokens are equal until two of `logits` [batch, time, vocab], those of `theirs`, are too close to tell."""
    assert theirs.shape[1] == logits.shape[1]
    np.testing.assert_array_equal(ours[:, theirs.shape[1] :], 1)
    second, first = np.moveaxis(np.sort(logits)[..., -2:], -1, 0)
    clear = np.logical_and.accumulate(first - second > 1e-4 * np.abs(logits).max(), axis=1)
    assert clear.mean() > 0.5
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]][clear], theirs[clear])


def test_every_model_type_makes_the_round_trip_and_stands_in_the_table() -> None:
    assert FIRST.keys() == FAMILIES.keys()
    text = PAGE.read_text()
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    assert {row.split("|")[1].strip() for row in rows} == FAMILIES.keys()
