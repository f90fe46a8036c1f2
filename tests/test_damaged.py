"""Damaged checkpoints: a sentence or the right logits, and nothing else."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from gptq_fn_interop.checkpoint import INDEX, SINGLE, Checkpoint
from gptq_fn_interop.stream import load_gptq
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from test_engines import TOKENS, written

from gptq_fn import QuantConfig, forward


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One block, asymmetric, in two shards."""
    directory = tmp_path_factory.mktemp("whole") / "q"
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    tensors = load_file(written(directory, QuantConfig(4, 32, sym=False), **sizes) / SINGLE)
    (directory / SINGLE).unlink()
    weight_map = {}
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, directory / f"model-{i}.safetensors", {"format": "pt"})
        weight_map |= dict.fromkeys(names, f"model-{i}.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


@pytest.fixture(scope="module")
def expected(whole: Path) -> np.ndarray:
    return logits(whole)


def logits(directory: Path) -> np.ndarray:
    params, spec = load_gptq(directory)
    return np.asarray(forward(spec, params, jnp.asarray(TOKENS, jnp.int32)))


def refusal(directory: Path) -> str:
    with pytest.raises((ValueError, OSError)) as caught:
        logits(directory)
    said = str(caught.value)
    assert "\n" not in said
    assert said.endswith(".") or isinstance(caught.value, OSError)
    return said


def right_or_a_sentence(directory: Path, expected: np.ndarray) -> None:
    said, found = None, None
    try:
        found = logits(directory)
    except (ValueError, OSError) as error:
        said = str(error)
    if said is None:
        np.testing.assert_array_equal(found, expected)
    assert said is None or (said and "\n" not in said)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def of_config(**changes: Any) -> Callable[[Path], None]:
    return lambda d: edit(d / "config.json", lambda c: c.update(changes))


def of_quantization(**changes: Any) -> Callable[[Path], None]:
    """In both files, so that they agree."""

    def change(d: Path) -> None:
        edit(d / "config.json", lambda c: c["quantization_config"].update(changes))
        edit(d / "quantize_config.json", lambda c: c.update(changes))

    return change


Q = "model.layers.0.self_attn.q_proj"
"""A linear of 64 inputs in 2 groups, 64 outputs."""


def of_tensor(leaf: str, change: Callable[[np.ndarray], np.ndarray | None], name: str = Q) -> Callable[[Path], None]:
    def apply(d: Path) -> None:
        file = d / json.loads((d / INDEX).read_text())["weight_map"][f"{name}.{leaf}"]
        tensors = load_file(file)
        if (value := change(tensors.pop(f"{name}.{leaf}"))) is not None:
            tensors[f"{name}.{leaf}"] = value
        else:
            edit(d / INDEX, lambda index: index["weight_map"].pop(f"{name}.{leaf}"))
        save_file(tensors, file, {"format": "pt"})

    return apply


def of_file(change: Callable[[bytes], bytes], name: str = "model-0.safetensors") -> Callable[[Path], None]:
    return lambda d: (d / name).write_bytes(change((d / name).read_bytes())) and None


def of_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    return lambda d: edit(d / INDEX, lambda index: change(index["weight_map"]))


def put(index: Any, value: Any) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[index] = value
        return array

    return change


CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (of_file(lambda b: b[:-1]), "is not a readable safetensors file.*not copied completely"),
    "empty": (of_file(lambda b: b""), "is not a readable safetensors file"),
    "huge header": (of_file(lambda b: b"\xff" * 8 + b[8:]), "is not a readable safetensors file"),
    "no json": (of_file(lambda b: b[:8] + b"!" + b[9:]), "is not a readable safetensors file"),
    "a directory for a file": (lambda d: ((d / "model-0.safetensors").unlink(), (d / "model-0.safetensors").mkdir()), "is not a readable"),
    "index leads out": (of_index(lambda m: m.update({f"{Q}.scales": "../model-0.safetensors"})), "is no file of its directory"),
    "index leads to root": (of_index(lambda m: m.update({f"{Q}.scales": "/model-0.safetensors"})), "is no file of its directory"),
    "index names a number": (of_index(lambda m: m.update({f"{Q}.scales": 7})), "points to 7, which is no file"),
    "index names what is not there": (
        of_index(lambda m: m.update({f"{Q}.scales": "m.safetensors"})),
        "is not there",
    ),
    "index names the other file": (
        of_index(lambda m: m.update({k: f"model-{'10'[int(v[6])]}.safetensors" for k, v in m.items() if Q in k})),
        "says that .* is in model-.*, but it is not",
    ),
    "index names what no file has": (of_index(lambda m: m.update(x="model-0.safetensors")), "says that x is in model-0.safetensors, but"),
    "nested json": (lambda d: (d / "config.json").write_text("[" * 100_000), "config.json is not valid JSON"),
    "number of thousands of digits": (
        lambda d: (d / "config.json").write_text('{"a": ' + "1" * 5000 + "}"),
        "config.json is not valid JSON",
    ),
    "list for an object": (of_config(quantization_config=[]), "is a list, not an object"),
    "another method": (of_quantization(quant_method="awq"), "quantized with 'awq'"),
    "another format": (of_quantization(checkpoint_format="marlin"), "format 'marlin', which is packed for a particular kernel"),
    "five bits": (of_quantization(bits=5), "bits = 5; codes of 2, 3, 4, 8 bits"),
    "bits in words": (of_quantization(bits="four"), "bits = 'four'"),
    "group size 0": (of_quantization(group_size=0), "group_size = 0"),
    "sym in words": (of_quantization(sym="no"), "sym = 'no'"),
    "rules in a list": (of_quantization(dynamic=[1]), "are not an object of objects"),
    "no regular expression": (of_quantization(dynamic={"+:(": {}}), "is not a regular expression"),
    "bits of a rule": (of_quantization(dynamic={"x": {"bits": 7}}), "bits = 7 of the rule 'x'"),
    "configs disagree": (lambda d: edit(d / "quantize_config.json", lambda c: c.update(bits=8)), "disagree on bits; remove"),
    "formats disagree": (
        lambda d: edit(d / "quantize_config.json", lambda c: c.update(checkpoint_format="gptq")),
        "disagree on ch",
    ),
    "another hidden size": (of_config(hidden_size=128, head_dim=32), "is not what its config says: .*64"),
    "more layers": (of_config(num_hidden_layers=2), r"model\.layers\.1\..* is missing"),
    "very many layers": (of_config(num_hidden_layers=10**12), "num_hidden_layers = 1000000000000, but its files hold"),
    "no qzeros": (of_tensor("qzeros", lambda a: None), "q_proj has no qzeros; the checkpoint is incomplete"),
    "no scales": (of_tensor("scales", lambda a: None), "q_proj has no scales"),
    "wide codes": (of_tensor("qweight", lambda a: a.astype(np.int64)), "qweight holds int64, but int32"),
    "floating codes": (of_tensor("qweight", lambda a: a.view(np.float32)), "qweight holds float32, but int32"),
    "whole scales": (of_tensor("scales", lambda a: a.view(np.int16)), "scales holds int16, but float16"),
    "whole weights": (of_tensor("weight", lambda a: a.view(np.int32), "model.norm"), "model.norm.weight holds int32, but float16"),
    "odd rows": (of_tensor("qweight", lambda a: a[:-1]), "a qweight of 7 rows does not hold 64 inputs"),
    "odd columns": (of_tensor("qweight", lambda a: a[:, :-1]), r"scales has shape \[2, 64\]"),
    "flat scales": (of_tensor("scales", lambda a: a.reshape(-1)), r"scales has shape \[128\], but it has 2 dimensions"),
    "fewer groups": (of_tensor("scales", lambda a: a[:1]), r"qzeros has shape \[2, 8\], but .* ask for \[1, 8\]"),
    "not a number": (of_tensor("scales", put((1, 3), np.nan)), "a scale is not finite"),
    "infinite": (of_tensor("scales", put((1, 3), np.inf)), "a scale is not finite"),
    "group out of range": (of_tensor("g_idx", put(5, 2)), "g_idx reaches from 0 to 2, but there are 2 groups"),
    "negative group": (of_tensor("g_idx", put(5, -1)), "g_idx reaches from -1 to 1"),
    "short g_idx": (of_tensor("g_idx", lambda a: a[:40]), "does not hold 40 inputs|is not what its config says|has shape"),
    "g_idx of two dimensions": (of_tensor("g_idx", lambda a: a[None]), "it has 1 dimension"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_told_in_a_sentence(case, whole, tmp_path):
    damage, sentence = CASES[case]
    damage(shutil.copytree(whole, tmp_path / "q"))
    said = refusal(tmp_path / "q")
    assert re.search(sentence, said), said


HARMLESS: dict[str, Callable[[Path], Any]] = {
    "no g_idx": of_tensor("g_idx", lambda a: None),
    "long g_idx": of_tensor("g_idx", lambda a: a.astype(np.int64)),
    "bits of another": of_quantization(bits=8),
    "groups of another": of_quantization(group_size=128),
    "desc_act of another": of_quantization(desc_act=True),
    "said to be symmetric": of_quantization(sym=True),
    "no quantize_config.json": lambda d: (d / "quantize_config.json").unlink(),
    "only quantize_config.json": lambda d: edit(d / "config.json", lambda c: c.pop("quantization_config")),
    "no index": lambda d: (d / INDEX).unlink(),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_the_tensors_tell_is_not_taken_from_the_config(case, whole, expected, tmp_path):
    HARMLESS[case](shutil.copytree(whole, tmp_path / "q"))
    np.testing.assert_array_equal(logits(tmp_path / "q"), expected)


def test_links_are_followed_as_the_hub_cache_needs(whole, expected, tmp_path):
    shutil.copytree(whole, tmp_path / "blobs")
    (tmp_path / "q").mkdir()
    for path in (tmp_path / "blobs").iterdir():
        (tmp_path / "q" / path.name).symlink_to(Path("../blobs") / path.name)
    np.testing.assert_array_equal(logits(tmp_path / "q"), expected)


def test_a_tensor_in_two_files_is_read_from_the_one_that_the_index_names(whole, expected, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "q")
    first, second = (load_file(directory / f"model-{i}.safetensors") for i in (0, 1))
    name = next(name for name in first if name.endswith("scales"))
    save_file({**second, name: first[name] + 1}, directory / "model-1.safetensors")
    np.testing.assert_array_equal(logits(directory), expected)


def test_dtypes_that_numpy_lacks_are_told(whole, tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}).encode()
    shutil.copy(whole / "config.json", tmp_path)
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    edit(tmp_path / "config.json", lambda c: c.update(num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"a in .* is stored as F8_E4M3; tensors of float64"):
        Checkpoint(tmp_path)["a"]


@settings(max_examples=40)
@given(st.data())
def test_any_change_of_headers_is_noticed_or_harmless(whole, expected, tmp_path_factory, data):
    directory = shutil.copytree(whole, tmp_path_factory.mktemp("m") / "q")
    file = directory / data.draw(st.sampled_from([INDEX, "model-0.safetensors"]))
    content = bytearray(file.read_bytes())
    end = len(content) if file.name == INDEX else 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans(), "truncate"):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    right_or_a_sentence(directory, expected)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["gptq", "gptq_v2"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("bits", "group_size", "desc_act", "sym", "quant_method", "dynamic", "static_groups", "lm_head", "pack_dtype", "meta", "new")


@settings(max_examples=40)
@given(st.sampled_from(KEYS), ANYTHING)
def test_any_change_of_the_quantization_config_is_noticed_or_harmless(whole, expected, tmp_path_factory, key, value):
    """But for the checkpoint format: of asymmetric files, only it tells how zero points are stored."""
    directory = shutil.copytree(whole, tmp_path_factory.mktemp("m") / "q")
    of_quantization(**{key: value})(directory)
    right_or_a_sentence(directory, expected)


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "quantization_config", "model_type")


@settings(max_examples=40)
@given(st.sampled_from(SIZES), ANYTHING)
def test_any_change_of_sizes_is_noticed_or_harmless(whole, expected, tmp_path_factory, key, value):
    directory = shutil.copytree(whole, tmp_path_factory.mktemp("m") / "q")
    of_config(**{key: value})(directory)
    right_or_a_sentence(directory, expected)
