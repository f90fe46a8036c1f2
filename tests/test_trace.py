"""Torch models that no row describes: quantized through their own forward, as if each linear had been done by hand in order."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gptq_fn_interop.capture import weight_of
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.gptq_format import from_tensors
from gptq_fn_interop.stored import stored_names
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

import gptq_fn
from gptq_fn import QuantConfig, QuantizedLinear, Rule, interop

VOCAB = 99
TOKENS = np.random.default_rng(0).integers(3, 90, (6, 32))
CONFIG = QuantConfig(group_size=16, grid="minmax", order="natural")
ROUNDED = replace(CONFIG, min_rows=10**6)
"""Rounding instead of solving: much less to compile, where it is the inputs of linears that count."""

BASE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
GATED: dict[str, Any] = {**BASE, "num_key_value_heads": 4, "intermediate_size": 64}
MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1}
VISION: dict[str, Any] = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32, **BASE}
KINDS: dict[str, dict[str, Any]] = {
    "llama": GATED,
    "gpt2": {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 64},  # Conv1D, tied
    "jamba": {**GATED, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
    | {"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 8},
    "falcon_h1": {**GATED, **MAMBA, "mamba_d_ssm": 64, "mamba_chunk_size": 8},  # attention and Mamba side by side
    "recurrent_gemma": {**GATED, "lru_width": 32, "attention_window_size": 8, "block_types": ["recurrent", "attention"], "head_dim": 8},
    "zamba2": {**GATED, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 8, "mamba_headdim": 8, "chunk_size": 8}
    | {"layers_block_type": ["mamba", "hybrid", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 8},  # one transformer in two blocks
    "gemma4_text": {**GATED, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
    | {
        "head_dim": 8,
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
    },  # the last blocks use the keys and values of others
    "llava": {"text_config": {"model_type": "llama", **GATED}, "vision_config": VISION | {"intermediate_size": 64}},
}
NO_ROW = ("jamba", "falcon_h1", "recurrent_gemma", "zamba2", "gemma4_text", "llava")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads would wait for each other longer than these models compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def build(kind: str) -> Any:
    torch.manual_seed(0)
    auto = AutoModelForImageTextToText if kind == "llava" else AutoModelForCausalLM
    return perturbed(auto.from_config(AutoConfig.for_model(kind, **copy.deepcopy(KINDS[kind]))))


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # default initialization hides biases and norms
    return model.eval()


class Block(nn.Module):
    """A residual MLP whose linears run in another order than they are named."""

    def __init__(self, memory: list[torch.Tensor]) -> None:
        super().__init__()
        self.memory = memory
        self.norm, self.down, self.up = nn.LayerNorm(32), nn.Linear(64, 32), nn.Linear(32, 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        if self.memory and self.memory[0].numel() == 0:
            self.memory[0] = x
        return x


class Plain(nn.Module):
    """Blocks in a row. `first`: all read the first one's output too; `memory`: by way of an attribute that it leaves."""

    def __init__(self, first: bool = False, memory: bool = False) -> None:
        super().__init__()
        self.first, self.memory = first, [torch.zeros(0)] if memory else []
        self.embed, self.head = nn.Embedding(VOCAB, 32), nn.Linear(32, VOCAB)
        self.layers = nn.ModuleList(Block(self.memory) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.memory[:] = [torch.zeros(0) for _ in self.memory]
        x, first = self.embed(tokens), None
        for layer in self.layers:
            x = layer(x)
            first = x if first is None else first
            x = x * 1.5 + (0.5 * first if self.first else 0) + (self.memory[0] if self.memory else 0)
        return self.head(x)


def plain(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return perturbed(Plain(**kwargs))


MODELS: dict[str, Callable[[], Any]] = {
    **{kind: (lambda kind=kind: build(kind)) for kind in KINDS},
    "plain": plain,
    "plain, first": lambda: plain(first=True),
    "plain, memory": lambda: plain(memory=True),
}


def quantized_linears(directory: Path, model: Any) -> dict[str, QuantizedLinear]:
    """The quantized linears of a checkpoint, by the names of the model's modules."""
    checkpoint = Checkpoint(directory)
    assert checkpoint.quantization is not None
    modules = {disk: name for name, disk in stored_names(model, dict(model.named_modules())).items()}
    found = {}
    for stored_as in (key.removesuffix(".qweight") for key in checkpoint if key.endswith(".qweight")):
        tensors = {leaf: checkpoint[f"{stored_as}.{leaf}"] for leaf in ("qweight", "qzeros", "scales", "g_idx")}
        found[modules[stored_as]] = from_tensors(tensors, stored_as, checkpoint.quantization)
    return found


def errors_by_hand(model: Any, stages: list[tuple[str, ...]], linears: dict[str, QuantizedLinear]) -> Iterator[tuple[str, float]]:
    """Of each linear, ||(W - Q) X|| / ||W X||: X from the whole model, in which all linears of earlier stages compute with Q."""
    model = copy.deepcopy(model)
    for stage in stages:
        for name in stage:
            linear, xs = model.get_submodule(name), []
            handle = linear.register_forward_pre_hook(lambda module, args, xs=xs: xs.append(args[0].reshape(-1, args[0].shape[-1])))
            with torch.no_grad():
                model(torch.tensor(TOKENS))
            handle.remove()
            x, w, q = torch.cat(xs).double(), weight_of(linear).double(), weights(linears[name]).double()
            yield name, float(((w - q) @ x.T).norm() / (w @ x.T).norm())
        for name in stage:
            weight_of(model.get_submodule(name)).copy_(weights(linears[name]))


def weights(q: QuantizedLinear) -> torch.Tensor:
    return torch.from_numpy(np.array(gptq_fn.dequantize(q)))


SEQUENTIAL = [*NO_ROW, "gpt2", "plain", "plain, first", "plain, memory"]


@pytest.mark.parametrize(("name", "sequential"), [*((name, True) for name in SEQUENTIAL), ("plain, first", False)])
def test_each_linear_sees_all_before_it_quantized(name: str, sequential: bool, tmp_path: Path) -> None:
    """The reported errors are those of a slow way by hand: one stage after the other, each time through the whole model.

    Where not sequential, all linears of a block are one stage.
    """
    model = MODELS[name]()
    traced = interop.trace(model, TOKENS[:2])
    report = interop.quantize_traced(model, TOKENS, replace(ROUNDED, sequential=sequential), tmp_path / "q", traced=traced)
    reported = {x.name: x.error for x in report.linears}
    linears = quantized_linears(tmp_path / "q", model)
    stages = [stage for block in traced.blocks for stage in (block.stages if sequential else [sum(block.stages, ())])]
    by_hand = dict(errors_by_hand(model, [tuple(filter(linears.get, stage)) for stage in stages], linears))
    assert reported.keys() == by_hand.keys()
    assert len(reported) >= 6
    for linear, error in by_hand.items():
        assert reported[linear] == pytest.approx(error, rel=1e-3), linear


def test_what_is_kept_between_blocks_is_what_the_model_needs() -> None:
    needed = {
        name: interop.trace(MODELS[name](), TOKENS[:2]).carry for name in ("jamba", "gemma4_text", "plain", "plain, first", "plain, memory")
    }
    assert needed == {"jamba": "last", "gemma4_text": "none", "plain": "last", "plain, first": "all", "plain, memory": "none"}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_with_a_row_gets_the_codes_of_its_row(kind: str) -> None:
    """Two computations round ties differently, and then what follows from one; nothing else may differ."""
    model = build(kind)
    params, spec = interop.from_hf(model)
    expected = gptq_fn.quantize(params, spec, jnp.asarray(TOKENS, jnp.int32), CONFIG)
    report = interop.quantize_traced(model, TOKENS, CONFIG)
    assert {x.name for x in report.linears} == {x.name for x in expected.report.linears}
    differ = codes(interop.from_hf(model)[0]) != codes(expected.params)
    assert differ.mean() < 0.005
    assert not differ[: 96 * 32 + 32 * 32].any()  # the first two stages


def codes(params: dict[str, Any]) -> np.ndarray:
    linears = [p[role] for p in params["blocks"] for role in ("qkv", "q", "k", "v", "o", "gate", "up", "down") if role in p]
    return np.concatenate([np.asarray(q.codes).ravel() for q in linears if isinstance(q, QuantizedLinear)])


LOADED = [
    "gpt2",
    "jamba",
    "recurrent_gemma",
    "zamba2",
    "llava",
]


def test_half_precision_and_companions(tmp_path: Path) -> None:
    """The model computes in its own type, and what lies beside it on disk goes along."""
    model = build("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "float/tokenizer.json").write_text("{}")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float")
    interop.quantize_traced(model, TOKENS, ROUNDED, tmp_path / "q")
    assert (tmp_path / "q/tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert loaded.dtype == torch.bfloat16
    assert json.loads((tmp_path / "q/config.json").read_text())["dtype"] == "bfloat16"
    assert (logits(loaded) - logits(model)).norm() < 0.3 * logits(model).norm()


@pytest.mark.parametrize("kind", LOADED)
def test_transformers_loads_what_was_written(kind: str, tmp_path: Path) -> None:
    """The same model from disk and in place, and both compute what the dense one does with the weights that the codes stand for."""
    model = build(kind)
    interop.quantize_traced(model, TOKENS, ROUNDED, tmp_path / "q")
    dense = copy.deepcopy(model)
    linears = quantized_linears(tmp_path / "q", model)
    for name, q in linears.items():
        weight_of(dense.get_submodule(name)).copy_(weights(q))
    interop.quantize_traced(model, TOKENS, ROUNDED)
    assert {name for name, module in model.named_modules() if isinstance(module, interop.QuantLinear)} == linears.keys()
    loaded, info = type(model).from_pretrained(tmp_path / "q", output_loading_info=True)
    assert not any(info.values()), info
    a, b, c = (logits(m) for m in (model, loaded, dense))
    assert torch.equal(a, b)
    assert (a - c).norm() < 1e-4 * c.norm()
    model.save_pretrained(tmp_path / "again")
    ours, again = Checkpoint(tmp_path / "q"), Checkpoint(tmp_path / "again")
    assert {name: ours[name].tobytes() for name in ours} == {name: again[name].tobytes() for name in again}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits


@pytest.mark.parametrize("name", ["gpt2", "jamba", "llava", "plain"])
def test_a_checkpoint_has_the_names_of_the_float_one(name: str, tmp_path: Path) -> None:
    """Tied tensors once, fused experts one by one, the names of save_pretrained; weights that stay are the same bytes."""
    model = MODELS[name]()
    if name == "plain":
        original = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    else:
        model.save_pretrained(tmp_path / "float")
        original = Checkpoint(tmp_path / "float")
    report = interop.quantize_traced(model, TOKENS, ROUNDED, tmp_path / "q", shard_bytes=20_000)
    found = Checkpoint(tmp_path / "q")
    assert len(found.files) > 1
    linears = {key.removesuffix(".qweight") for key in found if key.endswith(".qweight")}
    assert len(linears) == len(report.linears)
    packed = ("qweight", "qzeros", "scales", "g_idx")
    replaced = {f"{name}.{leaf}" for name in linears for leaf in packed} | original.keys() - {f"{name}.weight" for name in linears}
    assert found.keys() == replaced
    assert all(found[key].tobytes() == original[key].tobytes() for key in found.keys() & original.keys())
    assert found.config["architectures"] == [type(model).__name__]
    assert json.loads((tmp_path / "q/report.json").read_text())["left"] == [list(x) for x in report.left]


@pytest.mark.parametrize("name", ["gpt2", "zamba2", "gemma4_text", "plain, first"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(name: str, fails: bool, tmp_path: Path) -> None:
    model = MODELS[name]()
    model.train()
    model.layers.eval() if name.startswith("plain") else None
    modes = [module.training for module in model.modules()]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    values = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def progress(done: int, blocks: int) -> None:
        if fails and done == 2:
            raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            interop.quantize_traced(model, TOKENS, ROUNDED, tmp_path / "q", progress=progress)
        with pytest.raises(KeyboardInterrupt):
            interop.quantize_traced(model, TOKENS, ROUNDED, progress=progress)
        assert not list(tmp_path.iterdir())
    else:
        interop.quantize_traced(model, TOKENS, ROUNDED, tmp_path / "q", progress=progress)
    assert [module.training for module in model.modules()] == modes
    assert all(p is parameters[key] for key, p in model.named_parameters(remove_duplicate=False))
    assert all(torch.equal(tensor, values[key]) for key, tensor in model.state_dict().items())
    assert not any("forward" in m.__dict__ or m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Odd(nn.Module):
    """A block with one of everything that is no usual linear."""

    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared, self.unused, self.read = shared, nn.Linear(32, 32), nn.Linear(32, 32)
        self.gate, self.twice, self.narrow = nn.Linear(32, 4), nn.Linear(32, 32), nn.Linear(32, 24)
        self.experts = nn.Parameter(torch.randn(4, 32, 32) / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.gate(x).softmax(-1)
        x = x + self.shared(x) + x @ self.read.weight.T + self.narrow(x).mean()
        x = x + self.twice(self.twice(x))
        return x + torch.einsum("bte,eij,bti->btj", weight, self.experts, x)


def odd() -> Any:
    torch.manual_seed(0)
    model = Plain()
    shared = nn.Linear(32, 32)
    model.layers = nn.ModuleList(Odd(shared) for _ in range(2))
    return perturbed(model)


def test_what_is_left_has_a_reason(tmp_path: Path) -> None:
    config = replace(ROUNDED, bits=3, rules=(Rule(r"layers\.1\.narrow"),))
    report = interop.quantize_traced(odd(), TOKENS, config, tmp_path / "q")
    assert [x.name for x in report.linears] == ["layers.0.twice", "layers.1.twice"]
    assert report.linears[0].rows == 2 * TOKENS.size  # both calls
    why = dict(report.left)
    for linear, word in {
        "shared": "share",
        "unused": "passed through",
        "read": "read",
        "gate": "routes",
        "experts": "several linears",
    }.items():
        assert word in why.pop(f"layers.0.{linear}")
        assert word in why.pop(f"layers.1.{linear}")
    assert "chunks of 32" in why.pop("layers.0.narrow")
    assert "rule" in why.pop("layers.1.narrow")
    assert not why
    told = json.loads((tmp_path / "q/quantize_config.json").read_text())["dynamic"]
    assert {"-:layers\\.0\\.gate$", "-:layers\\.1\\.shared$", "-:layers\\.0\\.narrow$", "-:layers\\.1\\.narrow"} <= told.keys()


def test_a_rule_can_ask_for_a_router() -> None:
    model = odd()
    rules = Rule(r".*gate", replace(ROUNDED, bits=8)), Rule(".*")
    report = interop.quantize_traced(model, TOKENS, replace(ROUNDED, rules=rules))
    assert [(x.name, x.bits) for x in report.linears] == [("layers.0.gate", 8), ("layers.1.gate", 8)]
    assert model.layers[1].gate.bits == 8


def test_linears_can_be_named_and_traces_edited() -> None:
    traced = interop.trace(plain(), TOKENS, blocks="layers", layers=["up"])
    assert [block.stages for block in traced.blocks] == [((f"layers.{i}.up",),) for i in range(3)]
    assert traced.left == tuple((f"layers.{i}.down", "it is not among the layers that were named") for i in range(3))
    assert "layers.2: up\n" in str(traced)
    report = interop.quantize_traced(plain(), TOKENS, ROUNDED, traced=replace(traced, blocks=traced.blocks[:2]))
    assert [x.name for x in report.linears] == ["layers.0.up", "layers.1.up"]


class AutoGPTQs:
    """As AutoGPTQ describes llama."""

    layer_type = "LlamaDecoderLayer"
    layers_block_name = "model.layers"
    outside_layer_modules = ("model.embed_tokens", "model.norm")
    inside_layer_modules = (
        ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"),
        ("self_attn.o_proj",),
        ("mlp.up_proj", "mlp.gate_proj"),
        ("mlp.down_proj",),
    )


@pytest.mark.parametrize("definition", [AutoGPTQs, {key: value for key, value in vars(AutoGPTQs).items() if key[0] != "_"}])
def test_definitions_of_autogptq_carry_over(definition: Any) -> None:
    model = build("llama")
    traced = interop.trace(model, TOKENS[:1], definition=definition)
    assert traced == interop.trace(model, TOKENS[:1])
    stages = [{f"model.layers.0.{name}" for name in stage} for stage in AutoGPTQs.inside_layer_modules]
    assert [set(stage) for stage in traced.blocks[0].stages] == stages


def two_towers() -> Any:
    model = plain()
    model.more = nn.ModuleList(Block([]) for _ in range(3))
    model.head = nn.Sequential(*model.more, nn.Linear(32, VOCAB))
    return model


def infinite() -> Any:
    model = plain()
    model.embed.weight.data[:] = torch.inf
    return model


def on_meta() -> Any:
    model = plain()
    return model.to("meta")


def already() -> Any:
    model = plain()
    interop.quantize_traced(model, TOKENS, ROUNDED)
    return model


def random() -> Any:
    model = plain()
    model.layers[1].forward = lambda x: x + torch.randn_like(x)
    return model


def rescaling() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", vocab_size=VOCAB, hidden_size=32, num_hidden_layers=7))


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no such module": (plain, {"blocks": "model.layers"}, "no module 'model.layers'. Blocks may be in layers"),
    "not blocks": (plain, {"blocks": "layers.0"}, "layers.0 holds no blocks"),
    "no list": (lambda: perturbed(nn.Sequential(nn.Embedding(VOCAB, 8), nn.Linear(8, 8))), {}, "No ModuleList with linears"),
    "two towers": (two_towers, {}, "Several lists may be the blocks: layers, more"),
    "no such linear": (plain, {"layers": [["up", "upp"]]}, "No block has a linear 'upp'; there are down, up"),
    "other class": (plain, {"definition": {"layers_block_name": "layers", "layer_type": "GPT2Block"}}, "blocks are GPT2Block"),
    "other model": (plain, {"definition": AutoGPTQs}, "describes another model"),
    "no block name": (plain, {"definition": {}}, "no layers_block_name"),
    "on meta": (on_meta, {}, "meta device"),
    "quantized": (already, {}, "quantized already"),
    "random": (random, {}, "does not give the same twice"),
    "rescaling": (rescaling, {}, "changes its own weight rwkv.blocks.0.attention.output.weight; for RWKV"),
    "tokens too large": (plain, {"example": TOKENS + 50}, "the model knows 99"),
    "one sample": (plain, {"example": TOKENS[0]}, r"\[samples, time\]"),
    "no integers": (plain, {"example": TOKENS / 2}, "whole numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_sentence_for_what_cannot_be_traced(case: str) -> None:
    make, arguments, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        interop.trace(make(), **{"example": TOKENS, **arguments})


def test_a_sentence_for_what_cannot_be_quantized(tmp_path: Path) -> None:
    traced = interop.trace(plain(), TOKENS)
    with pytest.raises(ValueError, match=r"layers.0.up: calibration batch 1 of 1 makes its input infinite"):
        interop.quantize_traced(infinite(), TOKENS, traced=traced)
    with pytest.raises(ValueError, match="of another model"):
        interop.quantize_traced(build("llama"), TOKENS, traced=traced)
    with pytest.raises(ValueError, match=r"Nothing was quantized: layers.0.up: a rule"):
        interop.quantize_traced(plain(), TOKENS, QuantConfig(rules=(Rule(".*"),)), tmp_path / "q")
    assert not (tmp_path / "q").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        interop.quantize_traced(plain(), TOKENS, destination=tmp_path / "full")
