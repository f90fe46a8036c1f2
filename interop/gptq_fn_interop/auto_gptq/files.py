"""The files of AutoGPTQ's quantized models: any base name, saved into directories that may hold an earlier one."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gptq_fn_interop.auto_gptq.config import FILE, BaseQuantizeConfig, description
from gptq_fn_interop.checkpoint import read_json
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.shards import write_json

WEIGHTS, INDEX = ".safetensors", ".safetensors.index.json"
"""How the name of a model's one file ends, and that of the index of several."""


def load(directory: Path, base: str | None, given: BaseQuantizeConfig | None, **options: Any) -> PreTrainedModel:
    """The quantized model in a directory, whatever its file is called and wherever its quantization is described.

    `base` is the file's name without .safetensors; `given` serves where the directory says nothing. `options` are for
    transformers' from_pretrained. Raises ValueError or FileNotFoundError in a sentence.
    """
    described = description(directory) or ({} if given is None else given.to_dict())
    if not described:
        raise ValueError(
            f"Neither {FILE} nor config.json in {directory} tells of a quantization. Load a float model with from_pretrained; "
            "for a quantized one pass quantize_config=BaseQuantizeConfig(...)."
        )
    BaseQuantizeConfig.from_dict(described)  # refuses other methods and formats
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    about_files = ("model_name_or_path", "model_file_base_name")  # not of the quantization
    config.quantization_config = {"quant_method": "gptq", **{key: value for key, value in described.items() if key not in about_files}}
    config.transformers_weights = _weights(directory, base, described)  # the name that transformers looks for
    model = AutoModelForCausalLM.from_pretrained(directory, config=config, **options)
    delattr(model.config, "transformers_weights")  # saved models have usual names
    if not any(isinstance(module, QuantLinear) for module in model.modules()):
        raise ValueError(f"{directory} holds no quantized linear; load a float model with from_pretrained.")
    return model.eval()


def _weights(directory: Path, base: str | None, described: Mapping[str, Any]) -> str:
    """The name of the weights' file, or of the index of several."""
    usual = [described.get("model_file_base_name"), "model", f"gptq_model-{described.get('bits')}bit-{described.get('group_size')}g"]
    for stem in [base.removesuffix(WEIGHTS)] if base else filter(None, usual):
        for ending in (WEIGHTS, INDEX):
            if (directory / f"{stem}{ending}").is_file():
                return f"{stem}{ending}"
    there = sorted(path.name for path in directory.glob(f"*{WEIGHTS}"))
    if len(there) == 1 and not base:
        return there[0]
    told = f"has {', '.join(there)}; name one of them" if there else "has no safetensors file, and pickled ones (.bin, .pt) are never read"
    raise FileNotFoundError(f"Which file to load is not clear from model_basename={base!r}: {directory} {told}.")


def save(model: PreTrainedModel, directory: Path, base: str = "model", metadata: Mapping[Any, Any] | None = None, **options: Any) -> None:
    """Write a quantized model into a directory, in place of one that is there already.

    The file is called `base`.safetensors, and `metadata` is kept in its header. `options` are for transformers'
    save_pretrained. A run that fails changes nothing there. Raises FileExistsError where another kind of model is.
    """
    if Path(base).name != base:
        raise ValueError(f"model_file_base_name is a file's name without .safetensors, not the path {base!r}.")
    with _replacing(directory, base) as aside:
        model.save_pretrained(aside, **options)
        for path in aside.glob(f"*{WEIGHTS}") if metadata else ():
            labelled = path.with_suffix(".labelled")
            save_file(load_file(path), labelled, {"format": "pt", **{str(key): str(value) for key, value in (metadata or {}).items()}})
            os.replace(labelled, path)
        if base != "model":
            _rename(aside, base)


def _rename(directory: Path, base: str) -> None:
    """Give the files of weights another base name, and both configs the entries by which they are found."""
    index = directory / f"{base}{INDEX}"
    for path in [*directory.glob(f"model*{WEIGHTS}"), *directory.glob(f"model{INDEX}")]:
        path.rename(directory / (base + path.name.removeprefix("model")))
    if index.exists():
        listed = read_json(index)
        places = {name: base + file.removeprefix("model") for name, file in listed["weight_map"].items()}
        write_json(index, {**listed, "weight_map": places})
    loaded_as = index.name if index.exists() else f"{base}{WEIGHTS}"
    for file, entry in (("config.json", {"transformers_weights": loaded_as}), (FILE, {"model_file_base_name": base})):
        write_json(directory / file, {**read_json(directory / file), **entry})


@contextmanager
def _replacing(directory: Path, base: str) -> Iterator[Path]:
    """A new directory whose files move to `directory` when the block ends well; weights of a model that was there go."""
    if directory.is_file() or ((directory / "config.json").exists() and not description(directory)):
        raise FileExistsError(
            f"{directory} is a file or holds a model that is not quantized, which would be lost; choose another directory."
        )
    directory.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{directory.name}.", dir=directory.parent) as aside:
        yield Path(aside)
        old = {"model", base, Path(description(directory).get("model_file_base_name") or "model").name}
        patterns = [f"{stem}{ending}" for stem in old for ending in (WEIGHTS, INDEX, f"-?????-of-?????{WEIGHTS}")]
        new = sorted(path.name for path in Path(aside).iterdir())
        directory.mkdir(exist_ok=True)
        for name in new:
            os.replace(Path(aside) / name, directory / name)
        for path in {path for pattern in patterns for path in directory.glob(pattern)}:
            if path.name not in new:
                path.unlink()
