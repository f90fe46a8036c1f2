"""Small configurations of GPT's relatives, in the form of CASES, and of model types that transformers does not have."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 64}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
GPTJ = {**GPT2, "rotary_dim": 4, "n_inner": 48}
BLOOM = {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 8}
FALCON = {**SMALL, "ffn_hidden_size": 48, "bos_token_id": 0, "eos_token_id": 0}
FALCON_40B = {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = {  # eager attention adds the bias twice in transformers 5.23
    **FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "attn_implementation": "sdpa",
}  # fmt: skip
MPT = {"vocab_size": 97, "d_model": 64, "n_layers": 2, "n_heads": 8, "max_seq_len": 64}
NEO = {
    "vocab_size": 97, "hidden_size": 64, "num_layers": 2, "num_heads": 8, "max_position_embeddings": 64, "intermediate_size": 48,
    "attention_types": [[["global", "local"], 1]], "window_size": 5, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
PERSIMMON = {**SMALL, "intermediate_size": 48}
COHERE2 = {
    **GROUPED,
    "num_hidden_layers": 3,
    "sliding_window": 5,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
OPENAI = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64}
XGLM = {
    "vocab_size": 97, "d_model": 64, "num_layers": 2, "attention_heads": 8, "max_position_embeddings": 64, "ffn_dim": 48,
}  # fmt: skip
BIOGPT = {**SMALL, "intermediate_size": 48}

GPT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_bigcode": ("gpt_bigcode", {**GPT2, "n_inner": 48}),
    "gpt_bigcode-mha-untied": ("gpt_bigcode", {**GPT2, "multi_query": False, "tie_word_embeddings": False}),
    "gpt_neo": ("gpt_neo", NEO),
    "gpt_neo-local-untied": (
        "gpt_neo", {**NEO, "attention_types": [[["local"], 2]], "tie_word_embeddings": False, "layer_norm_epsilon": 0.01}
    ),
    "gptj": ("gptj", GPTJ),
    "gptj-whole-heads": ("gptj", {**GPTJ, "rotary_dim": 8, "layer_norm_epsilon": 0.01}),
    "codegen": ("codegen", GPTJ),
    "codegen-relu": ("codegen", {**GPTJ, "activation_function": "relu", "rotary_dim": 8}),
    "moss": ("moss", GPTJ),
    "bloom": ("bloom", BLOOM),
    "bloom-six-heads": ("bloom", {**BLOOM, "hidden_size": 48, "n_head": 6, "tie_word_embeddings": False}),
    "falcon-7b": ("falcon", FALCON),
    "falcon-7b-two-groups": ("falcon", {**FALCON, "multi_query": False, "bias": True, "tie_word_embeddings": False}),
    "falcon-40b": ("falcon", FALCON_40B),
    "falcon-11b": ("falcon", {**FALCON_40B, "num_ln_in_parallel_attn": 1, "layer_norm_epsilon": 0.01}),
    "falcon-rw": ("falcon", FALCON_RW),
    "falcon-rw-six-heads": ("falcon", {**FALCON_RW, "hidden_size": 48, "num_attention_heads": 6}),
    "falcon-40b-alibi": ("falcon", {**FALCON_40B, "alibi": True, "attn_implementation": "sdpa"}),
    "RefinedWeb": ("RefinedWeb", FALCON_40B),
    "RefinedWebModel": ("RefinedWebModel", FALCON),
    "RefinedWebModel-rw": ("RefinedWebModel", FALCON_RW),
    "mpt": ("mpt", MPT),
    "mpt-six-heads": ("mpt", {**MPT, "d_model": 48, "n_heads": 6, "layer_norm_epsilon": 0.01}),
    "mpt-clipped": ("mpt", {**MPT, "attn_config": {"clip_qkv": 0.5, "softmax_scale": 0.3}}),
    "phi": ("phi", {**GROUPED, "num_key_value_heads": None}),
    "phi-norms-groups": ("phi", {**GROUPED, "qk_layernorm": True, "layer_norm_eps": 0.01}),
    "cohere": ("cohere", GROUPED),
    "cohere-norms-bias-untied": (
        "cohere",
        {**GROUPED, "use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": False, "logit_scale": 0.25},
    ),
    "cohere2": ("cohere2", COHERE2),
    "stablelm": ("stablelm", {**GROUPED, "use_qkv_bias": True}),
    "stablelm-parallel-norms": ("stablelm", {**GROUPED, "use_parallel_residual": True, "qk_layernorm": True}),
    "starcoder2": ("starcoder2", GROUPED),
    "starcoder2-window": ("starcoder2", {**GROUPED, "sliding_window": 5, "use_bias": False, "tie_word_embeddings": False}),
    "nemotron": ("nemotron", GROUPED),
    "nemotron-bias-wide-heads": ("nemotron", {**GROUPED, "attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "persimmon": ("persimmon", PERSIMMON),
    "persimmon-plain": ("persimmon", {**PERSIMMON, "qk_layernorm": False, "hidden_act": "gelu"}),
    "openai-gpt": ("openai-gpt", OPENAI),
    "xglm": ("xglm", XGLM),
    "xglm-unscaled": ("xglm", {**XGLM, "scale_embedding": False, "tie_word_embeddings": False}),
    "biogpt": ("biogpt", BIOGPT),
    "biogpt-unscaled": ("biogpt", {**BIOGPT, "scale_embedding": False, "tie_word_embeddings": False}),
}  # fmt: skip


def _no_buffers(options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    return {}


class Published(NamedTuple):
    """What tells the checkpoints of a model type from those of `kind`, which holds the same parameters under the same names."""

    kind: str
    config: Callable[[dict[str, Any]], dict[str, Any]] = dict
    buffers: Callable[[Mapping[str, Any]], dict[str, np.ndarray]] = _no_buffers


def _renamed(config: dict[str, Any], kind: str, names: Mapping[str, str]) -> dict[str, Any]:
    """The config with those keys alone, under other names, as transformers 4 wrote it."""
    return {"model_type": kind, "torch_dtype": "float32", **{new: config[old] for old, new in names.items()}}


def _moss(config: dict[str, Any]) -> dict[str, Any]:
    """Keys of models/configuration_moss.py in github.com/OpenLMLab/MOSS; wbits = 32 stands for weights that are not quantized."""
    keys = "vocab_size n_positions n_ctx n_embd n_layer n_head rotary_dim n_inner activation_function resid_pdrop embd_pdrop attn_pdrop"
    keys += " layer_norm_epsilon initializer_range use_cache bos_token_id eos_token_id tie_word_embeddings"
    return _renamed(config, "moss", {key: key for key in keys.split()}) | {"wbits": 32, "groupsize": 128}


def _causal_masks(options: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The buffers of models/modeling_moss.py in github.com/OpenLMLab/MOSS, which its checkpoints hold."""
    mask = np.tri(options["n_positions"], dtype=bool)[None, None]
    return {f"transformer.h.{i}.attn.causal_mask": mask.copy() for i in range(options["n_layer"])}


_RW = {
    key: key
    for key in [
        "alibi",
        "attention_dropout",
        "bias",
        "bos_token_id",
        "eos_token_id",
        "hidden_dropout",
        "hidden_size",
        "initializer_range",
        "layer_norm_epsilon",
        "parallel_attn",
        "use_cache",
        "vocab_size",
    ]
} | {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer"}
"""Keys of configuration_RW.py in the first revisions of tiiuae/falcon-7b, falcon-40b and falcon-rw-1b on the Hub."""


def _refined_web(config: dict[str, Any]) -> dict[str, Any]:
    """That of falcon-40b, whose blocks are new without a key that says so."""
    return _renamed(config, "RefinedWeb", {**_RW, "num_kv_heads": "n_head_kv"}) | {"apply_residual_connection_post_layernorm": False}


def _refined_web_model(config: dict[str, Any]) -> dict[str, Any]:
    """That of falcon-7b and falcon-rw-1b."""
    return _renamed(config, "RefinedWebModel", {**_RW, "multi_query": "multi_query"}) | {"apply_residual_connection_post_layernorm": False}


PUBLISHED = {
    "moss": Published("codegen", _moss, _causal_masks),
    "RefinedWeb": Published("falcon", _refined_web),
    "RefinedWebModel": Published("falcon", _refined_web_model),
}
"""Model types that are not in transformers."""
