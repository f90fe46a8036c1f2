"""Where the quantized linears of a checkpoint go in a model of transformers, as told by the headers of its files."""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gptq_fn_kernels.problem import BITS
from gptq_fn_kernels.words import words_of
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D

from gptq_fn_interop.experts import inputs_of, is_fused
from gptq_fn_interop.tensor_files import headers


def stored_tensors(files: Iterable[str], directory: str) -> dict[str, torch.Tensor]:
    """The tensors of safetensors files without their values, on the meta device. An index may not lead out of `directory`."""
    found = {}
    for path in files:
        if not str(path).endswith(".safetensors"):
            raise ValueError(f"{path} is not a safetensors file; quantized checkpoints are read from those only.")
        if os.path.isdir(directory) and not Path(os.path.normpath(path)).is_relative_to(os.path.normpath(directory)):
            raise ValueError(f"The index of {directory} points to {path}, which is no file of its directory; it is damaged or malicious.")
        for name, (_, shape, dtype, _) in headers(Path(path)).items():
            if name.endswith((".weight", ".bias")) and "int" in dtype:
                raise ValueError(f"{name} holds {dtype}, but floating numbers are expected; {path} is damaged or of another format.")
            kind = getattr(torch, dtype, None)  # there are more in safetensors, but none that GPTQ uses
            if isinstance(kind, torch.dtype):
                found[name] = torch.empty(shape, dtype=kind, device="meta")
    return found


@dataclass(frozen=True)
class Place:
    """Where a quantized linear goes: in the place of a module, or as the linear `leaf` of one of the module's experts."""

    module: str
    inputs: int
    outputs: int | None = None
    expert: int | None = None
    leaf: str = ""

    @property
    def path(self) -> str:
        """The name that the linear will have in the model."""
        return self.module if self.expert is None else f"{self.module}.{self.expert}.{self.leaf}"


def place_of(model: Any, modules: Mapping[str, nn.Module], stored_as: str) -> Place | None:
    """Where the linear that the files call `stored_as` goes; None for a head that this model does not have.

    Files may lack or have the prefix of the model under a head, and transformers renames what it loads. Raises
    ValueError for a linear that the model does not have, and for modules that are none.
    """
    renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]
    renamed = rename_source_key(f"{stored_as}.weight", renamings, [])[0].removesuffix(".weight")
    prefix = f"{model.base_model_prefix}."
    for name in (stored_as, renamed, prefix + renamed, renamed.removeprefix(prefix)):
        if name in modules:
            return Place(name, *_shape_of(modules[name], stored_as))
        parts = name.rsplit(".", 2)
        if len(parts) == 3 and parts[1].isdigit() and parts[0] in modules and is_fused(modules[parts[0]]):
            return Place(parts[0], inputs_of(modules[parts[0]], parts[2]), None, int(parts[1]), parts[2])
    if "." not in stored_as:
        return None
    raise ValueError(f"The checkpoint holds a quantized {stored_as}, but {type(model).__name__} has no such linear.")


def require_blocks(model: Any, names: Iterable[str]) -> None:
    """Raise ValueError where the files, which hold tensors of these names, lack a block that the model has.

    transformers would fill such a block with random numbers, and only warn.
    """
    for path, blocks in model.named_modules():
        if isinstance(blocks, nn.ModuleList):
            number = re.compile(rf"(?:^|[.]){re.escape(path.rpartition('.')[2])}[.](\d+)[.]")
            there = {int(match[1]) for name in names if (match := number.search(name))}
            own = {i for i, block in enumerate(blocks) for key, _ in block.named_parameters() if not _tied(model, f"{path}.{i}.{key}")}
            if there and (absent := sorted(own - there)):
                raise ValueError(
                    f"config.json promises {len(blocks)} {path}, but the files hold nothing of number {absent[0]}; it is of another model."
                )


def _tied(model: Any, name: str) -> bool:
    return name in model.all_tied_weights_keys


def _shape_of(module: nn.Module, name: str) -> tuple[int, int]:
    """Inputs and outputs of a linear of the model, which the files call `name`."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    raise ValueError(
        f"The checkpoint holds a quantized {name}, but that module is of type {type(module).__name__}; only linear layers can be."
    )


def bits_of(qweight: torch.Tensor, inputs: int, scheme: Mapping[str, Any]) -> int:
    """From the shape; a narrow layer leaves several possibilities, and then what the config says is tried first."""
    for bits in (scheme["bits"], *BITS):
        if words_of(inputs, bits) == len(qweight):
            return bits
    raise ValueError(f"A qweight of {len(qweight)} rows does not hold {inputs} inputs at 2, 3, 4 or 8 bits.")
