"""config.json as transformers 4 and authors wrote it, in the words of published models: transformers 5 reads the same spec from it."""

import json
from typing import Any

import pytest
import transformers

from gptq_fn import spec_from_config

WIDTHS = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 48}
WIDTHS |= {"vocab_size": 97, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16"}
LATENT = {"kv_lora_rank": 24, "q_lora_rank": None, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "ep_size": 1}
LATENT |= {"n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 24, "moe_layer_freq": 1, "aux_loss_alpha": 0.001}
LATENT |= {"num_key_value_heads": 8, "num_experts_per_tok": 3, "seq_aux": True, "rope_theta": 10000}
DEEP_YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "original_max_position_embeddings": 4096, "type": "yarn"}
LLAMA3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LONG = {"long_factor": [1.5, 2.0, 4.0, 8.0], "short_factor": [1.0, 1.25, 1.5, 2.0], "type": "longrope"}
GEMMA = {"head_dim": 16, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}
GEMMA |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096, "rope_theta": 10000.0}
OSS = {"head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "experts_per_token": 3, "initial_context_length": 4096}
OSS |= {"swiglu_limit": 7.0, "attention_bias": True, "sliding_window": 128, "rope_theta": 150000, "output_router_logits": False}
OSS |= {
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096, "rope_type": "yarn"}
}
LLLG = ["sliding_attention"] * 3 + ["full_attention"]
HUNYUAN = {"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"}

OLDER: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3.1": ("llama", {"rope_scaling": LLAMA3, "rope_theta": 500000.0, "mlp_bias": False, "pretraining_tp": 1}),
    "llama, dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 10000.0}),
    "mistral 0.1": ("mistral", {"sliding_window": 4096, "rope_theta": 10000.0, "hidden_act": "silu"}),
    "qwen 2.5": ("qwen2", {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 4, "rope_theta": 1000000.0}),
    "qwen 2.5, yarn": (
        "qwen2",
        {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}, "rope_theta": 1e6},
    ),
    "qwen 3": ("qwen3", {"head_dim": 16, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 4, "rope_theta": 1e6}),
    "gemma": ("gemma", {"head_dim": 16, "hidden_act": "gelu", "hidden_activation": None, "rope_theta": 10000.0, "rope_scaling": None}),
    "gemma 2": ("gemma2", {**GEMMA, "cache_implementation": "hybrid"}),
    "gemma 3": (
        "gemma3_text",
        {**GEMMA, "sliding_window": 512, "sliding_window_pattern": 2, "rope_theta": 1e6, "rope_local_base_freq": 10000}
        | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
    ),
    "phi 3": ("phi3", {"rope_theta": 10000.0, "rope_scaling": LONG, "original_max_position_embeddings": 4096, "sliding_window": 262144}),
    "phi 4 mini": (
        "phi3",
        {"rope_theta": 10000.0, "rope_scaling": {**LONG, "long_factor": [1.5, 2.0, 4.0], "short_factor": [1.0] * 3}}
        | {"original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "full_attn_mod": 1, "interpolate_factor": 1},
    ),
    "olmo": ("olmo", {"rms_norm_eps": None, "clip_qkv": 8.0, "rope_theta": 10000.0, "tie_word_embeddings": False}),
    "olmo 2": ("olmo2", {"attention_bias": False, "rope_theta": 500000, "tie_word_embeddings": False}),
    "olmo 3": (
        "olmo3",
        {"sliding_window": 4096, "rope_theta": 500000}
        | {"rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192, "rope_type": "yarn", "attention_factor": 1.2}},
    ),
    "granite 3": (
        "granite",
        {"attention_multiplier": 0.0078125, "embedding_multiplier": 12.0, "logits_scaling": 8, "residual_multiplier": 0.22}
        | {"rope_theta": 10000000.0, "tie_word_embeddings": True},
    ),
    "smollm 3": ("smollm3", {"no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None, "rope_theta": 5000000.0}),
    "glm 4": ("glm4", {"attention_bias": True, "head_dim": 8, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}),
    "exaone 4": ("exaone4", {"sliding_window": 4096, "layer_types": LLLG, "rope_theta": 1000000, "rope_scaling": LLAMA3}),
    "mixtral": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6, "sliding_window": None}),
    "qwen 3 moe": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 16}
        | {"decoder_sparse_step": 1, "mlp_only_layers": [], "max_window_layers": 4, "use_sliding_window": False, "sliding_window": None}
        | {"rope_theta": 1000000.0, "rope_scaling": None, "output_router_logits": False, "router_aux_loss_coef": 0.001},
    ),
    "gpt-oss": ("gpt_oss", OSS),
    "deepseek v2 lite": (
        "deepseek_v2",
        {**LATENT, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax"}
        | {"rope_scaling": {**DEEP_YARN, "mscale": 0.707, "mscale_all_dim": 0.707}, "routed_scaling_factor": 1.0, "norm_topk_prob": False},
    ),
    "deepseek v3": (
        "deepseek_v3",
        {**LATENT, "q_lora_rank": 20, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "topk_method": "noaux_tc"}
        | {"rope_scaling": {**DEEP_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
        | {"scoring_func": "sigmoid", "num_nextn_predict_layers": 1},
    ),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16, "attention_head_dim": 16, "rope_theta": 10000.0, "rope_scaling": HUNYUAN}),
}


@pytest.mark.parametrize("case", OLDER)
def test_older_files_mean_what_transformers_takes_them_to_mean(case):
    kind, keys = OLDER[case]
    old = {"model_type": kind, **WIDTHS, **keys}
    assert "rope_parameters" not in old
    options = {name: value for name, value in old.items() if name not in ("model_type", "torch_dtype")}
    new = json.loads(transformers.AutoConfig.for_model(kind, **json.loads(json.dumps(options))).to_json_string(use_diff=False))
    assert "rope_parameters" in new
    extra = set(old) & {"cache_implementation", "full_attn_mod", "interpolate_factor", "attention_head_dim"}
    assert spec_from_config(old, ignore=extra) == spec_from_config(new, ignore=extra)


def test_words_that_transformers_5_no_longer_reads():
    def spec(case, **changes):
        kind, keys = OLDER[case]
        return spec_from_config({"model_type": kind, **WIDTHS, **keys, **changes})

    assert spec("phi 3", rope_scaling={**LONG, "type": "su"}) == spec("phi 3")
    assert spec("exaone 4", layer_types=None, sliding_window_pattern="LLLG") == spec("exaone 4")
