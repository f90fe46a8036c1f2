"""Checkpoints on disk: what comes out is what was put in, whole or not at all."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from gptq_fn_interop.checkpoint import INDEX, SINGLE, Checkpoint
from gptq_fn_interop.gptq_format import quantization_config
from gptq_fn_interop.params import read_params, write_params
from gptq_fn_interop.staging import staged
from gptq_fn_interop.stream import load_gptq, quantize_checkpoint, save_gptq
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny import save_tiny_llama

from gptq_fn import QuantConfig, Quantized, QuantizedLinear, Report, Rule, dequantize, quantize, spec_from_config

RULES = (Rule(r".*\.1\.mlp\.down_proj"), Rule(r".*o_proj", QuantConfig(8, None, order="act", grid="minmax")), Rule(r".*gate"))
CONFIG = QuantConfig(4, 32, sym=False, grid="minmax", order="group", rules=RULES)
TOKENS = np.random.default_rng(0).integers(0, 300, (6, 24)).astype(np.int32)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("float") / "tiny")


@pytest.fixture(scope="module")
def quantized(source: Path) -> Path:
    quantize_checkpoint(source, source.parent / "quantized", TOKENS, CONFIG)
    return source.parent / "quantized"


def tensors(directory: Path) -> dict[str, np.ndarray]:
    return {name: array for file in sorted(directory.glob("*.safetensors")) for name, array in load_file(file).items()}


def assert_same_tensors(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], name)


def assert_same_leaves(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for mine, other in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert mine.dtype == other.dtype
        np.testing.assert_array_equal(mine, other)


def test_streaming_gives_what_quantizing_in_memory_gives(source, quantized):
    checkpoint = Checkpoint(source)
    spec = spec_from_config(checkpoint.config)
    expected = quantize(read_params(spec, checkpoint), spec, jnp.asarray(TOKENS), CONFIG)
    params, found = load_gptq(quantized)
    assert found == spec
    assert_same_leaves(params, expected.params)
    assert [r["name"] for r in json.loads((quantized / "report.json").read_text())["linears"]] == [r.name for r in expected.report.linears]


def test_what_is_not_quantized_is_copied(source, quantized):
    before, after = tensors(source), tensors(quantized)
    skipped = {f"model.layers.{i}.mlp.gate_proj.weight" for i in range(2)} | {"model.layers.1.mlp.down_proj.weight"}
    kept = {name for name in before if "proj" not in name} | skipped
    assert_same_tensors({name: before[name] for name in kept}, {name: a for name, a in after.items() if name.endswith(".weight")})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (quantized / name).read_bytes() == (source / name).read_bytes()


def test_both_configs_describe_the_quantization_in_the_order_of_its_rules(source, quantized):
    described = json.loads((quantized / "quantize_config.json").read_text())
    config = json.loads((quantized / "config.json").read_text())
    assert list(described.items()) == list(quantization_config(Report(CONFIG, ())).items())
    assert list(config["quantization_config"]["dynamic"]) == ["-:" + RULES[0].pattern, "+:" + RULES[1].pattern, "-:" + RULES[2].pattern]
    assert config.pop("quantization_config") == described
    assert config == json.loads((source / "config.json").read_text())


def test_nothing_but_the_checkpoint_is_written(source, quantized):
    names = {path.name for path in quantized.iterdir()}
    copied = {"generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert names == copied | {"config.json", "quantize_config.json", "report.json", SINGLE}
    assert [path.name for path in source.parent.iterdir() if "unfinished" in path.name] == []


def test_shards_hold_the_same_tensors(source, quantized, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "in", max_shard_size="40KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    limit = 50_000
    quantize_checkpoint(tmp_path / "in", tmp_path / "out", TOKENS, CONFIG, shard_bytes=limit)
    assert_same_tensors(tensors(tmp_path / "out"), tensors(quantized))
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors(tmp_path / "out").values())
    for name in files:
        held = load_file(tmp_path / "out" / name)
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == held.keys()
        assert len(held) == 1 or sum(a.nbytes for a in held.values()) <= limit
        with safe_open(tmp_path / "out" / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}
    assert_same_leaves(load_gptq(tmp_path / "out")[0], load_gptq(quantized)[0])


def test_bfloat16_stays_bfloat16(source, tmp_path):
    transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    only = QuantConfig(4, 32, grid="minmax", rules=(Rule(r".*layers\.0\.self_attn\.o"), Rule(r".*layers\.[01]\.(self_attn|mlp)\.[^o]")))
    report = quantize_checkpoint(tmp_path / "in", tmp_path / "out", TOKENS, only)
    assert [r.name for r in report.linears] == ["model.layers.1.self_attn.o_proj"]
    before, after = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "out")
    for name in before.keys() & after.keys():
        assert before[name].dtype == after[name].dtype == jnp.bfloat16
        assert before[name].tobytes() == after[name].tobytes()
    assert after["model.layers.1.self_attn.o_proj.scales"].dtype == np.float16


KINDS = {
    "llama": {"attention_bias": True, "num_key_value_heads": 2, "intermediate_size": 96},
    "gpt2": {},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {"intermediate_size": 96},
}


def anything(kind: str, config: QuantConfig) -> Quantized:
    """A model with any codes where `config` says that there are some."""
    rng = np.random.default_rng(0)
    sizes = {"vocab_size": 61, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    described = transformers.AutoConfig.for_model(kind, **sizes, **KINDS[kind])
    model = transformers.AutoModelForCausalLM.from_config(described)
    spec = spec_from_config(json.loads(described.to_json_string(use_diff=False)))
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    state["embed_out.weight"] = state["lm_head.weight"]  # the name that gpt_neox has on disk
    params = read_params(spec, state)

    def leaf(i: int, role: str, value: Any) -> Any:
        found = config.resolve(next((spec.name_of(i, x) for x in spec.blocks[i].linears if x.role == role), ""))
        if found is None or value["weight"].ndim == 1:
            return value
        out, inputs = value["weight"].shape
        groups = -(-inputs // (found.group_size or inputs))
        zero = rng.integers(0, 2**found.bits, (out, groups))
        return QuantizedLinear(
            jnp.asarray(rng.integers(0, 2**found.bits, (out, inputs)), jnp.uint8),
            jnp.asarray(rng.uniform(0.001, 1, (out, groups)), jnp.float16),
            jnp.asarray(np.full_like(zero, 2 ** (found.bits - 1)) if found.sym else zero, jnp.uint8),
            jnp.asarray(np.arange(inputs) // (found.group_size or inputs), jnp.int32),
            found.bits,
            value.get("bias"),
        )

    blocks = [{role: leaf(i, role, value) for role, value in p.items()} for i, p in enumerate(params["blocks"])]
    return Quantized({"top": params["top"], "blocks": blocks}, spec, Report(config, ()))


PARTLY = (Rule(r".*\.1\."), Rule(r".*(down_proj|fc2|mlp\.c_proj|4h_to_h)", QuantConfig(8, None)))
SAVED = [QuantConfig(bits, 32, sym=sym, rules=rules) for bits in (2, 3, 4, 8) for sym, rules in ((True, ()), (False, PARTLY))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", SAVED, ids=lambda c: f"{c.bits}-{c.sym}")
def test_loading_undoes_saving(kind, config, tmp_path):
    quantized = anything(kind, config)
    save_gptq(quantized, tmp_path / "out")
    params, spec = load_gptq(tmp_path / "out")
    assert spec == quantized.spec
    assert_same_leaves(params, quantized.params)
    stored = tensors(tmp_path / "out")
    assert ("gptq" if config.sym else "gptq_v2") == json.loads((tmp_path / "out/quantize_config.json").read_text())["checkpoint_format"]
    for i, (block, p) in enumerate(zip(spec.blocks, params["blocks"], strict=True)):
        for linear in block.linears:
            name = spec.name_of(i, linear)
            if isinstance(p[linear.role], QuantizedLinear):  # packed the same way, however the float weight was stored
                assert stored[f"{name}.scales"].shape[1] == dequantize(p[linear.role]).shape[0]
                assert f"{name}.weight" not in stored
            else:
                weight = np.asarray(p[linear.role]["weight"])
                np.testing.assert_array_equal(stored[f"{name}.weight"], weight.T if linear.stored == "in_out" else weight)


def test_saving_takes_a_config_for_a_spec_that_came_from_none(tmp_path):
    quantized = anything("gpt2", SAVED[0])
    by_hand = quantized._replace(spec=type(quantized.spec)(**{**vars(quantized.spec), "origin": None}))
    with pytest.raises(ValueError, match=r"pass one as config=\."):
        save_gptq(by_hand, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    save_gptq(by_hand, tmp_path / "out", config={"model_type": "mine"})
    params, _ = load_gptq(tmp_path / "out", spec=by_hand.spec)
    assert_same_leaves(params, quantized.params)


def test_a_checkpoint_without_g_idx_is_read(tmp_path):
    quantized = anything("llama", SAVED[0])
    save_gptq(quantized, tmp_path)
    save_file({name: a for name, a in tensors(tmp_path).items() if not name.endswith(".g_idx")}, tmp_path / SINGLE, {"format": "pt"})
    assert_same_leaves(load_gptq(tmp_path)[0], quantized.params)


def test_a_checkpoint_that_is_not_what_its_config_says_is_refused(tmp_path):
    save_gptq(anything("llama", SAVED[0]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match=r"is not what its config says: model\.layers\.1\..* is not read"):
        load_gptq(tmp_path)


def test_a_destination_is_never_overwritten(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG)
    with pytest.raises(FileExistsError, match="exists already and is not empty"):
        save_gptq(anything("gpt2", SAVED[0]), tmp_path / "out")
    (tmp_path / "file").write_text("keep")
    with pytest.raises(FileExistsError), staged(tmp_path / "file"):
        pytest.fail("nothing may be done before the destination is known to be free")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "mine.txt", "out"]
    (tmp_path / "empty").mkdir()
    save_gptq(anything("gpt2", SAVED[0]), tmp_path / "empty")
    assert (tmp_path / "empty" / SINGLE).exists()


def test_what_tokenizers_read_is_copied(source, tmp_path):
    from_source, to, files = tmp_path / "in", tmp_path / "out", ("spm.model", "qwen.tiktoken", "tekken.json", "LICENSE.txt")
    copy(source, from_source)
    (from_source / "additional_chat_templates").mkdir()
    for name in (*files, "additional_chat_templates/tool_use.jinja", "notes.txt"):
        (from_source / name).write_text(name)
    quantize_checkpoint(from_source, to, TOKENS, CONFIG)
    for name in (*files, "additional_chat_templates/tool_use.jinja"):
        assert (to / name).read_text() == name
    assert not (to / "notes.txt").exists()


def test_a_destination_whose_place_cannot_be_taken_is_refused_before_any_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match=r"\. is the current directory, .* name one inside it"), staged("."):
        pytest.fail("the directory under a shell would vanish")
    (tmp_path / "volume").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(FileExistsError, match="is where a file system is mounted"), staged(tmp_path / "volume"):
        pytest.fail("renaming onto a mounted volume fails when all the work is done")
    assert [path.name for path in tmp_path.rglob("*")] == ["volume"]


def test_a_link_to_where_a_destination_shall_lie_is_followed(tmp_path):
    (tmp_path / "large" / "empty").mkdir(parents=True)
    for name in ("empty", "new"):
        (tmp_path / name).symlink_to(tmp_path / "large" / name)
        save_gptq(anything("gpt2", SAVED[0]), tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "large" / name / SINGLE).is_file()
    assert sorted(path.name for path in tmp_path.rglob(".*")) == []


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (np.full((2, 8), 10_000, np.int32), r"reach from 10000 to 10000 but the model knows \d+: another tokenizer made them"),
        (np.full((2, 8), -1, np.int32), "reach from -1 to -1"),
        (np.zeros((2, 8), np.float32), r"whole numbers \[samples, time\].*got .*float32"),
        (np.zeros(8, np.int32), r"whole numbers \[samples, time\].*got"),
        (np.zeros((0, 8), np.int32), "no calibration samples"),
        (np.zeros((8, 0), np.int32), r"whole numbers \[samples, time\].*got"),
    ],
)
def test_wrong_tokens_are_refused_before_any_work(source, tmp_path, tokens, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize_checkpoint(source, tmp_path / "out", tokens, CONFIG)
    assert list(tmp_path.iterdir()) == []


def test_what_the_format_cannot_hold_is_refused_before_any_work(tmp_path):
    save_tiny_llama(tmp_path / "in", intermediate_size=80)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate_proj: 3-bit codes are stored in chunks of 32.*and 1 more"):
        quantize_checkpoint(tmp_path / "in", tmp_path / "out", TOKENS, QuantConfig(3, 32))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def copy(source: Path, destination: Path) -> Path:
    destination.mkdir()
    for name in ("config.json", SINGLE):
        (destination / name).write_bytes((source / name).read_bytes())
    return destination


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def truncate(directory: Path) -> None:
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:-100])


def scramble(directory: Path) -> None:
    (directory / SINGLE).write_bytes(b"not a header at all")


def pickle_only(directory: Path) -> None:
    (directory / SINGLE).rename(directory / "pytorch_model.bin")


def index(*names: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / INDEX).write_text(json.dumps({"weight_map": {f"t{i}": name for i, name in enumerate(names)}}))

    return write


DAMAGE: list[tuple[Callable[[Path], Any], type[Exception], str]] = [
    (truncate, ValueError, r"model\.safetensors is not a readable safetensors file"),
    (scramble, ValueError, r"model\.safetensors is not a readable safetensors file"),
    (pickle_only, FileNotFoundError, "has no safetensors files.*pickled files are never read"),
    (index(SINGLE, "gone.safetensors"), FileNotFoundError, r"gone\.safetensors is named by .* but is not there"),
    (index("../other/model.safetensors"), ValueError, "is no file of its directory"),
    (index("/etc/passwd"), ValueError, "is no file of its directory"),
    (index(".."), ValueError, "is no file of its directory"),
    (index(""), ValueError, "is no file of its directory"),
    (index("config.json"), ValueError, "is no file of its directory"),
    (index(), ValueError, "has no weight_map"),
    (lambda d: (d / INDEX).write_text("{}"), ValueError, "has no weight_map"),
    (lambda d: (d / "config.json").unlink(), FileNotFoundError, r"There is no config\.json in"),
    (lambda d: (d / "config.json").write_text("{"), ValueError, r"config\.json is not valid JSON"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe\x00"), ValueError, r"config\.json is not valid JSON"),
    (lambda d: (d / "config.json").write_text("[]"), ValueError, r"config\.json holds a list, not an object"),
    (lambda d: edit(d / "config.json", lambda c: c.update(quantization_config={})), ValueError, "is quantized already"),
    (lambda d: (d / "quantize_config.json").write_text("{}"), ValueError, "is quantized already"),
    (lambda d: edit(d / "config.json", lambda c: c.update(model_type="mamba")), ValueError, "'mamba' is not in the table"),
    (
        lambda d: edit(d / "config.json", lambda c: c.update(num_hidden_layers=3)),
        ValueError,
        r"model\.layers\.2\.\S+\.weight is missing.*more\)",
    ),
]


@pytest.mark.parametrize(("damage", "kind", "sentence"), DAMAGE)
def test_a_damaged_source_is_refused_in_a_sentence(source, tmp_path, damage, kind, sentence):
    damaged = copy(source, tmp_path / "in")
    damage(damaged)
    with pytest.raises(kind, match=sentence):
        quantize_checkpoint(damaged, tmp_path / "out", TOKENS, CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no directory .*nowhere\."):
        Checkpoint(tmp_path / "nowhere")


def test_tensors_are_read_when_they_are_asked_for(source):
    checkpoint = Checkpoint(source)
    stored = tensors(source)
    assert dict(checkpoint.shapes) == {name: a.shape for name, a in stored.items()}
    assert len(checkpoint) == len(stored)
    for name in checkpoint:
        first = checkpoint[name]
        np.testing.assert_array_equal(first, stored[name])
        first[...] = 0  # the caller's memory: the file and later reads stay as they are
        np.testing.assert_array_equal(checkpoint[name], stored[name])


def test_writing_undoes_reading(source):
    checkpoint = Checkpoint(source)
    spec = spec_from_config(checkpoint.config)
    written: Iterator[tuple[str, np.ndarray]] = write_params(spec, read_params(spec, checkpoint), "v1")
    assert_same_tensors(dict(written), tensors(source))
