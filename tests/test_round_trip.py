"""Every model type: quantized on disk, loaded by transformers and by this library with equal logits, and generating.

`make table` runs this file and writes what passed into README.
"""

from collections.abc import Callable
from pathlib import Path

import gptq_fn_interop.quantizer
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from architectures import BEGIN, END, README
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

    tokens = generate(spec, params, jnp.asarray(PROMPT), 6)
    logits = np.asarray(forward(spec, params, tokens))
    np.testing.assert_array_equal(tokens[:, 9:], logits.argmax(-1)[:, 8:-1])
    record_property("generate", True)

    if published(kind).kind != kind:
        return  # transformers has no such model type
    attention = CASES[case][1].get("attn_implementation", "eager")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "quantized", dtype=torch.float32, attn_implementation=attention
    ).eval()
    assert sum(isinstance(m, gptq_fn_interop.quantizer.QuantLinear) for m in model.modules()) == len(report.linears)
    with torch.no_grad():
        theirs = model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.numpy()
    assert np.abs(theirs - logits).max() < 1e-4 * np.abs(logits).max()
    record_property("transformers", True)


def test_every_model_type_makes_the_round_trip_and_stands_in_readme() -> None:
    assert FIRST.keys() == FAMILIES.keys()
    text = README.read_text()
    rows = text[text.index(BEGIN) : text.index(END)].splitlines()[3:]
    assert {row.split("|")[1].strip() for row in rows} == FAMILIES.keys()
