"""Engines: what each refuses, what is chosen for them, and what GPTQModel makes of our files where it is installed."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.cli import main
from gptq_fn_interop.engines import ENGINES, GROUP_SIZES, config_for, refusals
from gptq_fn_interop.inspection import Inspection, foresee, inspect
from gptq_fn_interop.params import read_params
from gptq_fn_interop.stream import load_gptq, save_gptq
from tiny import save_tiny_llama

from gptq_fn import QuantConfig, Quantized, QuantizedLinear, Report, Rule, dequantize, forward, spec_from_config

SIZES = {"vocab_size": 64, "tie_word_embeddings": False, "hidden_size": 128, "intermediate_size": 256} | {
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOKENS = np.arange(1, 13)[None]


def written(directory: Path, config: QuantConfig, **changes: Any) -> Path:
    """A llama with any codes, in groups that `config` would make, as we save it."""
    rng = np.random.default_rng(0)
    described = transformers.LlamaConfig(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(described)
    spec = spec_from_config(json.loads(described.to_json_string(use_diff=False)))
    params = read_params(spec, {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()})

    def leaf(name: str, value: dict[str, Any]) -> Any:
        if (found := config.resolve(name)) is None:
            return value
        out, inputs = value["weight"].shape
        size = found.group_size or inputs
        groups, middle = -(-inputs // size), 2 ** (found.bits - 1)
        zero = np.full((out, groups), middle) if found.sym else rng.integers(1, 2**found.bits, (out, groups))
        group_of, irregular = np.arange(inputs) // size, found.order == "act" and not found.static_groups
        return QuantizedLinear(
            jnp.asarray(rng.integers(0, 2**found.bits, (out, inputs)), jnp.uint8),
            jnp.asarray(rng.uniform(0.5, 1.5, (out, groups)) / middle / inputs**0.5, jnp.float16),
            jnp.asarray(zero, jnp.uint8),
            jnp.asarray(rng.permutation(group_of) if irregular else group_of, jnp.int32),
            found.bits,
        )

    for i, block in enumerate(spec.blocks):
        for linear in block.linears:
            params["blocks"][i][linear.role] = leaf(spec.name_of(i, linear), params["blocks"][i][linear.role])
    save_gptq(Quantized(params, spec, Report(config, ())), directory)
    return directory


def reasons(engine: str, found: Inspection) -> str:
    return "; ".join(map(str, refusals(engine, found)))


BASE = QuantConfig(4, 32)
CASES: dict[str, tuple[QuantConfig, dict[str, Any], dict[str, str]]] = {
    "widest": (BASE, {}, {}),
    "act": (replace(BASE, order="act"), {}, {"vllm": "refuses desc_act: true"}),
    "act static": (replace(BASE, order="act", static_groups=True), {}, {}),
    "rows": (replace(BASE, group_size=None, bits=8), {}, {"exllamav2": "it reads 4 bits, not 8"}),
    "asymmetric": (
        replace(BASE, sym=False),
        {},
        {"vllm": "not asymmetric ones of 4 .14 linears", "sglang": "not asymmetric ones of 4 .14 linears"},
    ),
    "three": (
        replace(BASE, bits=3),
        {},
        {
            "vllm": "not symmetric ones of 3 .14 linears, for example model.layers.0.mlp.down_proj",
            "sglang": "not symmetric ones of 3",
            "exllamav2": "4 bits, not 3",
            "llama.cpp": "does not read 3 bits",
        },
    ),
    "sixteen": (
        replace(BASE, group_size=16),
        {},
        {"vllm": "not groups of 16", "sglang": "not groups of 16", "exllamav2": "at least 32, not of 16"},
    ),
    "part of qkv skipped": (
        replace(BASE, rules=(Rule(r".*\.v_proj"),)),
        {},
        {
            "vllm": "it holds qkv_proj as one, and only some of it is quantized",
            "sglang": "it holds qkv_proj as one, and only some of it is quantized",
            "transformers+gptqmodel": "it ignores rules",
        },
    ),
    "part of qkv wider": (
        replace(BASE, rules=(Rule(r".*\.v_proj", replace(BASE, bits=8)),)),
        {},
        {
            "vllm": "it holds qkv_proj as one with 4 bits, and some of it has 8 .2 linears",
            "sglang": "it holds qkv_proj as one with 4 bits, and some of it has 8",
            "transformers+gptqmodel": "it ignores rules",
            "exllamav2": "it reads 4 bits, not 8 .2 linears",
            "llama.cpp": "converter ignores rules: it reads 4 bits, not 8 .2 linears",
        },
    ),
    "all of qkv wider": (
        replace(BASE, rules=(Rule(r".*\.(q|k|v|qkv)_proj", replace(BASE, bits=8)),)),
        {},
        {"transformers+gptqmodel": "it ignores rules", "exllamav2": "not 8 .6 linears", "llama.cpp": "not 8 .6 linears"},
    ),
    "down skipped": (replace(BASE, rules=(Rule(r".*down_proj"),)), {}, {"transformers+gptqmodel": "it ignores rules"}),
    "a rule for parts that wholes do not match": (
        replace(BASE, rules=(Rule(r".*\.(gate|up)_proj"),)),
        {},
        {"sglang": "no rule leaves out by the name under which it holds it", "transformers+gptqmodel": "it ignores rules"},
    ),
    "partial group": (
        QuantConfig(4, 128),
        {"intermediate_size": 192},
        {"vllm": "128 does not divide 192 .2 linears", "sglang": "128 does not divide 192"},
    ),
    "tiles": (
        BASE,
        {"intermediate_size": 288},
        {"sglang": "by 64, and one of them by 128, not 288 and 128"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_engine_says_what_it_refuses_before_and_after(case, tmp_path):
    config, changes, refused = CASES[case]
    after = inspect(written(tmp_path / "q", config, **changes))
    dense = transformers.LlamaConfig(**{**SIZES, **changes})
    transformers.LlamaForCausalLM(dense).save_pretrained(tmp_path / "dense")
    before = Checkpoint(tmp_path / "dense")
    planned = foresee(before, spec_from_config(before.config), config)
    assert [replace(x, zero_at_0=False) for x in sorted(after.linears, key=lambda x: x.name)] == sorted(
        planned.linears, key=lambda x: x.name
    )
    assert (after.described, set(after.left)) == (planned.described, set(planned.left))
    for engine in ENGINES:
        if engine in refused:
            assert re.search(refused[engine], reasons(engine, after)), (engine, reasons(engine, after))
        else:
            assert reasons(engine, after) == "", engine
        assert {(x.reason, frozenset(x.linears)) for x in refusals(engine, after)} == {
            (x.reason, frozenset(x.linears)) for x in refusals(engine, planned)
        }


def test_files_of_others_are_told_by_what_they_hold(tmp_path):
    directory = written(tmp_path / "q", BASE)
    config = json.loads((directory / "config.json").read_text())

    def changed(**changes: Any) -> Inspection:
        described = {key: value for key, value in {**config["quantization_config"], **changes}.items() if value is not None}
        (directory / "quantize_config.json").write_text(json.dumps(described))
        (directory / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
        return inspect(directory)

    assert "lacks sym" in reasons("vllm", changed(sym=None))
    mislabelled = changed(checkpoint_format="gptq_v2")
    assert "zero points are stored in the other way" in reasons("llama.cpp", mislabelled)
    assert "zero points are stored in the other way" in reasons("exllamav2", mislabelled)
    assert reasons("vllm", mislabelled) == ""  # it ignores the zero points of symmetric files
    assert "modules_in_block_to_quantize" in reasons("vllm", changed(modules_in_block_to_quantize=[["mlp.up_proj", "mlp.gate_proj"]]))
    changed()
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "quantization_config"}))
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")
    found = inspect(directory)
    assert "in config.json, where there is none" in reasons("vllm", found)
    assert "not for gptq_model-4bit-32g.safetensors" in reasons("transformers", found)
    assert reasons("gptqmodel", found) == ""


def test_the_first_group_size_that_loads_is_chosen(tmp_path):
    checkpoint = Checkpoint(save_tiny_llama(tmp_path / "in"))  # 64 and 96 inputs
    spec = spec_from_config(checkpoint.config)
    assert config_for("vllm", checkpoint, spec, lambda size: QuantConfig(group_size=size), GROUP_SIZES).group_size == 32
    assert config_for("llama.cpp", checkpoint, spec, lambda size: QuantConfig(group_size=size), GROUP_SIZES).group_size == 128
    with pytest.raises(ValueError, match=r"sglang would not .* not 96 and 64 \(2 linears, for example .*down_proj\)"):
        config_for("sglang", checkpoint, spec, lambda size: QuantConfig(group_size=size), GROUP_SIZES)


SMALL = ("--samples", "2", "--length", "16", "--grid", "minmax")


def test_the_command_chooses_refuses_and_tells(tmp_path, capsys):
    source, out = save_tiny_llama(tmp_path / "in", num_hidden_layers=1), tmp_path / "out"

    def fails(*args: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*args])
        assert stop.value.code == 1
        said = capsys.readouterr()
        return " ".join((said.out + said.err).split())

    quantize = ("quantize", str(source), str(out), *SMALL)
    assert "symmetric codes of 4 or 8 bits, not symmetric ones of 3" in fails(*quantize, "--for", "vllm", "--bits", "3")
    assert "64 does not divide 96" in fails(*quantize, "--for", "vllm", "--group-size", "64")
    assert "refuses desc_act: true" in fails(*quantize, "--for", "vllm", "--order", "act")
    assert "holds gate_up_proj as one, and only some" in fails(*quantize, "--for", "vllm", "--rule", ".*up_proj => skip")
    assert not out.exists()
    main([*quantize, "--for", "vllm"])
    said = " ".join(capsys.readouterr().out.split())
    assert "Groups of 32: vllm would not load groups of 128 here." in said
    assert f"vllm loads {out}" in said
    assert {x.group_size for x in inspect(out).linears} == {32}
    main(["inspect", str(out), "--for", "vllm"])
    assert "vllm loads" in capsys.readouterr().out
    assert "sglang does not load" in fails("inspect", str(out), "--for", "sglang")


def test_negative_scales_are_told_where_an_engine_may_misread_them(tmp_path, capsys):
    source = save_tiny_llama(tmp_path / "in", num_hidden_layers=1)
    for sign, grid in (("negative", "mse"), ("positive", "minmax")):  # a grid that only covers the range has no search to choose a sign
        main(["quantize", str(source), str(tmp_path / sign), *SMALL[:4], "--grid", grid, "--negative-scales", "True", "--for", "vllm"])
        told = " ".join(capsys.readouterr().out.split())
        assert ("7 linears have negative scales, which vLLM multiplies wrongly where VLLM_MARLIN_INPUT_DTYPE=int8" in told) == (
            sign == "negative"
        )
        assert {x.negative for x in inspect(tmp_path / sign).linears} == {sign == "negative"}
    main(["inspect", str(tmp_path / "negative")])
    assert "VLLM_MARLIN_INPUT_DTYPE" in capsys.readouterr().out.replace("\n", "")


PEER = {
    "4 bits": QuantConfig(4, 32),
    "4 bits, asymmetric": QuantConfig(4, 32, sym=False),
    "4 bits, act-order": QuantConfig(4, 32, order="act"),
    "4 bits, asymmetric, act-order": QuantConfig(4, 32, sym=False, order="act"),
    "3 bits": QuantConfig(3, 32),
    "8 bits, one group a row": QuantConfig(8, None),
    "2 bits and 8": QuantConfig(2, 32, rules=(Rule(r".*down_proj", QuantConfig(8, 64)), Rule(r".*\.0\..*o_proj"))),
}


@pytest.mark.parametrize("case", PEER)
def test_gptqmodel_loads_what_we_write(case, tmp_path):
    """Run it in an environment that has gptqmodel, too; it is slow to import, and brings its own torch."""
    gptqmodel = pytest.importorskip("gptqmodel", reason="gptqmodel is not installed; this compares with its loader")
    directory = written(tmp_path / "q", PEER[case])
    assert refusals("gptqmodel", inspect(directory)) == ()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="a").save_pretrained(directory)  # theirs wants one
    theirs = gptqmodel.GPTQModel.load(str(directory), device="cpu", backend=gptqmodel.BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    params, spec = load_gptq(directory)
    for i, block in enumerate(spec.blocks):
        for linear in block.linears:
            q, layer = params["blocks"][i][linear.role], theirs.get_submodule(spec.name_of(i, linear))
            mine = dequantize(q) if isinstance(q, QuantizedLinear) else q["weight"]
            weight = layer.weight if isinstance(layer, torch.nn.Linear) else layer.dequantize_weight().T
            np.testing.assert_allclose(weight.detach().float().numpy(), mine, rtol=2e-3, atol=1e-5)  # theirs is rounded to float16
    with torch.no_grad():
        logits = theirs(torch.from_numpy(TOKENS)).logits.float().numpy()
    expected = np.asarray(forward(spec, params, jnp.asarray(TOKENS, jnp.int32)))
    assert np.abs(logits - expected).max() < 0.02 * np.abs(expected).max()


def test_another_engine_is_told_which_there_are(tmp_path):
    with pytest.raises(ValueError, match="no engine 'vlm' here, but transformers,"):
        refusals("vlm", inspect(written(tmp_path / "q", QuantConfig(4, 16))))
