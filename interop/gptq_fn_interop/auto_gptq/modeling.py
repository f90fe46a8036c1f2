"""AutoGPTQ's model classes: a transformers model with the methods that quantize, save and load it."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gptq_fn import QuantConfig, Report
from gptq_fn_interop.auto_gptq import files
from gptq_fn_interop.auto_gptq.config import BaseQuantizeConfig
from gptq_fn_interop.auto_gptq.examples import samples
from gptq_fn_interop.console import progress
from gptq_fn_interop.hub import local
from gptq_fn_interop.in_memory import quantize_model, together
from gptq_fn_interop.stream import Progress
from gptq_fn_interop.trace import trace
from gptq_fn_interop.traced import quantize_traced

# fmt: off
SWITCHES = frozenset({
    "low_cpu_mem_usage", "use_triton", "use_tritonv2", "use_marlin", "use_qigen", "use_cuda_fp16", "inject_fused_attention",
    "inject_fused_mlp", "warmup_triton", "trainable", "disable_exllama", "disable_exllamav2", "resume_download",
})
# fmt: on
"""Options that say how AutoGPTQ should load and multiply. They are taken and change nothing: the first kernel that serves is used."""

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


class BaseGPTQForCausalLM(nn.Module):
    """A causal language model of transformers, quantized or to be; whatever is not defined here is the model's own.

    It serves every model type that transformers has. A subclass that names layers_block_name (and inside_layer_modules,
    outside_layer_modules, layer_type) has its models quantized through their own forward, along these names.
    """

    layer_type: ClassVar[str | Sequence[str] | None] = None
    layers_block_name: ClassVar[str | None] = None
    outside_layer_modules: ClassVar[Sequence[str] | None] = None
    inside_layer_modules: ClassVar[Sequence[Sequence[str]] | None] = None

    def __init__(self, model: PreTrainedModel, quantized: bool, quantize_config: BaseQuantizeConfig):
        """Around a model that is in memory."""
        super().__init__()
        self.model = model
        self.quantized = quantized
        self.quantize_config = quantize_config
        self._directory: Path | None = None  # where it was last saved to or loaded from

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig,
        max_memory: Mapping[int | str, int | str] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        **model_init_kwargs: Any,
    ) -> Self:
        """A float model to quantize, in the CPU's memory, or spread over devices by accelerate where there is a `max_memory`.

        It has the dtype of its checkpoint unless `torch_dtype` or `dtype` says another. Further options are those of
        transformers' from_pretrained. Raises ValueError for a model that is quantized, and for trust_remote_code=True.
        """
        options = _options(trust_remote_code, torch_dtype, max_memory, model_init_kwargs)
        model = AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **options)
        if hasattr(model.config, "quantization_config"):
            raise ValueError(f"{pretrained_model_name_or_path} is quantized already; load it with from_quantized.")
        return cls(model.eval(), False, quantize_config)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: str | Mapping[str, int | str] | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        device: str | int | torch.device | None = None,
        *,
        torch_dtype: torch.dtype | str | None = None,
        quantize_config: BaseQuantizeConfig | None = None,
        model_basename: str | None = None,
        trust_remote_code: bool = False,
        **kwargs: Any,
    ) -> Self:
        """A quantized model from a directory or the hub: ours, AutoGPTQ's (whatever its file is called), GPTQModel's.

        It is loaded to `device`, or as `device_map` and `max_memory` tell accelerate; without any of them, over the GPUs
        if there are some. `quantize_config` serves where the checkpoint says nothing of itself. AutoGPTQ's switches for
        kernels are taken and change nothing; other options are those of transformers' from_pretrained. Raises ValueError
        or FileNotFoundError for what is not quantized, is pickled, or wants code of its own to run.
        """
        options = _options(trust_remote_code, torch_dtype, max_memory, kwargs)
        if device_map is not None or (device is None and max_memory is None and torch.cuda.is_available()):
            options["device_map"] = device_map or "auto"
        directory = local(model_name_or_path, **{key: options.pop(key) for key in HUB_OPTIONS if key in options})
        model = files.load(directory, model_basename, quantize_config, **options)
        found = cls(model, True, BaseQuantizeConfig.from_dict(model.config.quantization_config.to_dict()))
        found._directory = directory
        return found if device is None or "device_map" in options else found.to(device)

    def quantize(
        self,
        examples: Iterable[Mapping[str, Any]],
        batch_size: int = 1,
        use_triton: bool = False,
        use_cuda_fp16: bool = True,
        autotune_warmup_after_quantized: bool = False,
        cache_examples_on_gpu: bool = True,
    ) -> Report:
        """Quantize the model in place, and report on each linear.

        `examples` are what a tokenizer returns for each text; what their masks leave out is not seen, and lengths may
        differ. The other options are AutoGPTQ's and change nothing. Raises ValueError where the model is quantized
        already, or examples do not serve.
        """
        if self.quantized:
            raise ValueError("This model is quantized already; to quantize it in another way, load the float model with from_pretrained.")
        tokens, config = samples(examples), self.quantize_config.quant_config()
        with progress("Quantizing blocks") as advance:
            report = self._solve(tokens, config, advance)
        self.quantized = True
        if report.rounded:
            warnings.warn(
                f"{len(report.rounded)} of {len(report.linears)} linears saw fewer than {config.min_rows} tokens and were rounded to "
                "nearest; give more examples.",
                stacklevel=2,
            )
        return report

    def _solve(self, tokens: Sequence[np.ndarray], config: QuantConfig, progress: Progress) -> Report:
        if self.layers_block_name is None:
            return quantize_model(self.model, tokens, config, progress=progress)
        with together(self.model):
            traced = trace(self.model, max(tokens, key=len)[None, :2048], definition=type(self))
            return quantize_traced(self.model, tokens, config, traced=traced, progress=progress)

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[Any, Any] | None = None,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Write the quantized model into a directory, which transformers and engines load; an earlier one there is replaced.

        It is one file called model.safetensors, or model_file_base_name of the quantize config, or shards of up to
        `max_shard_size` with an index. Raises ValueError where the model is not quantized yet, or for use_safetensors=False.
        """
        _refuse_pickle(use_safetensors)
        if not self.quantized:
            raise ValueError("This model is not quantized yet; call quantize first, or save a float model with model.save_pretrained.")
        options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        base = self.quantize_config.model_file_base_name or "model"
        files.save(self.model, Path(save_dir), base, safetensors_metadata, **options)
        self._directory = Path(save_dir)

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """The same as save_quantized."""
        self.save_quantized(save_dir, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        save_dir: str | Path | None = None,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[Any, Any] | None = None,
        commit_message: str = "Upload of a model quantized with gptq_fn",
        use_auth_token: bool | str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Upload the quantized model, and return the commit's address. The repository is made if it is not there.

        With a `save_dir` the model is saved there first; else the directory that it was last saved to is uploaded, with
        all its files, or a copy is made for the purpose. Raises as save_quantized and huggingface_hub do.
        """
        token = use_auth_token if token is None else token
        with TemporaryDirectory() as aside:
            directory = Path(save_dir or self._directory or aside)
            if save_dir is not None or self._directory is None:
                self.save_quantized(directory, use_safetensors, safetensors_metadata, max_shard_size)
            repo = HfApi().create_repo(repo_id, token=token, private=private, exist_ok=True)
            return HfApi().upload_folder(
                repo_id=repo.repo_id, folder_path=directory, commit_message=commit_message, token=token, create_pr=create_pr
            )

    @property
    def hf_device_map(self) -> dict[str, Any] | None:
        """Where accelerate has put the parts of the model; None where it has not."""
        return getattr(self.model, "hf_device_map", None)

    def to(self, device: Any) -> Self:  # type: ignore[override]
        """The model on another device; quantized models keep their dtype."""
        self.model.to(device)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own."""
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class AutoGPTQForCausalLM:
    """The same for a model of any type: `from_pretrained` to quantize one, `from_quantized` to use one."""

    from_pretrained = BaseGPTQForCausalLM.from_pretrained
    from_quantized = BaseGPTQForCausalLM.from_quantized

    def __init__(self) -> None:
        """Raises OSError, as AutoGPTQ's does."""
        raise OSError(
            "AutoGPTQForCausalLM is not made by calling it: use AutoGPTQForCausalLM.from_pretrained to quantize a model, "
            "AutoGPTQForCausalLM.from_quantized to load a quantized one."
        )


def _options(
    trust_remote_code: bool, torch_dtype: Any, max_memory: Mapping[int | str, int | str] | None, others: Mapping[str, Any]
) -> dict[str, Any]:
    """AutoGPTQ's options as transformers' from_pretrained takes them."""
    if trust_remote_code:
        raise ValueError(
            "Code that comes with a checkpoint is never run, so trust_remote_code=True is refused. Leave it out; a model type that "
            "transformers does not have can be described by hand: see docs/own_architecture.md."
        )
    options = {"dtype": "auto" if torch_dtype is None else torch_dtype, "use_safetensors": True, "trust_remote_code": False}
    options |= {key: value for key, value in others.items() if key not in SWITCHES}
    _refuse_pickle(options["use_safetensors"])
    if "use_auth_token" in options:
        options.setdefault("token", options.pop("use_auth_token"))
    # a limit for a device that is not there limits nothing
    devices = torch.accelerator.device_count()
    there = {place: limit for place, limit in (max_memory or {}).items() if isinstance(place, str) or place < devices}
    return {"device_map": "auto", **options, "max_memory": there} if there else options


def _refuse_pickle(use_safetensors: bool) -> None:
    if not use_safetensors:
        raise ValueError("Pickled weights (.bin, .pt) are neither read nor written, since loading one can run code; use safetensors.")
