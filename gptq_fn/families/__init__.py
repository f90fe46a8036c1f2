"""From a Hugging Face config to a spec: one short function a family, naming only what differs."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from gptq_fn.families._config import HARMLESS, Config
from gptq_fn.families.bloom import bloom, falcon, refined_web
from gptq_fn.families.deepseek import (
    axk1,
    deepseek_v2,
    deepseek_v3,
    dots1,
    exaone_moe,
    glm4_moe,
    glm4_moe_lite,
    hy_v3,
    minicpm3,
    minimax_m2,
    solar_open,
    youtu,
)
from gptq_fn.families.experts import (
    ernie4_5_moe,
    flex_olmo,
    flint,
    gpt_oss,
    granitemoe,
    granitemoe_swa,
    hunyuan_moe,
    mellum,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from gptq_fn.families.gemma import gemma, gemma2, gemma3, vaultgemma
from gptq_fn.families.glm import glm, glm4
from gptq_fn.families.gpt2 import gpt2, gpt_bigcode, gpt_neo, openai_gpt
from gptq_fn.families.gpt_neox import gpt_neox
from gptq_fn.families.gptj import codegen, gptj, moss
from gptq_fn.families.layer_norm import cohere, cohere2, nemotron, persimmon, phi, stablelm, starcoder2
from gptq_fn.families.llama import (
    arcee,
    cwm,
    ernie4_5,
    exaone4,
    granite,
    granite_swa,
    helium,
    hunyuan,
    hyperclovax,
    jais2,
    llama,
    ministral,
    mistral,
    nanochat,
    phi3,
    smollm3,
)
from gptq_fn.families.mpt import mpt
from gptq_fn.families.olmo import olmo, olmo2, olmo3
from gptq_fn.families.opt import biogpt, opt, xglm
from gptq_fn.families.qwen import qwen2, qwen3
from gptq_fn.spec import ModelSpec

FAMILIES: dict[str, Callable[[Config], ModelSpec]] = {
    "RefinedWeb": refined_web,
    "RefinedWebModel": falcon,
    "arcee": arcee,
    "axk1": axk1,
    "biogpt": biogpt,
    "bloom": bloom,
    "codegen": codegen,
    "cohere": cohere,
    "cohere2": cohere2,
    "cwm": cwm,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "dots1": dots1,
    "ernie4_5": ernie4_5,
    "ernie4_5_moe": ernie4_5_moe,
    "exaone4": exaone4,
    "exaone_moe": exaone_moe,
    "falcon": falcon,
    "flex_olmo": flex_olmo,
    "flint": flint,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "glm": glm,
    "glm4": glm4,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": glm4_moe_lite,
    "gpt2": gpt2,
    "gpt_bigcode": gpt_bigcode,
    "gpt_neo": gpt_neo,
    "gpt_neox": gpt_neox,
    "gpt_oss": gpt_oss,
    "gptj": gptj,
    "granite": granite,
    "granite_swa": granite_swa,
    "granitemoe": granitemoe,
    "granitemoe_swa": granitemoe_swa,
    "granitemoeshared": granitemoe,
    "helium": helium,
    "hunyuan_v1_dense": hunyuan,
    "hunyuan_v1_moe": hunyuan_moe,
    "hy_v3": hy_v3,
    "hyperclovax": hyperclovax,
    "internlm3": llama,
    "iquestcoder": llama,
    "jais2": jais2,
    "llama": llama,
    "mellum": mellum,
    "minicpm3": minicpm3,
    "minimax_m2": minimax_m2,
    "ministral": ministral,
    "mistral": mistral,
    "mixtral": mixtral,
    "moss": moss,
    "mpt": mpt,
    "nanochat": nanochat,
    "nemotron": nemotron,
    "olmo": olmo,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "olmoe": olmoe,
    "openai-gpt": openai_gpt,
    "opt": opt,
    "persimmon": persimmon,
    "phi": phi,
    "phi3": phi3,
    "qwen2": qwen2,
    "qwen2_moe": qwen2_moe,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "seed_oss": llama,
    "smollm3": smollm3,
    "solar_open": solar_open,
    "stablelm": stablelm,
    "starcoder2": starcoder2,
    "vaultgemma": vaultgemma,
    "xglm": xglm,
    "youtu": youtu,
}
"""config.json's model_type -> the function that describes it."""


def spec_from_config(config: Mapping[str, Any], *, ignore: Iterable[str] = ()) -> ModelSpec:
    """The spec of the model that this config.json describes.

    `ignore` names keys that may be disregarded. Raises ValueError for a family that is not in the table, a missing key,
    and any key that is not understood and not off: what is not understood could change the model.
    """
    kind = config.get("model_type")
    if kind not in FAMILIES:
        own = " Its config asks for code of its own (auto_map), which is never run." if config.get("auto_map") else ""
        raise ValueError(
            f"model_type {kind!r} is not in the table of architectures ({', '.join(sorted(FAMILIES))}).{own} "
            "Describe it by hand, or trace its torch model: see docs/own_architecture.md."
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
