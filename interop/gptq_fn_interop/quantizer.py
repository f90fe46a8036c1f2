"""transformers' quantization method "gptq", served by this package: `from_pretrained` without optimum or gptqmodel.

`register` takes the method over. Whatever a checkpoint's config claims, the layers that are quantized and their bits
are read from the headers of its files; the config decides only what the tensors cannot tell. Float checkpoints are
quantized when they are loaded: see `on_load`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import transformers
from gptq_fn_kernels import BACKENDS, dequantize
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils import quantization_config

from gptq_fn_interop import on_load, request
from gptq_fn_interop.experts import Experts, fuse
from gptq_fn_interop.gptq_config import ANY_KERNEL, GPTQConfig, save_config
from gptq_fn_interop.gptq_format import TENSORS, regular_groups, scheme_of
from gptq_fn_interop.places import Place, bits_of, place_of, require_blocks, stored_tensors
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.tensors import to_torch


def register() -> None:
    """Make transformers load, make and save GPTQ checkpoints with this package.

    `register_quantizer` would refuse a name that is taken. transformers' GPTQConfig drops every key that it does not know,
    so from here on its name means the one that does not, which is a subclass.
    """
    AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig
    AUTO_QUANTIZER_MAPPING["gptq"] = GptqQuantizer
    for module in (transformers, quantization_config):
        vars(module)["GPTQConfig"] = GPTQConfig
    transformers.PreTrainedConfig.save_pretrained = save_config


class GptqQuantizer(HfQuantizer):
    """What `from_pretrained` calls before and after it loads the tensors of a GPTQ checkpoint."""

    quantization_config: GPTQConfig

    def __init__(self, quantization_config: Any, **kwargs: Any):
        """Raises ValueError for a backend that does not exist and, before quantizing, for what else cannot be done."""
        super().__init__(quantization_config, **kwargs)
        _require_known(quantization_config.backend)
        if not self.pre_quantized:
            request.read(quantization_config)  # before the weights are loaded, which takes a while
        self._absent_g_idx: dict[str, torch.Tensor] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError where weights that are to be quantized would be on a disk."""
        if not self.pre_quantized and isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "The device map puts weights on the disk, where they cannot be quantized. Give more memory with max_memory, pass "
                "device_map='cpu', or use `gptq-fn quantize SRC DST`, which holds one block in memory at a time."
            )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, tensors: Mapping[str, torch.Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Put a QuantLinear in the place of each linear whose qweight is in the files, or in `tensors`.

        Raises ValueError where there is no such linear, or its tensors do not fit.
        """
        if not self.pre_quantized:
            return
        if tensors is None:
            if checkpoint_files is None:
                raise ValueError("A quantized model is loaded from safetensors files, not from a state_dict; see gptq_fn.interop.to_hf.")
            tensors = stored_tensors(checkpoint_files, str(model.config.name_or_path))
        described = {key: value for key, value in self.quantization_config.to_dict().items() if value is not None}
        modules = dict(model.named_modules())
        experts: dict[str, dict[int, dict[str, nn.Module]]] = defaultdict(lambda: defaultdict(dict))
        for stored_as in (key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")):
            place = place_of(model, modules, stored_as)
            if place is None:
                continue
            mine = {leaf: tensors[f"{stored_as}.{leaf}"] for leaf in TENSORS if f"{stored_as}.{leaf}" in tensors}
            linear = self._linear(place, stored_as, mine, scheme_of(stored_as, described) or described)
            if place.expert is None:
                model.set_submodule(place.module, linear)
                model.all_tied_weights_keys.pop(f"{place.module}.weight", None)  # a quantized head is not the embedding
            else:
                experts[place.module][place.expert][place.leaf] = linear
        for name, linears in experts.items():
            try:
                model.set_submodule(name, Experts(modules[name], linears))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        if checkpoint_files is not None:
            require_blocks(model, tensors)
        # They are computed after loading, so they are not missing.
        model._keys_to_ignore_on_load_missing.update(f"^{re.escape(name)}\\.g_idx$" for name in self._absent_g_idx)

    def _linear(self, place: Place, stored_as: str, mine: dict[str, torch.Tensor], scheme: Mapping[str, Any]) -> QuantLinear:
        """The layer that takes these tensors."""
        if absent := {"qzeros", "scales"} - mine.keys():
            raise ValueError(f"{stored_as} has a qweight but no {' and '.join(sorted(absent))}; the checkpoint is incomplete.")
        if place.outputs not in (None, found := mine["scales"].shape[-1]):
            raise ValueError(f"{stored_as} has {found} outputs but the model's linear {place.outputs}; config.json is of another model.")
        if "g_idx" not in mine:
            g_idx = to_torch(regular_groups(stored_as, place.inputs, len(mine["scales"]), scheme))
            mine["g_idx"] = self._absent_g_idx[place.path] = g_idx
        backend = None if self.quantization_config.backend == "auto" else self.quantization_config.backend
        try:
            linear = QuantLinear(mine, bits_of(mine["qweight"], place.inputs, scheme), scheme, backend)
        except ValueError as error:
            raise ValueError(f"{stored_as}: {error}") from None
        linear.loading = True
        return linear

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if not self.pre_quantized:
            self.remove_quantization_config(model)  # it is a float model
            on_load.quantize(model, self.quantization_config)
            return model
        for name, linear in _quantized(model):
            linear.requires_grad_(False)  # the loader has made the floating ones trainable
            if name in self._absent_g_idx:  # what a missing tensor holds now is uninitialized memory
                linear.g_idx = self._absent_g_idx[name].to(linear.qweight.device)
            linear.loading = False
            _require_sound(name, linear)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        wanted: torch.dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype  # save_pretrained leaves a name
        with torch.device("meta"):
            dense = type(model)(model.config)  # knows which layers were linears and which Conv1D
        fused = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
        for name, experts in fused:
            linears = {(n, role): linear for n in range(len(experts._modules)) for role, linear in experts.parts(n).items()}
            into = dense.get_submodule(name)
            fuse(experts, into, {key: dequantize(linear.packed, wanted) for key, linear in linears.items()})
            model.set_submodule(name, into)
        for name, linear in _quantized(model):
            layer: Any = dense.get_submodule(name)
            weight = dequantize(linear.packed, wanted)
            layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().to(wanted))
            layer.weight = nn.Parameter((weight.T if isinstance(layer, Conv1D) else weight).contiguous())
            model.set_submodule(name, layer)
        return model

    def is_serializable(self) -> Any:
        """Whether `save_pretrained` works; the tensors are saved as they were loaded."""
        return True

    @property
    def is_trainable(self) -> Any:
        """Whether adapters can be trained on top; the quantized layers themselves are frozen."""
        return True

    @property
    def is_compileable(self) -> Any:
        """Whether `generate` may compile the model when its cache is static: quantized layers have no graph breaks."""
        return True


def _require_known(backend: str | None) -> None:
    """Raise ValueError for a name that is no backend's. Whether one serves is known when a layer meets its activations."""
    names = [known.name for known in BACKENDS]
    if backend not in (*ANY_KERNEL, *names):
        raise ValueError(f"There is no backend {backend!r}; there are {', '.join(names)}. `gptq-fn kernels` tells what each serves.")


def _quantized(model: nn.Module) -> list[tuple[str, QuantLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def _require_sound(name: str, linear: QuantLinear) -> None:
    """Raise ValueError where a loaded layer holds values that would give garbage; what lies on a disk is not looked at."""
    if not linear.g_idx.is_meta:
        first, last = int(linear.g_idx.min()), int(linear.g_idx.max())
        if first < 0 or last >= linear.groups:
            raise ValueError(
                f"{name}: g_idx reaches from {first} to {last} but there are {linear.groups} groups; the checkpoint is damaged."
            )
    if not linear.scales.is_meta and not bool(torch.isfinite(linear.scales).all()):
        raise ValueError(f"{name}: some scales are infinite or NaN; the file is damaged.")
