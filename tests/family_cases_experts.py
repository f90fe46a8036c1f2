"""Small configurations of mixtures of experts and of latent attention: name -> (model_type, options of its transformers config)."""

from typing import Any

from family_cases_llama import HEADS, KINDS, MIXED, MULTIPLIERS, SMALL, SPLIT

MIX = {**SMALL, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
LOCAL = {**SMALL, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 24}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "rope_theta": 500.0}
OSS = {**HEADS, **LOCAL, "head_dim": 16, "sliding_window": 5, "rope_parameters": {**YARN, "truncate": False, "beta_fast": 4.0}}
RANKS = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "num_key_value_heads": 8}
LATENT = {**SMALL, **RANKS, "q_lora_rank": 20}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7}
DEEP = {**LATENT, "num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 8, "num_experts_per_tok": 3}
DEEP |= {"moe_intermediate_size": 24, "n_shared_experts": 2}
ROUTED = {**SMALL, "num_hidden_layers": 3, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}

EXPERT_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", LOCAL),
    "mixtral-window": ("mixtral", {**LOCAL, "sliding_window": 5, "num_experts_per_tok": 1, "head_dim": 16}),
    "qwen2_moe": ("qwen2_moe", {**MIX, "shared_expert_intermediate_size": 32}),
    "qwen2_moe-some-dense": (
        "qwen2_moe",
        {**MIX, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": True},
    ),
    "qwen2_moe-window": ("qwen2_moe", {**MIX, "use_sliding_window": True, "sliding_window": 5, "layer_types": KINDS[:2]}),
    "qwen3_moe": ("qwen3_moe", {**MIX, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3_moe-window": ("qwen3_moe", {**MIX, "use_sliding_window": True, "sliding_window": 5, "mlp_only_layers": [0]}),
    "flint": ("flint", {**MIX, **MIXED, "mlp_only_layers": [0], "shared_expert_intermediate_size": 32}),
    "olmoe": ("olmoe", {**MIX, "intermediate_size": 24}),
    "olmoe-clipped": ("olmoe", {**MIX, "norm_topk_prob": True, "clip_qkv": 0.5, "attention_bias": True}),
    "flex_olmo": ("flex_olmo", MIX),
    "granitemoe": ("granitemoe", LOCAL),
    "granitemoe-multiplied": ("granitemoe", {**LOCAL, **MULTIPLIERS, "attention_bias": True}),
    "granitemoeshared": ("granitemoeshared", {**LOCAL, **MULTIPLIERS, "shared_intermediate_size": 32}),
    "granitemoeshared-none": ("granitemoeshared", {**LOCAL, "shared_intermediate_size": 0}),
    "granitemoe_swa": ("granitemoe_swa", {**LOCAL, "sliding_window": 5, "layer_types": KINDS[:2], "layer_rope_theta": [100.0, 0.0]}),
    "gpt_oss": ("gpt_oss", OSS),
    "gpt_oss-unscaled": ("gpt_oss", {**OSS, "rope_parameters": {"rope_type": "default"}, "swiglu_limit": 0.5}),
    "mellum": ("mellum", {**MIX, **MIXED, "rope_parameters": SPLIT, "mlp_layer_types": ["sparse", "dense", "sparse"]}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {**SMALL, "num_experts": 8, "moe_topk": 2, "head_dim": 8}),
    "hunyuan_v1_moe-list": (
        "hunyuan_v1_moe",
        {
            **SMALL,
            "num_experts": 8,
            "moe_topk": [3, 3],
            "head_dim": 8,
            "rope_parameters": {"rope_type": "dynamic", "alpha": 9.0, "factor": 1.0},
        },
    ),
    "ernie4_5_moe": ("ernie4_5_moe", {**SMALL, "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 24}),
    "ernie4_5_moe-interval": (
        "ernie4_5_moe",
        {**SMALL, "num_hidden_layers": 4, "moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_interval": 2}
        | {"moe_layer_end_index": 2, "moe_num_shared_experts": 0, "use_bias": True, "tie_word_embeddings": False},
    ),
    "deepseek_v2": ("deepseek_v2", DEEP),
    "deepseek_v2-whole-queries": ("deepseek_v2", {**DEEP, "q_lora_rank": None, "attention_bias": True}),
    "deepseek_v2-groups": ("deepseek_v2", {**DEEP, **GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v2-yarn": (
        "deepseek_v2",
        {**DEEP, "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    "deepseek_v3": ("deepseek_v3", {**DEEP, **GROUPS}),
    "deepseek_v3-whole-queries": ("deepseek_v3", {**DEEP, **GROUPS, "q_lora_rank": None, "rope_interleave": False}),
    "deepseek_v3-yarn": (
        "deepseek_v3",
        {**DEEP, "n_group": 1, "topk_group": 1, "norm_topk_prob": False, "attention_bias": True}
        | {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.4}},
    ),
    "youtu": ("youtu", LATENT),
    "youtu-whole-queries": ("youtu", {**LATENT, "q_lora_rank": None, "rope_interleave": False}),
    "minicpm3": ("minicpm3", LATENT),
    "minicpm3-scaled": ("minicpm3", {**LATENT, "scale_emb": 2, "scale_depth": 0.9, "dim_model_base": 32}),
    "glm4_moe_lite": ("glm4_moe_lite", {**DEEP, **GROUPS}),
    "axk1": ("axk1", {**DEEP, **GROUPS}),
    "hy_v3": ("hy_v3", {**MIX, "head_dim": 16, "num_shared_experts": 2, "router_scaling_factor": 1.3}),
    "dots1": ("dots1", {**ROUTED, **GROUPS, "n_shared_experts": 2, "first_k_dense_replace": 1}),
    "dots1-window": ("dots1", {**ROUTED, "n_shared_experts": 1, "sliding_window": 5, "max_window_layers": 1, "norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", {**ROUTED, **GROUPS, "head_dim": 16}),
    "glm4_moe-normed-bias": ("glm4_moe", {**ROUTED, "head_dim": 16, "use_qk_norm": True, "attention_bias": True}),
    "solar_open": ("solar_open", {**ROUTED, **GROUPS, "head_dim": 16}),
    "exaone_moe": ("exaone_moe", {**ROUTED, **GROUPS, "num_experts": 8, "sliding_window": 5, "sliding_window_pattern": 2}),
    "minimax_m2": ("minimax_m2", {**LOCAL, "head_dim": 16, "rotary_dim": 8}),
}
