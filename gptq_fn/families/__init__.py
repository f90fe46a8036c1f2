"""From a Hugging Face config to a spec: one short function a family, naming only what differs."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gptq_fn.families._config import HARMLESS, Config
from gptq_fn.families.bloom import bloom, falcon, refined_web
from gptq_fn.families.gpt2 import gpt2, gpt_bigcode, gpt_neo, openai_gpt
from gptq_fn.families.gpt_neox import gpt_neox
from gptq_fn.families.gptj import codegen, gptj, moss
from gptq_fn.families.llama import llama, mistral, qwen2
from gptq_fn.families.mpt import mpt
from gptq_fn.families.opt import biogpt, opt, xglm
from gptq_fn.spec import ModelSpec

FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "biogpt": biogpt,
    "bloom": bloom,
    "codegen": codegen,
    "falcon": falcon,
    "gpt2": gpt2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gptj": gptj,
    "llama": llama,
    "mistral": mistral,
    "moss": moss,
    "mpt": mpt,
    "openai-gpt": openai_gpt,
    "opt": opt,
    "qwen2": qwen2,
    "RefinedWeb": refined_web,
    "RefinedWebModel": falcon,
    "xglm": xglm,
}
"""config.json's model_type -> the function that describes it."""


def spec_from_config(config: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> ModelSpec:
    """The spec of the model that this config.json describes.

    `ignore` names keys that may be disregarded. Raises ValueError for a family that is not in the table, a missing key,
    and any key that is not understood and not off: what is not understood could change the model.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(
            f"model_type {kind!r} is not in the table of architectures ({', '.join(sorted(FAMILIES))}). "
            "Any dense decoder can be described by hand: see examples/own_model.py."
        )
    reader = Config(config)
    spec = FAMILIES[kind](reader)
    if unknown := reader.leftovers(HARMLESS | frozenset(ignore)):
        values = ", ".join(f"{key} = {value!r}" for key, value in unknown.items())
        raise ValueError(
            f"The config of this {kind} model has keys that are not understood: {values}. "
            "Pass ignore=[...] with their names if they do not change the logits."
        )
    # a bias is something new
    tied_head = tuple(f"{name}\\.(?!bias).*" for role, name in spec.tensors if role == "head" and spec.tied)
    return replace(spec, origin=json.dumps(dict(config)), ignored=spec.ignored + tied_head)
