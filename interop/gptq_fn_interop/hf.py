"""transformers models to and from (params, spec), without a directory between them."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from gptq_fn import ModelSpec, Quantized, spec_from_config
from gptq_fn_interop.gptq_format import quantization_config, zeros_version
from gptq_fn_interop.params import read_params, write_params
from gptq_fn_interop.quantizer import GPTQConfig, GptqQuantizer
from gptq_fn_interop.stream import model_config
from gptq_fn_interop.tensors import to_numpy, to_torch


def from_hf(model: PreTrainedModel) -> tuple[dict[str, Any], ModelSpec]:
    """The parameters, as copies, and the spec of a causal language model; QuantLinears become QuantizedLinears.

    Raises ValueError for architectures and config keys that `spec_from_config` refuses.
    """
    config = json.loads(model.config.to_json_string())
    described = config.pop("quantization_config", None)
    spec = spec_from_config(config)
    return read_params(spec, _Arrays(model.state_dict()), described), spec


def to_hf(quantized: Quantized, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A transformers model on the CPU whose quantized linears are QuantLinears.

    `config` may be left out where the spec comes from `spec_from_config`. Raises ValueError where it is needed, or where
    it describes a model with other tensors.
    """
    spec, recipe = quantized.spec, quantized.report.config
    if config is None:
        origin = model_config(spec)
        config = type(AutoConfig.for_model(origin["model_type"])).from_dict(origin)
    tensors = {name: to_torch(array) for name, array in write_params(spec, quantized.params, zeros_version(recipe))}
    quantizer = GptqQuantizer(GPTQConfig.from_dict(quantization_config(quantized.report)), pre_quantized=True)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=tensors[f"{dict(spec.tensors)['embed']}.weight"].dtype)
    quantizer.preprocess_model(model, tensors=tensors)
    found = model.load_state_dict(tensors, strict=False, assign=True)
    missing = set(found.missing_keys) - set(model.all_tied_weights_keys)
    if missing or found.unexpected_keys:
        raise ValueError(
            f"The spec and {type(config).__name__} describe different models: {sorted(missing)[:3]} are not among the parameters, "
            f"{sorted(found.unexpected_keys)[:3]} not in the model."
        )
    model.tie_weights()
    model.hf_quantizer = quantizer
    quantizer.postprocess_model(model)
    return model.eval()


class _Arrays(Mapping[str, np.ndarray]):
    """A state dict as arrays, each copied when it is asked for."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        return to_numpy(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
