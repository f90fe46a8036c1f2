"""transformers' GPTQConfig, with every key kept and the order of rules, too."""

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from gptq_fn_kernels.problem import BITS
from transformers import PreTrainedConfig

from gptq_fn_interop.shards import write_json

FORMATS = ("gptq", "gptq_v2")
ANY_KERNEL = ("auto", "auto_trainable", None)
"""Backends of transformers that leave the choice open. Gradients pass through every kernel here."""


class GPTQConfig(transformers.GPTQConfig):
    """transformers' GPTQConfig, which keeps every key: a checkpoint's own when its model is saved, a user's for quantizing.

    The name is not free: transformers compares it with that of the config a user passes to `from_pretrained`.
    """

    described: dict[str, Any]
    """What was given, without defaults."""

    def __init__(self, bits: int, *positional: Any, **named: Any):
        """As transformers' own; any more keys (dynamic, lm_head, static_groups, use_exllama, ...) become attributes too."""
        super().__init__(bits, *positional, **named)
        for key, value in named.items():
            self.__dict__.setdefault(key, value)
        self.described = {"quant_method": "gptq", "bits": bits, **dict(zip(_POSITIONAL, positional, strict=False)), **named}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config of a checkpoint. A backend named there is a kernel of some other package, so it is not asked for."""
        found: Any = super().from_dict(config_dict, return_unused_kwargs, **kwargs)
        (found[0] if return_unused_kwargs else found).backend = "auto"
        return found

    def post_init(self) -> None:
        """Refuse what cannot be read; transformers' own checks need optimum for some keys."""
        self.backend = "auto" if self.backend in ANY_KERNEL else self.backend
        if self.bits not in BITS:
            raise ValueError(f"GPTQ checkpoints with codes of 2, 3, 4 or 8 bits can be read, but this one has {self.bits}.")
        if self.format not in FORMATS:
            raise ValueError(
                f"GPTQ checkpoints of format {' and '.join(FORMATS)} can be read, but this one is {self.format!r}, which is packed for a "
                "particular kernel. Take the checkpoint that it was converted from."
            )

    def to_dict(self) -> dict[str, Any]:
        """The object for config.json. A tokenizer is told by its name."""
        described = {key: value for key, value in self.described.items() if key != "tokenizer"}
        if (tokenizer := self.described.get("tokenizer")) is not None:
            described["tokenizer"] = tokenizer if isinstance(tokenizer, str) else str(getattr(tokenizer, "name_or_path", ""))
        return {key: _in_order(value) if key == "dynamic" else value for key, value in copy.deepcopy(described).items()}


_POSITIONAL = tuple(inspect.signature(transformers.GPTQConfig).parameters)[1:]
"""What transformers takes by position after the bits."""

_save_pretrained = PreTrainedConfig.save_pretrained


def save_config(self: PreTrainedConfig, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
    """transformers' `PreTrainedConfig.save_pretrained`; beside the config.json of a GPTQ model it leaves quantize_config.json.

    It is called by save_pretrained and push_to_hub of every model, with the directory, before anything is uploaded.
    """
    _save_pretrained(self, save_directory, push_to_hub, **kwargs)
    described = getattr(self, "quantization_config", None)
    if isinstance(described, GPTQConfig):
        write_json(Path(save_directory) / "quantize_config.json", described.to_dict())


def _in_order(rules: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if rules is None else {_Placed(pattern, i): rule for i, (pattern, rule) in enumerate(rules.items())}


class _Placed(str):
    """A key that sorts by its place. transformers writes config.json with sorted keys, but of rules the first match wins."""

    __slots__ = ("place",)

    def __new__(cls, text: str, place: int = 0) -> "_Placed":
        self = super().__new__(cls, text)
        self.place = place
        return self

    def __lt__(self, other: str) -> bool:
        return self.place < other.place if isinstance(other, _Placed) else super().__lt__(other)
