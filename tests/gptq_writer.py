"""An independent little writer of GPTQ checkpoints, bit by bit, in the manner of AutoGPTQ and GPTQModel."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import save_file

SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Scheme(NamedTuple):
    """How a linear is quantized; `zeros` is how its zero points are stored."""

    bits: int = 4
    group_size: int = 32
    sym: bool = True
    desc_act: bool = False
    zeros: str = "v1"
    scales: torch.dtype = torch.float16
    g_idx: bool = True


class Linear(NamedTuple):
    """A quantized linear's tensors as on disk, and the weight [out, in] that they stand for, in float64."""

    tensors: dict[str, torch.Tensor]
    weight: np.ndarray


def stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes [count, ...] -> int32 words [words, ...]: bit p of a column is bit p % 32 of its word p // 32."""
    count, *rest = codes.shape
    in_bits = ((codes[:, None] >> np.arange(bits).reshape(1, bits, *(1 for _ in rest))) & 1).astype(np.uint64).reshape(count * bits, *rest)
    padded = np.concatenate([in_bits, np.zeros((-len(in_bits) % 32, *rest), np.uint64)]).reshape(-1, 32, *rest)
    words = (padded << np.arange(32, dtype=np.uint64).reshape(1, 32, *(1 for _ in rest))).sum(1)
    return words.astype(np.uint32).view(np.int32)


def stored_zeros(zeros: np.ndarray, bits: int, how: str) -> np.ndarray:
    """Zero points [groups, out] -> qzeros."""
    if how == "v2":
        return np.ascontiguousarray(stream(zeros.T, bits).T)
    if how == "v1":
        return np.ascontiguousarray(stream((zeros.T - 1) % 2**bits, bits).T)
    assert how == "v1_carry"
    ones = stream(np.ones((32 // bits, 1), np.int64), bits).view(np.uint32)[0, 0]
    return np.ascontiguousarray((stream(zeros.T, bits).view(np.uint32) - ones).view(np.int32).T)


def random_linear(rng: np.random.Generator, inputs: int, outputs: int, scheme: Scheme) -> Linear:
    """A linear with random codes, scales, zero points and (for desc_act) groups; scales of symmetric ones have either sign."""
    size = inputs if scheme.group_size == -1 else scheme.group_size
    groups = -(-inputs // size)
    codes = rng.integers(0, 2**scheme.bits, (inputs, outputs))
    middle = np.full((groups, outputs), 2 ** (scheme.bits - 1))
    zeros = middle if scheme.sym else rng.integers(0, 2**scheme.bits, (groups, outputs))
    signs = rng.choice((-1, 1), (groups, outputs)) if scheme.sym else 1
    scales = torch.tensor(signs * rng.uniform(0.5, 1.5, (groups, outputs)) / np.sqrt(inputs) / 2 ** (scheme.bits - 2)).to(scheme.scales)
    g_idx = np.arange(inputs) // size
    if scheme.desc_act:
        g_idx = rng.permutation(g_idx)
    tensors = {
        "qweight": torch.from_numpy(stream(codes, scheme.bits)),
        "qzeros": torch.from_numpy(stored_zeros(zeros, scheme.bits, scheme.zeros)),
        "scales": scales,
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    if not scheme.g_idx:
        del tensors["g_idx"]
    return Linear(tensors, (scales.double().numpy()[g_idx] * (codes - zeros[g_idx])).T)


def quantization_config(scheme: Scheme, **more: Any) -> dict[str, Any]:
    """What a checkpoint of this scheme says of itself."""
    meta = {"quantizer": ["gptqmodel:7.7.0"]} if scheme.zeros == "v1_carry" else {}
    return {
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.sym,
        "desc_act": scheme.desc_act,
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if scheme.zeros == "v2" else "gptq",
        **({"meta": meta} if meta else {}),
        **more,
    }


def write(directory: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """config.json and one safetensors file, or several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file({n: tensors[n].contiguous() for n in names}, directory / "model.safetensors", {"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        save_file({n: tensors[n].contiguous() for n in names[i::shards]}, directory / file, {"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
