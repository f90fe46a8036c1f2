"""Small configurations of every family: name -> (model_type, options of its transformers config)."""

from typing import Any

from family_cases_experts import EXPERT_CASES
from family_cases_gpt import GPT_CASES
from family_cases_llama import LLAMA_CASES

SMALL = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "max_position_embeddings": 64}
LLAMA = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
OPT = {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 64, "pad_token_id": 1}
GPT2 = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 8, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
NEOX = {**SMALL, "intermediate_size": 48}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-mha": ("llama", {**LLAMA, "num_key_value_heads": 8}),
    "llama-mqa-eps": ("llama", {**LLAMA, "num_key_value_heads": 1, "rms_norm_eps": 0.01}),
    "llama-tied-wide-heads": (
        "llama",
        {**LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 16},
    ),
    "llama-linear-rope": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}),
    "llama-llama3-rope": ("llama", {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}}),
    "llama-gelu": ("llama", {**LLAMA, "hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("mistral", {**LLAMA, "sliding_window": None}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": 5, "head_dim": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", {**LLAMA, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", {**OPT, "word_embed_proj_dim": 32, "do_layer_norm_before": False}),
    "opt-projected-untied": ("opt", {**OPT, "word_embed_proj_dim": 32, "tie_word_embeddings": False}),
    "opt-no-bias": ("opt", {**OPT, "enable_bias": False, "activation_function": "gelu"}),
    "gpt2": ("gpt2", GPT2),
    "gpt2-inner-untied": ("gpt2", {**GPT2, "n_inner": 40, "tie_word_embeddings": False, "layer_norm_epsilon": 0.01}),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-sequential-full": ("gpt_neox", {**NEOX, "use_parallel_residual": False, "rotary_pct": 1.0}),
    "gpt_neox-half-tied": ("gpt_neox", {**NEOX, "rotary_pct": 0.5, "tie_word_embeddings": True, "layer_norm_eps": 0.01}),
    **GPT_CASES,
    **LLAMA_CASES,
    **EXPERT_CASES,
}
