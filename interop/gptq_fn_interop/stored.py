"""What a model's tensors are called on disk: transformers renames, splits and joins some when it saves."""

from collections.abc import Iterable

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def reverted(model: nn.Module, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as save_pretrained would write them; those of a plain torch module as they are."""
    return revert_weight_conversion(model, tensors) if isinstance(model, PreTrainedModel) else tensors


def stored_names(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """What those that are linears are called on disk; None for one whose weight is not stored as it is but split, joined or permuted."""
    found = {f"{name}.weight" for name in names}
    weights = {n: torch.empty_like(p, device="meta") for n, p in model.named_parameters(remove_duplicate=False) if n in found}
    on_disk = reverted(model, weights)
    names_of = {id(tensor): key.removesuffix(".weight") for key, tensor in on_disk.items() if key.endswith(".weight")}
    return {name.removesuffix(".weight"): names_of.get(id(tensor)) for name, tensor in weights.items()}
