"""Small quantized checkpoints on disk, and the dense models that they must equal."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.quantizer import register
from gptq_writer import Scheme, quantization_config, random_linear, write
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig, Qwen2Config
from transformers.pytorch_utils import Conv1D

register()

VOCAB = 99
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED: dict[str, Any] = {**SHAPE, "intermediate_size": 96, "num_key_value_heads": 2}
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**GATED, **TOKENS),
    "qwen2": Qwen2Config(**GATED, **TOKENS, tie_word_embeddings=True),  # biases on q, k and v
    "gpt2": GPT2Config(vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, n_positions=64, **TOKENS),  # Conv1D, tied
    "opt": OPTConfig(**SHAPE, ffn_dim=96, word_embed_proj_dim=32, **TOKENS),  # linears outside of the blocks, tied
}
IDS = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))

Choose = Callable[[str], Scheme | None]


class Case(NamedTuple):
    """A checkpoint on disk, its quantized linears, and the dense model that it must equal."""

    directory: Path
    dense: Any
    tensors: dict[str, torch.Tensor]
    quantized: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        return json.loads((self.directory / "config.json").read_text())

    def edit(self, **changes: Any) -> None:
        """Change keys of the quantization config on disk; None removes one."""
        config = self.config()
        described = {**config["quantization_config"], **changes}
        config["quantization_config"] = {key: value for key, value in described.items() if value is not None}
        (self.directory / "config.json").write_text(json.dumps(config))

    def rewrite(self, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
        """Change the tensors on disk."""
        change(self.tensors)
        write(self.directory, self.config(), self.tensors)


def checkpoint(
    directory: Path, family: str, scheme: Scheme, *, choose: Choose | None = None, shards: int = 1, seed: int = 0, head: bool = False
) -> Case:
    """A checkpoint of a tiny random model. `choose` gives each linear's scheme, by default `scheme` for all in the blocks."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dense = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family])).eval()
    for p in dense.parameters():
        p.data += 0.02 * torch.randn_like(p)  # default initialization hides biases and norms
    tensors = {k: v.clone() for k, v in dense.state_dict().items() if k not in dense.all_tied_weights_keys}
    names = []
    for name, module in dense.named_modules():
        in_blocks = ".layers." in name or ".h." in name
        mine = choose(name) if choose else scheme
        if isinstance(module, nn.Linear | Conv1D) and mine is not None and (in_blocks or (head and name == "lm_head")):
            inputs, outputs = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
            linear = random_linear(rng, inputs, outputs, mine)
            weight = torch.from_numpy(linear.weight).float()
            module.weight.data = weight.T.contiguous() if isinstance(module, Conv1D) else weight
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{leaf}": t for leaf, t in linear.tensors.items()}
            names.append(name)
    config = {**json.loads(dense.config.to_json_string()), "architectures": [type(dense).__name__], "dtype": "float32"}
    write(directory, {**config, "quantization_config": quantization_config(scheme)}, tensors, shards)
    return Case(directory, dense, tensors, tuple(names))


def load(directory: Path, **kwargs: Any) -> Any:
    """The model, after checking that every tensor of the checkpoint found its place."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **kwargs)
    model, info = loaded
    assert not any(info.values()), info
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.double().cpu()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def assert_equal_logits(model: nn.Module, case: Case, tolerance: float = 1e-5) -> None:
    found = [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    assert sorted(found) == sorted(case.quantized)
    assert relative(logits(model), logits(case.dense)) < tolerance
