"""DeepSeek's families, and those that borrow their latent attention or their routing."""

from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.families._rope import magnitude
from gptq_fn.families.experts import expert_linears, with_experts
from gptq_fn.families.llama import MLP, NORMS, QK_NORMS, attention, exaone4, head_dim, headwise, llama, rms, sliding, windows
from gptq_fn.spec import LatentAttentionSpec, LinearSpec, MlpSpec, ModelSpec, MoeSpec, NormSpec, QkNormSpec

LATENT = (
    LinearSpec("kv_a", "self_attn.kv_a_proj_with_mqa", "attn_in"),
    LinearSpec("kv_b", "self_attn.kv_b_proj", "kv_latent"),
    LinearSpec("o", "self_attn.o_proj", "o_in"),
)
QUERY = (LinearSpec("q", "self_attn.q_proj", "attn_in"),)
LATENT_QUERY = (LinearSpec("q_a", "self_attn.q_a_proj", "attn_in"), LinearSpec("q_b", "self_attn.q_b_proj", "q_latent"))
LATENT_NORMS = (("kv_latent", "self_attn.kv_a_layernorm"), ("q_latent", "self_attn.q_a_layernorm"))


def latent(c: Config, *, interleaved: bool = True, tied: bool = False) -> ModelSpec:
    """Llama with latent attention, as DeepSeek names it."""
    plain, rotary, rank = c.get("qk_nope_head_dim"), c.get("qk_rope_head_dim"), c.get("q_lora_rank", default=None)
    heads, width = c.get("num_attention_heads"), c.get("v_head_dim", default=None)
    c.get("head_dim", "qk_head_dim", "num_key_value_heads", default=None)
    found = {**c.get("rope_scaling", default={}), **c.get("rope_parameters", default={})}
    whole = float(found.get("mscale_all_dim") or 0)
    attn = LatentAttentionSpec(
        heads,
        plain,
        width or c.get("hidden_size") // heads,
        c.get("kv_lora_rank"),
        rank,
        c.rope(rotary, interleaved=c.get("rope_interleave", default=interleaved)),
        scale=(plain + rotary) ** -0.5 * (magnitude(float(found["factor"]), whole) ** 2 if whole else 1),
        norm=NormSpec("rms", 1e-6),  # whatever rms_norm_eps says
    )
    linears = (LATENT_QUERY if rank else QUERY) + LATENT + MLP
    return llama(c, attn=attn, linears=linears, norms=NORMS + LATENT_NORMS[: 2 if rank else 1], tied=tied)


def youtu(c: Config) -> ModelSpec:
    """Llama with latent attention."""
    return latent(c, tied=True)


def deepseek_v2(c: Config) -> ModelSpec:
    """Latent attention, and experts that are chosen by softmax, perhaps among the best groups of them."""
    c.only("scoring_func", "softmax")
    c.only("norm_topk_prob", False)
    method = c.get("topk_method", default="greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(f"The config says topk_method = {method!r}; greedy and group_limited_greedy are described.")
    moe = replace(routed_experts(c), score="softmax", renormalise=False, group_score="best")
    moe = moe if method == "group_limited_greedy" else replace(moe, groups=1, top_groups=1)
    return routed(c, latent(c), replace(moe, scale=c.number("routed_scaling_factor", 1.0)), bias=None)


def deepseek_v3(c: Config) -> ModelSpec:
    """Latent attention, and experts that are chosen by sigmoids with a bias among the best groups of them."""
    c.only("scoring_func", "sigmoid")
    c.only("topk_method", "noaux_tc")
    return routed(c, latent(c), routed_experts(c))


def routed_experts(c: Config) -> MoeSpec:
    """Experts that are chosen by sigmoids among the best groups of them, as the config says, and shared ones as one MLP."""
    c.get("moe_intermediate_size", default=None)  # the tensors say so themselves
    mlp = MlpSpec(c.act("hidden_act", "silu"), "gated")
    return MoeSpec(
        c.get("n_routed_experts", "num_experts", "num_local_experts"),
        c.get("num_experts_per_tok"),
        mlp,
        "sigmoid",
        renormalise=c.get("norm_topk_prob", default=True),
        scale=c.number("routed_scaling_factor", 1.0),
        groups=c.get("n_group", default=1),
        top_groups=c.get("topk_group", default=1),
        group_score="best_two",
        shared=mlp if c.get("n_shared_experts", "num_shared_experts", default=1) else None,
    )


def routed(
    c: Config,
    spec: ModelSpec,
    moe: MoeSpec,
    *,
    router: str = "gate",
    bias: str | None = "gate.e_score_correction_bias",
    shared: str = "shared_experts",
) -> ModelSpec:
    """The spec with these experts from first_k_dense_replace on, and without the blocks behind the last that predict further tokens."""
    c.only("moe_layer_freq", 1)
    first, layers = c.get("first_k_dense_replace", default=0), len(spec.blocks)
    kinds = c.get("mlp_layer_types", default=["dense" if i < first else "sparse" for i in range(layers)])
    linears = expert_linears(router=router, shared=shared if moe.shared else None)
    arrays = (("route_bias", f"mlp.{bias}"),) if bias else ()
    spec = with_experts(spec, moe, linears, lambda i: kinds[i] == "sparse", arrays=arrays)
    further = range(layers, layers + c.get("num_nextn_predict_layers", "num_mtp_layers", default=0))
    return replace(spec, ignored=spec.ignored + tuple(rf"model\.layers\.{i}\..*" for i in further))


def glm4_moe_lite(c: Config) -> ModelSpec:
    """DeepSeek V3 in which all blocks but the first have experts."""
    return routed(c, latent(c), routed_experts(c))


def axk1(c: Config) -> ModelSpec:
    """DeepSeek V3 with a norm behind the experts."""
    spec = routed(c, latent(c), routed_experts(c))
    after = (("mlp_out", "post_mlp_layernorm"),)
    blocks = (replace(block, norms=block.norms + after) if isinstance(block.ffn, MoeSpec) else block for block in spec.blocks)
    return replace(spec, blocks=tuple(blocks))


def hy_v3(c: Config) -> ModelSpec:
    """Llama with norms on queries and keys, and DeepSeek's routing."""
    c.get("enable_moe_fp32_combine", default=None)  # a matter of rounding
    spec = llama(c, attn=attention(c, qk_norm=headwise(rms(c))), norms=NORMS + QK_NORMS)
    moe = replace(routed_experts(c), scale=c.number("router_scaling_factor", 1.0))
    return routed(c, spec, moe, router="router.gate", bias="expert_bias", shared="shared_mlp")


def dots1(c: Config) -> ModelSpec:
    """Llama with norms on queries and keys, windows on late blocks, and DeepSeek's routing."""
    window, first = c.get("sliding_window", default=None), c.get("max_window_layers", default=62)
    kinds = sliding(c, lambda i: window is not None and i >= first)
    spec = llama(c, attn=attention(c, qk_norm=headwise(rms(c))), norms=NORMS + QK_NORMS, windows=windows(c, kinds))
    return routed(c, spec, routed_experts(c))


def glm4_moe(c: Config) -> ModelSpec:
    """Llama with positions on half of each head, perhaps norms on queries and keys, and DeepSeek's routing."""
    norms = c.get("use_qk_norm", default=False)
    attn = attention(c, c.rope(head_dim(c), partial=0.5), qk_norm=headwise(rms(c)) if norms else None)
    return routed(c, llama(c, attn=attn, norms=NORMS + QK_NORMS if norms else NORMS), routed_experts(c))


def solar_open(c: Config) -> ModelSpec:
    """Llama with DeepSeek's routing."""
    return routed(c, llama(c), routed_experts(c))


def exaone_moe(c: Config) -> ModelSpec:
    """EXAONE 4 with norms before its halves, and DeepSeek's routing."""
    dense = exaone4(c)
    blocks = tuple(replace(block, norms=NORMS + QK_NORMS) for block in dense.blocks)
    return routed(c, replace(dense, blocks=blocks), routed_experts(c), bias="e_score_correction_bias")


def minimax_m2(c: Config) -> ModelSpec:
    """Llama with positions on a part of each head, norms on all queries and all keys at once, and sigmoid routing with a bias."""
    rotary, dim = c.get("rotary_dim", default=None), head_dim(c)
    rope = c.rope(dim, theta=5e6) if rotary is None else c.rope(dim, partial=rotary / dim, theta=5e6)
    spec = llama(c, attn=attention(c, rope, qk_norm=QkNormSpec("flat", rms(c))), norms=NORMS + QK_NORMS)
    moe = replace(routed_experts(c), shared=None)
    arrays = (("route_bias", "block_sparse_moe.e_score_correction_bias"),)
    return with_experts(spec, moe, expert_linears("block_sparse_moe.", ("w1", "w3", "w2")), arrays=arrays)


def minicpm3(c: Config) -> ModelSpec:
    """Llama with latent attention, and multipliers of embeddings, halves of blocks and logits."""
    layers, width = c.get("num_hidden_layers"), c.get("hidden_size")
    scale = c.number("scale_depth", layers**0.5) / layers**0.5
    spec = latent(c, interleaved=False, tied=True)
    return replace(
        spec,
        blocks=tuple(replace(block, residual_scale=scale) for block in spec.blocks),
        embed_scale=c.number("scale_emb", 1.0),
        logit_scale=c.number("dim_model_base", width) / width,
    )
