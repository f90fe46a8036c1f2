"""Quantizing a torch model in memory, in place: along its spec where a row of the table describes it, along a trace where none does."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from gptq_fn import LinearReport, ModelSpec, QuantConfig, Report, Samples, check, head_plan, preset, spec_from_config
from gptq_fn.check import check_tokens
from gptq_fn_interop.gptq_format import TENSORS
from gptq_fn_interop.params import dense_shapes
from gptq_fn_interop.stored import reverted
from gptq_fn_interop.stream import Progress, quantize_tensors, unstorable
from gptq_fn_interop.tensors import to_numpy, to_torch
from gptq_fn_interop.torch_checkpoint import adopt, own_tensors
from gptq_fn_interop.traced import quantize_traced


def quantize_model(model: nn.Module, samples: Samples, config: QuantConfig | None = None, *, progress: Progress | None = None) -> Report:
    """GPTQ on a torch model in memory: its linears become QuantLinears, in place and after all of them are computed.

    A transformers model that a row of the table describes runs in JAX, one block at a time, any other model through its
    own forward (`quantize_traced`). `samples` are token ids [samples, time], or samples of any lengths. What was quantized
    of a transformers model saves, loads and dequantizes as a quantized one. Raises ValueError as `quantize_checkpoint`
    and `quantize_traced` do, and then the model is as it was. What accelerate has spread over devices is quantized on
    the CPU and spread again. `progress` is called with the blocks done and their number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model takes a torch model, not a {type(model).__name__}; quantize_checkpoint takes directories.")
    config = config or preset("default")
    with together(model):
        spec = described(model)
        if spec is None:
            return quantize_traced(model, samples, config, progress=progress)
        assert isinstance(model, PreTrainedModel)
        return _along(spec, model, samples, config, progress)


def _along(spec: ModelSpec, model: PreTrainedModel, samples: Samples, config: QuantConfig, progress: Progress | None) -> Report:
    tensors = arrays_of(model)
    head_plan(spec, config)
    if problems := [*unstorable(spec, dense_shapes(tensors.shapes, spec), config)]:
        raise ValueError(f"This {type(model).__name__} cannot be quantized: {' '.join(problems[:5])}")
    check_tokens(samples, tensors.shapes[spec.embedding][0])
    packed: dict[str, np.ndarray] = {}

    def write(i: int | None, quantized: Iterator[tuple[str, np.ndarray]], reports: tuple[LinearReport, ...]) -> None:
        packed.update((name, array) for name, array in quantized if name.rpartition(".")[2] in TENSORS)

    quantized, _, report = quantize_tensors(spec, tensors, samples, config, write, progress)
    adopt(model, {name: to_torch(array).to(tensors.device_of(name, model.device)) for name, array in packed.items()}, report)
    model.config.tie_word_embeddings = quantized.tied
    return report


@contextmanager
def together(model: Any) -> Iterator[None]:
    """All weights on the CPU while accelerate has spread them over devices, and afterwards the quantized ones spread like them."""
    places = getattr(model, "hf_device_map", {})
    if len(set(places.values())) < 2:
        yield
        return
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    model.to("cpu")
    try:
        yield
    finally:
        dispatch_model(model, places, skip_keys=model._skip_keys_device_placement)


def described(model: nn.Module) -> ModelSpec | None:
    """The spec of a float transformers model, or None where no row of the table describes it to its last tensor."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        spec = spec_from_config(json.loads(model.config.to_json_string()))
    except ValueError:
        return None
    return None if check(spec, dense_shapes(arrays_of(model).shapes, spec)) else spec


def arrays_of(model: PreTrainedModel) -> "Arrays":
    """A model's tensors under the names that they have on disk, each copied when it is asked for."""
    return Arrays(reverted(model, own_tensors(model)))


class Arrays(Mapping[str, np.ndarray]):
    """Tensors of torch as arrays, each copied when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        """Nothing is copied yet."""
        self._tensors = tensors
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        """A copy of the tensor."""
        return to_numpy(self._tensors[name])

    def device_of(self, leaf: str, usual: torch.device) -> torch.device:
        """Where the weight is that a quantized tensor, as in "lm_head.qweight", stands for; `usual` if it is part of another."""
        weight = self._tensors.get(f"{leaf.rpartition('.')[0]}.weight")
        return usual if weight is None else weight.device

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
