"""push_to_hub and loading by name, against a stand-in for the hub's HTTP API; and loading from huggingface_hub's cache without any."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import IDS, Case, assert_equal_logits, checkpoint, load, logits
from gptq_fn_interop.hub import local
from gptq_writer import Scheme
from hub_stand_in import USER, Repositories, hub, run
from safetensors.torch import load as load_bytes

RULES = {"z_first": {"group_size": 64}, "-:.*m_second": {}, "+:.*a_third": {"bits": 8}}

PROGRAM = """
import sys
import torch
import gptq_fn.interop
from gptq_fn_interop.hub import local
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("checkpoint")
model.push_to_hub("plain")
model.save_pretrained("aside", push_to_hub=True, repo_id="sharded", max_shard_size="20KB")
again = AutoModelForCausalLM.from_pretrained("somebody/sharded", device_map="auto")
assert local("somebody/plain").joinpath("quantize_config.json").exists()
torch.save([m(torch.load("ids")).logits.detach() for m in (model, again)], "logits")
"""


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path, Repositories]:
    """A checkpoint, the directory of a program that pushed it twice, and what the stand-in then holds."""
    directory = tmp_path_factory.mktemp("pushed")
    case = checkpoint(directory / "checkpoint", "llama", Scheme(3, 64, sym=False, desc_act=True, zeros="v2"))
    case.edit(dynamic=RULES)
    torch.save(IDS, directory / "ids")
    with hub({}) as server:
        run(PROGRAM, server.url, directory)
        return case, directory, server.repositories


@pytest.mark.parametrize("name", ["plain", "sharded"])
def test_all_that_readers_look_for_is_uploaded(pushed: tuple[Case, Path, Repositories], name: str) -> None:
    case, _, repositories = pushed
    files = repositories[f"{USER}/{name}"]
    assert ("model.safetensors" in files) == (name == "plain")
    assert ("model.safetensors.index.json" in files) == (name == "sharded")
    tensors = {key: t for path, data in files.items() if path.endswith(".safetensors") for key, t in load_bytes(data).items()}
    assert tensors.keys() == case.tensors.keys()
    assert all(torch.equal(tensors[key], t) for key, t in case.tensors.items())
    described = json.loads(files["quantize_config.json"])
    assert described == json.loads(files["config.json"])["quantization_config"] == case.config()["quantization_config"]
    assert list(described["dynamic"]) == list(RULES)


def test_what_was_pushed_loads_by_its_name(pushed: tuple[Case, Path, Repositories]) -> None:
    _, directory, _ = pushed
    model, again = torch.load(directory / "logits")
    assert torch.equal(model, again)
    assert torch.equal(model.double(), logits(load(directory / "checkpoint")))


def test_what_was_loaded_once_loads_without_a_hub(pushed: tuple[Case, Path, Repositories], monkeypatch: pytest.MonkeyPatch) -> None:
    """From huggingface_hub's cache."""
    case, directory, _ = pushed
    cache = directory / "hf_home" / "hub"
    model = load("somebody/sharded", cache_dir=cache, local_files_only=True)  # type: ignore[arg-type]
    assert_equal_logits(model, case)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert (local("somebody/plain") / "model.safetensors").exists()
    with pytest.raises(ValueError, match="somebody/other is not a directory here, and no model of this name could be fetched"):
        local("somebody/other")
