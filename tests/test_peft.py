"""PEFT's adapters train on quantized models as on float ones, leave what lies below as it is, and come back from disk."""

import copy
import pickle
import re
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from family_cases import CASES
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.params import read_params
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.quantizer import register
from gptq_fn_interop.stream import copy_companions, save_gptq
from gptq_fn_interop.weight import DequantizedWeight
from gptq_writer import Scheme, random_linear
from peft import AdaLoraConfig, AdaptionPromptConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraGAConfig, preprocess_loraga
from peft.tuners.lora.config import CordaConfig, KasaConfig
from test_families import perturbed, publish
from tiny import save_tiny_llama

from gptq_fn import QuantConfig, Quantized, QuantizedLinear, Report, spec_from_config

pytestmark = pytest.mark.slow

register()

KINDS = {  # those of AutoGPTQ's table, less moss, which transformers does not have; and some that came later
    *("bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neox", "gptj", "llama", "opt"),
    *("gemma2", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe"),
}
FIRST = {kind: case for case, (kind, _) in reversed(CASES.items()) if kind in KINDS}
BATCH = torch.randint(2, 97, (2, 12), generator=torch.Generator().manual_seed(0))
STEPS = 3


def rounded(weight: Any, size: int = 16) -> QuantizedLinear:
    """The weights [..., out, in] rounded to 4 bits, symmetric, in groups of `size` inputs."""
    w = np.asarray(weight, np.float32)
    group_of = np.arange(w.shape[-1], dtype=np.int32) // size
    scale = np.stack([np.abs(w[..., group_of == g]).max(-1) for g in range(group_of[-1] + 1)], -1).astype(np.float16).astype(np.float32) / 8
    codes = np.clip(np.rint(w / scale[..., group_of]) + 8, 0, 15).astype(np.uint8)
    return QuantizedLinear(
        codes, scale, np.full(scale.shape, 8, np.uint8), np.broadcast_to(group_of, (*w.shape[:-2], w.shape[-1])).copy(), 4
    )


def round_checkpoint(source: Path, destination: Path) -> Path:
    """Writes the checkpoint in `source` with its linears rounded; without the solver, which adapters know nothing of."""
    checkpoint = Checkpoint(source)
    spec = spec_from_config(checkpoint.config)
    params = read_params(spec, checkpoint)
    blocks = [dict(block) for block in params["blocks"]]
    for block, leaves in zip(spec.blocks, blocks, strict=True):
        for linear in block.linears:
            if linear.quantize:
                leaf = leaves[linear.role]
                leaves[linear.role] = rounded(leaf["weight"]).with_bias(leaf.get("bias"))
    made = Quantized({**params, "blocks": blocks}, spec, Report(QuantConfig(4, 16), ()))
    save_gptq(made, destination, config=checkpoint.config)
    copy_companions(source, destination)
    return destination


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a case's quantized checkpoint."""

    @cache
    def make(case: str) -> Path:
        root = tmp_path_factory.mktemp(case)
        perturbed(case).save_pretrained(root / "float")
        publish(*CASES[case], root / "float")
        return round_checkpoint(root / "float", root / "quantized")

    return make


@pytest.fixture
def load(quantized: Callable[[str], Path]) -> Callable[[str], Any]:
    """Loads a case's quantized model anew."""

    def loaded(case: str) -> Any:
        attention = CASES[case][1].get("attn_implementation", "eager")
        found = transformers.AutoModelForCausalLM.from_pretrained(quantized(case), dtype=torch.float32, attn_implementation=attention)
        return found.eval()

    return loaded


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Saving an adapter looks the base model up on the hub, and AdaLoRA warns of layers that it gives no rank."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file|Unable to fetch remote file|.*rank_pattern|.*invalid shape")
        yield


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=BATCH).logits


def loss_of(model: Any) -> float:
    found = logits(model)[:, -BATCH.shape[1] :]
    return float(torch.nn.functional.cross_entropy(found[:, :-1].flatten(0, 1), BATCH[:, 1:].flatten()))


def train(model: Any, rate: float = 1e-2) -> None:
    """A few steps of AdamW on one batch, which AdaLoRA follows by dividing its ranks anew."""
    model.train()
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate)
    for step in range(STEPS):
        adamw.zero_grad()
        model(input_ids=BATCH, labels=BATCH).loss.backward()
        adamw.step()
        if model.peft_type == peft.PeftType.ADALORA:
            model.base_model.update_and_allocate(step)


def bits_of(model: Any) -> dict[str, torch.Tensor]:
    """Everything that the model's state dict holds, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def check_adapter(load: Callable[[], Any], config: peft.PeftConfig, directory: Path, rate: float = 1e-2) -> Any:
    """Trains an adapter; checks what must hold of every kind. Returns the trained model."""
    close = 1e-4 if config.peft_type == peft.PeftType.ADALORA else 0  # it leaves ranks out when saving that were zero before
    base = load()
    before = bits_of(base)
    tensors = dict(base.state_dict(keep_vars=True))
    torch.manual_seed(0)
    model = get_peft_model(base, config)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert not {id(p) for p in trainable.values()} & {id(t) for t in tensors.values()}  # only what the adapter brought
    start = loss_of(model)
    train(model, rate)
    assert loss_of(model) < start - 0.01
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert any(p.grad is not None and bool(p.grad.any()) for p in trainable.values())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())
    model.save_pretrained(directory)
    again = PeftModel.from_pretrained(load(), directory)
    torch.testing.assert_close(logits(again), logits(model), rtol=close, atol=close)
    return model


def linears(model: Any) -> list[str]:
    """The names of the quantized linears."""
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def adapted(model: Any, kind: type) -> int:
    """How many quantized linears the adapter works on."""
    return sum(isinstance(module, kind) and isinstance(module.get_base_layer(), QuantLinear) for module in model.modules())


# LoRA, AdaLoRA and Adaption Prompt on every model type


@pytest.mark.parametrize("kind", FIRST)
def test_lora(kind: str, load: Callable, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("kind", kind)
    model = check_adapter(lambda: load(FIRST[kind]), LoraConfig(r=4, target_modules="all-linear"), tmp_path)
    assert adapted(model, peft.tuners.lora.Linear) == len(linears(model))
    record_property("lora", True)


@pytest.mark.parametrize("kind", FIRST)
def test_adalora(kind: str, load: Callable, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("kind", kind)
    # It divides ranks by gradients, which experts have only where a batch reaches them.
    outside = [name for name in linears(load(FIRST[kind])) if ".experts." not in name]
    names = sorted({name.rsplit(".", 1)[-1] for name in outside})
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1, total_step=STEPS, target_modules=names)
    model = check_adapter(lambda: load(FIRST[kind]), config, tmp_path, rate=3e-2)
    assert adapted(model, peft.tuners.adalora.SVDLinear) == len(outside)
    record_property("adalora", True)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])  # which are all that PEFT has it for
def test_adaption_prompt(kind: str, load: Callable, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    record_property("kind", kind)
    config = AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    check_adapter(lambda: load(FIRST[kind]), config, tmp_path, rate=0.1)
    record_property("adaption prompt", True)


# what else PEFT has


METHODS: dict[str, tuple[str, peft.PeftConfig, float]] = {
    "dora": ("llama", LoraConfig(use_dora=True, target_modules="all-linear"), 1e-2),
    "dora-conv1d": ("gpt2", LoraConfig(use_dora=True, target_modules="all-linear", fan_in_fan_out=True), 1e-2),
    "rslora": ("opt", LoraConfig(use_rslora=True, target_modules="all-linear"), 1e-2),
    "orthogonal": ("llama", LoraConfig(init_lora_weights="orthogonal", target_modules="all-linear"), 1e-2),
    "ia3": ("llama", IA3Config(task_type="CAUSAL_LM"), 0.1),
    "ia3-conv1d": ("gpt2", IA3Config(task_type="CAUSAL_LM"), 0.1),
    "prompt": ("llama", PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"), 0.1),
}


@pytest.mark.parametrize("name", METHODS)
def test_other_methods(name: str, load: Callable, tmp_path: Path) -> None:
    kind, config, rate = METHODS[name]
    check_adapter(lambda: load(FIRST[kind]), copy.deepcopy(config), tmp_path, rate)


@pytest.mark.parametrize("transposed", [False, True])  # whatever a user believes of Conv1D, ours is [out, in]
def test_a_layer_of_gpt2_with_lora_is_the_sum_of_both(load: Callable, transposed: bool) -> None:
    base = load("gpt2")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], init_lora_weights=False, fan_in_fan_out=transposed)
    layer = get_peft_model(base, config).base_model.model.transformer.h[0].attn.c_attn
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, 64)
    expected = torch.nn.functional.linear(x, layer.base_layer.weight + 2 * b @ a, layer.base_layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_training_keeps_no_dequantized_weight_alive(load: Callable) -> None:
    model = get_peft_model(load("llama"), LoraConfig(r=4, target_modules="all-linear"))
    weights = {tuple(m.weight.shape) for m in model.modules() if isinstance(m, QuantLinear)}
    weights |= {shape[::-1] for shape in weights}
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        loss = model(input_ids=BATCH, labels=BATCH).loss
    assert kept
    assert not weights & set(kept)
    loss.backward()


def test_kbit_training_with_checkpointed_activations(load: Callable) -> None:
    base = peft.prepare_model_for_kbit_training(load("llama"), use_gradient_checkpointing=True)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    assert base.is_gradient_checkpointing
    start = loss_of(model)
    train(model)
    assert loss_of(model) < start - 0.01


def test_trainer(load: Callable, tmp_path: Path) -> None:
    model = get_peft_model(load("llama"), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = loss_of(model)
    rows = [{"input_ids": row, "labels": row} for row in BATCH] * 2
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=STEPS, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=STEPS
    )
    transformers.Trainer(model=model, args=options, train_dataset=rows).train()
    assert loss_of(model) < start - 0.01
    again = PeftModel.from_pretrained(load("llama"), tmp_path / f"checkpoint-{STEPS}")
    assert torch.equal(logits(again), logits(model))


def test_the_example_lowers_perplexity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    model = round_checkpoint(save_tiny_llama(tmp_path / "float"), tmp_path / "tiny")
    options = ["--steps", "8", "--length", "64", "--rate", "0.01", "--build", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(model), *options])
    monkeypatch.setattr(sys, "path", [*sys.path])
    runpy.run_path(str(Path(__file__).parent.parent / "examples/finetune.py"), run_name="__main__")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "perplexity" in line)
    before, after = map(float, re.findall(r"\d+\.\d+", row))
    assert after < 0.9 * before
    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert logits(PeftModel.from_pretrained(base, tmp_path / "tiny-lora")).isfinite().all()


# what would change the base weight


def test_merging_needs_the_dense_model(load: Callable, tmp_path: Path) -> None:
    model = get_peft_model(load("gpt2"), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    expected = logits(model)
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
        model.merge_and_unload()
    model.save_pretrained(tmp_path)
    dense = model.unload().dequantize()
    merged = PeftModel.from_pretrained(dense, tmp_path).merge_and_unload()
    assert not linears(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


def corda(model: Any) -> dict[str, Any]:
    """Leaves on each layer what PEFT's preprocess_corda would, for which it needs one package more."""
    for module in model.modules():
        if isinstance(module, QuantLinear):
            u, s, vh = torch.linalg.svd(module.weight.float(), full_matrices=False)
            module.eigens = SimpleNamespace(U_WC=u[:, :4], S_WC=s[:4], V_WC=vh[:4].T)
    return {"init_lora_weights": "corda", "corda_config": CordaConfig()}


def lora_ga(model: Any) -> dict[str, Any]:
    options = {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()}
    config = LoraConfig(r=4, target_modules=TARGETS, **options)
    preprocess_loraga(model, config, lambda: model(input_ids=BATCH, labels=BATCH).loss.backward())
    return options


TARGETS = ["q_proj", "v_proj"]
WRITING: dict[str, Callable[[Any], dict[str, Any]]] = {
    "pissa": lambda _: {"init_lora_weights": "pissa"},
    "pissa_niter": lambda _: {"init_lora_weights": "pissa_niter_2"},
    "olora": lambda _: {"init_lora_weights": "olora"},
    "corda": corda,
    "loftq": lambda _: {"init_lora_weights": "loftq", "loftq_config": peft.LoftQConfig(loftq_bits=4)},
    "lora_ga": lora_ga,
    "kasa": lambda _: {"kasa_config": KasaConfig()},
}
"""Initializations that take what they give to the adapter off the base weight: the options of each, for a model."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", WRITING)
def test_initializations_that_change_the_base_weight_are_refused(
    name: str, dtype: torch.dtype, load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    # LoftQ's own computation needs bitsandbytes; what PEFT does with the result does not.
    found = torch.zeros(4, 64), torch.zeros(64, 4)
    monkeypatch.setattr("peft.tuners.lora.layer.loftq_init", lambda weight, **_: (weight.clone(), *found))
    model = load("llama")
    for module in model.modules():
        if isinstance(module, QuantLinear):
            module.scales.data = module.scales.data.to(dtype)
    with pytest.raises(ValueError, match=r"(?s)dequantized anew at each access.*default.*float model"):
        get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS, **WRITING[name](model)))


@pytest.mark.parametrize("name", [True, "gaussian", "orthogonal", "mica", "eva"])
def test_initializations_that_only_read_change_nothing(name: bool | str, load: Callable) -> None:
    base = load("llama")
    expected = logits(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=name))
    if name == "eva":
        peft.initialize_lora_eva_weights(model, [{"input_ids": BATCH}] * 4, show_progress_bar=False)
    if name != "orthogonal":  # its product is not exactly zero
        assert torch.equal(logits(model), expected)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-3)


def test_other_adapters_are_not_merged_either(load: Callable) -> None:
    model = get_peft_model(load("llama"), IA3Config(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"(?s)dequantized anew at each access.*model.dequantize\(\) first"):
        model.merge_adapter()


# the weight that is read


def layer_of(scheme: Scheme) -> QuantLinear:
    return QuantLinear(
        random_linear(np.random.default_rng(0), 64, 32, scheme).tensors, scheme.bits, {"bits": scheme.bits, "sym": scheme.sym}
    )


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda w: setattr(w, "data", torch.zeros(32, 64)),
    "data in place": lambda w: w.data.copy_(torch.zeros(32, 64)),
    "operator": lambda w: w.__isub__(1),
    "item": lambda w: w.__setitem__(0, 0),
    "method": lambda w: w.add_(1),
    "keyword": lambda w: torch.nn.init.normal_(tensor=w),
    "out": lambda w: torch.add(torch.ones(32, 64), 1, out=w),
    "detached": lambda w: w.detach().zero_(),
    "gradient": lambda w: setattr(w, "requires_grad", True),
    "gradient method": lambda w: w.requires_grad_(),
    "parameter": lambda w: torch.nn.Parameter(w),
}


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", WRITES)
def test_the_weight_refuses_to_be_written_to(name: str, context: Callable) -> None:
    layer = layer_of(Scheme(scales=torch.float32))
    with context(), pytest.raises(ValueError, match="writing to it would change nothing"):
        WRITES[name](layer.weight)


@pytest.mark.parametrize("value", [torch.zeros(32, 64), torch.nn.Parameter(torch.zeros(32, 64)), None])
def test_no_other_weight_is_taken(value: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="writing to it would change nothing"):
        layer_of(Scheme()).weight = value


def test_whatever_is_computed_from_the_weight_is_plain() -> None:
    weight = layer_of(Scheme(scales=torch.float32)).weight
    assert isinstance(weight, DequantizedWeight)
    plain = weight.clone()
    x = torch.randn(3, 64, requires_grad=True)
    results = [weight + 1, weight.half(), weight[0], weight.T, torch.cat([weight, plain]), torch.linalg.norm(weight, dim=1), x @ weight.T]
    results += [plain, copy.deepcopy(weight), pickle.loads(pickle.dumps(weight)), torch.zeros(32, 64).copy_(weight)]
    assert {type(result) for result in results} == {torch.Tensor}
    assert all(torch.equal(result, plain) for result in results[-4:])
    results[6].sum().backward()
    torch.testing.assert_close(x.grad, plain.sum(0).expand(3, 64))
    assert not weight.requires_grad_(False).requires_grad
    assert (weight.dtype, weight.device, weight.shape) == (plain.dtype, plain.device, plain.shape)
    torch.nn.Linear(64, 32).weight.data = plain


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_compiled_adapters_compute_the_same_in_one_graph(options: dict[str, Any]) -> None:
    base = torch.nn.Sequential(layer_of(Scheme()), torch.nn.Linear(32, 8))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, **options))
    x = torch.randn(3, 64)
    expected = model(x)
    torch.testing.assert_close(torch.compile(model, backend="aot_eager", fullgraph=True)(x), expected)
