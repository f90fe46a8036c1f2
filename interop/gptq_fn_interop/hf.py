"""transformers models to and from (params, spec), held in memory on both sides."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

try:
    from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"gptq_fn.interop needs {error.name}, which is not installed: pip install 'gptq-fn[hf]'. The command gptq-fn does without.",
        name=error.name,
    ) from None

from gptq_fn import ModelSpec, Quantized, spec_from_config
from gptq_fn_interop.in_memory import arrays_of
from gptq_fn_interop.params import read_params
from gptq_fn_interop.stream import model_config, save_gptq
from gptq_fn_interop.tensors import to_torch


def from_hf(model: PreTrainedModel) -> tuple[dict[str, Any], ModelSpec]:
    """The parameters, as copies, and the spec of a causal language model; QuantLinears become QuantizedLinears.

    Raises ValueError for architectures and config keys that `spec_from_config` refuses, and TypeError for what is no model.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"from_hf takes a transformers model, not a {type(model).__name__}; load_gptq reads directories, of float models too."
        )
    config = json.loads(model.config.to_json_string())
    described = config.pop("quantization_config", None)
    spec = spec_from_config(config)
    return read_params(spec, arrays_of(model), described), spec


def whole_model(directory: str | Path, dtype: str) -> PreTrainedModel:
    """The causal language model in a directory, in this dtype or, for "auto", in the checkpoint's, by transformers' own code.

    Raises ValueError where the files do not hold all of it, for transformers makes random tensors in place of those that are not there.
    """
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, trust_remote_code=False, output_loading_info=True)
    except RuntimeError as error:  # shapes that differ
        raise ValueError(f"{directory} is not what its config.json describes: {' '.join(str(error).split())}") from error
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{directory} lacks {len(missing)} tensors of the {type(model).__name__} that its config.json describes, for example "
            f"{missing[0]}: the files are incomplete, or those of another model."
        )
    return model.eval()


def to_hf(quantized: Quantized, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A transformers model on the CPU whose quantized linears are QuantLinears.

    It is loaded from a temporary directory. `config` may be left out where the spec comes from `spec_from_config`.
    Raises ValueError where it is needed, or where it describes a model with other tensors.
    """
    described = model_config(quantized.spec) if config is None else json.loads(config.to_json_string())
    with TemporaryDirectory() as parent:
        directory = Path(parent) / "model"
        save_gptq(quantized, directory, config=described)
        dtype = to_torch(quantized.params["top"]["embed"]["weight"][:0]).dtype
        loaded: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, output_loading_info=True)
    model, found = loaded
    if found["missing_keys"] or found["unexpected_keys"] or found["mismatched_keys"]:
        raise ValueError(
            f"The spec and {type(model.config).__name__} describe different models: {sorted(found['missing_keys'])[:3]} are not among "
            f"the parameters, {sorted(found['unexpected_keys'])[:3]} not in the model."
        )
    return model.eval()
