"""PEFT on models whose experts are linears of their own."""

from collections.abc import Callable
from functools import wraps
from importlib.util import find_spec
from inspect import signature
from typing import Any

from torch import nn

_TRANSLATIONS = "peft.utils.transformers_weight_conversion"


def keep_names(kind: type[nn.Module]) -> None:
    """Make PEFT, where it is installed, take names of linears as they are in every model that has a module of this kind.

    transformers 5 holds the experts of Mixtral, Qwen and others in fused parameters, so PEFT translates what a LoRA says
    of w1 or gate_proj, in its config and in its file, into those. A model with quantized experts has none of them: the
    translation would leave its experts out, and drop on loading what was trained and saved for them.
    """
    if find_spec("peft") is None or find_spec(_TRANSLATIONS) is None:
        return  # a PEFT before transformers 5 translates nothing
    from peft.utils import transformers_weight_conversion as translations

    for name in ("convert_peft_config_for_transformers", "convert_peft_adapter_state_dict_for_transformers"):
        translate = getattr(translations, name)
        if not hasattr(translate, "keeps"):
            setattr(translations, name, _unless(kind, translate))


def _unless(kind: type[nn.Module], translate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(translate)
    def translated(*args: Any, **kwargs: Any) -> Any:
        given = signature(translate).bind(*args, **kwargs).arguments
        if any(isinstance(module, kind) for module in given["model"].modules()):
            return given.get("adapter_state_dict")
        return translate(*args, **kwargs)

    translated.keeps = kind  # type: ignore[attr-defined] - once is enough
    return translated
