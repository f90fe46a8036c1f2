"""A torch model some of whose linears were quantized: written as a checkpoint under the names of save_pretrained, or made so in place."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from gptq_fn import QuantConfig, QuantizedLinear, Report, Rule
from gptq_fn_interop.gptq_format import quantization_config, to_tensors, zeros_version
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.quantizer import GPTQConfig, GptqQuantizer
from gptq_fn_interop.report.run import write_report
from gptq_fn_interop.shards import assemble, write_parts
from gptq_fn_interop.stored import reverted
from gptq_fn_interop.stream import copy_companions, describe
from gptq_fn_interop.tensors import to_numpy, to_torch


def with_exceptions(report: Report, names: Iterable[str]) -> Report:
    """`report` with a rule for each of these linears that leaves it out: readers that go by the config have to be told."""
    config = report.config
    rules = tuple(Rule(f"{re.escape(name)}$") for name in names if config.resolve(name) is not None)
    return replace(report, config=replace(config, rules=(*rules, *config.rules)))


class ModelWriter:
    """Writes a model into a new directory, block by block, with quantized linears in place of some of its own."""

    def __init__(self, model: nn.Module, directory: Path, shard_bytes: int):
        """What is not quantized is written as the model holds it now; tied tensors once."""
        self._model, self._directory, self._limit = model, directory, shard_bytes
        self._rest, self._parts = own_tensors(model), list[Path]()
        if isinstance(model, PreTrainedModel):
            if model.can_generate() and model.generation_config is not None:
                model.generation_config.save_pretrained(directory)  # which refuses some: better now than after hours
            copy_companions(Path(model.name_or_path or "no such directory"), directory)

    def add(self, block: str, linears: Mapping[str, QuantizedLinear], stored: Mapping[str, str | None], config: QuantConfig) -> None:
        """Write the tensors of one block."""
        for name in linears:
            for leaf in ("weight", "bias"):
                self._rest.pop(f"{name}.{leaf}", None)
        packed = (
            (f"{stored[name]}.{leaf}", array) for name, q in linears.items() for leaf, array in to_tensors(q, zeros_version(config)).items()
        )
        self._write(chain(packed, self._taken([name for name in self._rest if name.startswith(f"{block}.")])))

    def close(self, report: Report, exact: Report, run: Mapping[str, Any]) -> None:
        """Write the tensors outside of the blocks and the files that describe them all; `exact` is what engines are told.

        `run` is what `describe_run` tells.
        """
        self._write(self._taken(list(self._rest)))
        assemble(self._parts, self._directory, self._limit)
        dtype = str(next(p.dtype for p in self._model.parameters() if p.is_floating_point())).removeprefix("torch.")
        own: dict[str, Any] = {"architectures": [type(self._model).__name__], "dtype": dtype}
        if isinstance(self._model, PreTrainedModel):
            own = {**json.loads(self._model.config.to_json_string()), **own}
        describe(self._directory, own, np.dtype(np.float32), exact)
        write_report(self._directory, report, run)

    def _write(self, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        self._parts += write_parts(self._directory, f"part-{len(self._parts)}", tensors, self._limit)

    def _taken(self, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
        """These tensors of the rest, as they are stored; they are no part of it any more."""
        for name, tensor in reverted(self._model, {name: self._rest.pop(name) for name in names}).items():
            yield name, to_numpy(tensor)


def layer(q: QuantizedLinear, config: QuantConfig, device: torch.device) -> QuantLinear:
    """A QuantLinear of the same weight and bias; `config` is that of the whole model."""
    zeros = zeros_version(config)
    tensors = {leaf: to_torch(array).to(device) for leaf, array in to_tensors(q, zeros).items()}
    return QuantLinear(tensors, q.bits, {"sym": zeros == "v1", "checkpoint_format": "gptq" if zeros == "v1" else "gptq_v2"})


def install(model: nn.Module, layers: Mapping[str, QuantLinear], exact: Report) -> None:
    """Put the layers in the places of the linears they were made of; a transformers model then saves and loads as quantized."""
    for name, linear in layers.items():
        model.set_submodule(name, linear)
    if isinstance(model, PreTrainedModel):
        adopt(model, {}, exact)


def adopt(model: PreTrainedModel, tensors: Mapping[str, torch.Tensor], report: Report) -> None:
    """Make the model what it would be if it had been loaded with these quantized tensors, under the names of its checkpoint."""
    quantizer: Any = GptqQuantizer(GPTQConfig.from_dict(quantization_config(report)), pre_quantized=True)
    quantizer.preprocess_model(model, tensors=tensors)
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)


def own_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without what is tied to another tensor of it or not to be saved; nothing is copied."""
    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if isinstance(model, PreTrainedModel):
        for name in model._keys_to_ignore_on_save or ():
            state.pop(name, None)
        return remove_tied_weights_from_state_dict(state, model)
    seen: set[Any] = set()
    places = {name: (t.data_ptr(), t.shape, t.stride()) for name, t in state.items()}
    return {name: t for name, t in state.items() if places[name] not in seen and not seen.add(places[name])}
