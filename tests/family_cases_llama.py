"""Small configurations of the dense families that are much like Llama: name -> (model_type, options of its transformers config)."""

from typing import Any

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
HEADS = {**SMALL, "head_dim": 16}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
MIXED = {**HEADS, "num_hidden_layers": 3, "sliding_window": 5, "layer_types": KINDS}
SPLIT = {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}, "sliding_attention": {"rope_theta": 100.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 500.0}
MULTIPLIERS = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.4, "logits_scaling": 5.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 5.0, 8.0]}


def rope(kind: str, **more: object) -> dict[str, object]:
    return {**HEADS, "rope_parameters": {"rope_type": kind, "rope_theta": 500.0, **more}}


LLAMA_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-dynamic-rope": ("llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 8}),
    "llama-dynamic-rope-short": ("llama", rope("dynamic", factor=4.0)),
    "llama-yarn-rope": ("llama", {**HEADS, "rope_parameters": YARN}),
    "llama-yarn-rope-short": ("llama", rope("yarn", factor=4.0, original_max_position_embeddings=32, beta_fast=4.0, beta_slow=0.5)),
    "llama-yarn-rope-whole-pairs": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=8, truncate=False)),
    "llama-yarn-rope-mscale": (
        "llama",
        rope("yarn", factor=8.0, original_max_position_embeddings=8, mscale=0.7, mscale_all_dim=0.3),
    ),
    "llama-yarn-rope-amplitude": ("llama", rope("yarn", factor=8.0, original_max_position_embeddings=8, attention_factor=0.9)),
    "llama-llama3-rope-short": (
        "llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    ),
    "llama-longrope": ("llama", rope("longrope", short_factor=[1.0] * 8, long_factor=[4.0] * 8, original_max_position_embeddings=8)),
    "llama-proportional-rope": ("llama", rope("proportional", partial_rotary_factor=0.5)),
    "qwen3": ("qwen3", HEADS),
    "qwen3-window-bias": ("qwen3", {**MIXED, "use_sliding_window": True, "attention_bias": True}),
    "qwen3-late-windows": ("qwen3", {**HEADS, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma": ("gemma", HEADS),
    "gemma-gelu-untied": ("gemma", {**HEADS, "hidden_act": "gelu", "tie_word_embeddings": False}),
    "gemma2": ("gemma2", {**HEADS, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma2-uncapped": ("gemma2", {**HEADS, "final_logit_softcapping": None, "attn_logit_softcapping": None}),
    "gemma2-tight": ("gemma2", {**HEADS, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.0, "attention_bias": True}),
    "gemma3": ("gemma3_text", {**HEADS, "num_hidden_layers": 7, "sliding_window": 5, "query_pre_attn_scalar": 24}),
    "gemma3-scaled-capped": ("gemma3_text", {**MIXED, "rope_parameters": SPLIT, "final_logit_softcapping": 3.0}),
    "vaultgemma": ("vaultgemma", {**HEADS, "sliding_window": 5}),
    "phi3": ("phi3", SMALL),
    "phi3-window-partial": ("phi3", {**SMALL, "sliding_window": 5, "partial_rotary_factor": 0.5}),
    "phi3-longrope": ("phi3", {**SMALL, "original_max_position_embeddings": 8, "rope_parameters": {**LONG, "rope_theta": 500.0}}),
    "phi3-longrope-short": ("phi3", {**SMALL, "original_max_position_embeddings": 32, "rope_parameters": {**LONG, "rope_theta": 500.0}}),
    "olmo": ("olmo", SMALL),
    "olmo-clipped-bias": ("olmo", {**SMALL, "clip_qkv": 0.5, "attention_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("olmo2", SMALL),
    "olmo3": ("olmo3", {**SMALL, "num_hidden_layers": 4, "sliding_window": 5}),
    "olmo3-yarn": ("olmo3", {**SMALL, "sliding_window": 5, "layer_types": KINDS[:2], "rope_parameters": {"full_attention": YARN}}),
    "granite": ("granite", SMALL),
    "granite-multiplied": ("granite", {**SMALL, **MULTIPLIERS}),
    "smollm3": ("smollm3", {**SMALL, "num_hidden_layers": 4}),
    "smollm3-window": ("smollm3", {**SMALL, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 5}),
    "glm": ("glm", HEADS),
    "glm-no-bias": ("glm", {**HEADS, "attention_bias": False, "partial_rotary_factor": 1.0}),
    "glm4": ("glm4", HEADS),
    "exaone4": ("exaone4", {**SMALL, "num_hidden_layers": 4, "sliding_window": 5}),
    "exaone4-full": ("exaone4", {**SMALL, "sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "ministral": ("ministral", {**HEADS, "sliding_window": 5}),
    "ministral-mixed": ("ministral", MIXED),
    "seed_oss": ("seed_oss", HEADS),
    "seed_oss-all-biases": ("seed_oss", {**HEADS, "attention_out_bias": True, "mlp_bias": True}),
    "arcee": ("arcee", SMALL),
    "jais2": ("jais2", SMALL),
    "helium": ("helium", SMALL | {"head_dim": 8}),
    "cwm": ("cwm", MIXED),
    "iquestcoder": ("iquestcoder", HEADS),
    "internlm3": ("internlm3", HEADS),
    "nanochat": ("nanochat", SMALL),
    "ernie4_5": ("ernie4_5", HEADS),
    "ernie4_5-bias": ("ernie4_5", {**HEADS, "use_bias": True}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", HEADS),
    "hunyuan_v1_dense-alpha": (
        "hunyuan_v1_dense",
        {**HEADS, "rope_parameters": {"rope_type": "dynamic", "alpha": 50.0, "factor": 1.0, "rope_theta": 100.0}},
    ),
    "hyperclovax": ("hyperclovax", {**SMALL, "head_dim": 8}),
    "hyperclovax-post-norms": ("hyperclovax", {**SMALL, "head_dim": 8, "use_post_norm": True, **MULTIPLIERS}),
    "granite_swa": ("granite_swa", {**SMALL, "num_hidden_layers": 5, "sliding_window": 5}),
    "granite_swa-thetas": (
        "granite_swa",
        {**SMALL, **MULTIPLIERS, "num_hidden_layers": 3, "sliding_window": 5, "layer_rope_theta": [100.0, 0, 500.0]},
    ),
}
