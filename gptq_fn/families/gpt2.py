"""GPT-2 and its nearest relatives."""

from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("qkv", "attn.c_attn", "attn_in", stored="in_out"),
    LinearSpec("o", "attn.c_proj", "o_in", stored="in_out"),
    LinearSpec("up", "mlp.c_fc", "mlp_in", stored="in_out"),
    LinearSpec("down", "mlp.c_proj", "down_in", stored="in_out"),
)
NEO_LINEARS = (
    LinearSpec("q", "attn.attention.q_proj", "attn_in"),
    LinearSpec("k", "attn.attention.k_proj", "attn_in"),
    LinearSpec("v", "attn.attention.v_proj", "attn_in"),
    LinearSpec("o", "attn.attention.out_proj", "o_in"),
    LinearSpec("up", "mlp.c_fc", "mlp_in"),
    LinearSpec("down", "mlp.c_proj", "down_in"),
)
NORMS = (("attn_in", "ln_1"), ("mlp_in", "ln_2"))
TENSORS = (("embed", "transformer.wte"), ("positions", "transformer.wpe"), ("final_norm", "transformer.ln_f"), ("head", "lm_head"))


def gpt2(c: Config) -> ModelSpec:
    """Layer norms, learned positions, fused [Q | K | V] and weights stored [in, out]."""
    heads, width = c.get("n_head", "num_attention_heads"), c.get("n_embd", "hidden_size")
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    c.get("n_inner", "reorder_and_upcast_attn", default=None)
    norm = NormSpec("layer", c.get("layer_norm_epsilon", default=1e-5))
    attention = AttentionSpec(heads, heads, width // heads, qkv="concat")
    block = BlockSpec(attention, MlpSpec(c.act("activation_function", "gelu_new")), norm, LINEARS, NORMS)
    return ModelSpec(
        (block,) * c.get("n_layer", "num_hidden_layers"),
        "transformer.h.{i}.",
        TENSORS,
        norm,
        tied=c.get("tie_word_embeddings", default=True),
        ignored=(r".*\.attn\.(bias|masked_bias)",),  # causal masks that old checkpoints carry
    )


def gpt_bigcode(c: Config) -> ModelSpec:
    """GPT-2 with weights stored [out, in] and projections grouped by key and value head, of which there may be only one."""
    spec = gpt2(c)
    c.get("num_key_value_heads", default=None)  # says again what multi_query says
    c.only("scale_attn_weights", True)
    block, linears = spec.blocks[0], tuple(replace(linear, stored="out_in") for linear in LINEARS)
    heads = c.get("n_head", "num_attention_heads")
    kv_heads = 1 if c.get("multi_query", default=True) else heads
    attention = AttentionSpec(heads, kv_heads, c.get("n_embd", "hidden_size") // heads, qkv="grouped")
    return replace(spec, blocks=(replace(block, attn=attention, linears=linears),) * len(spec.blocks))


def gpt_neo(c: Config) -> ModelSpec:
    """GPT-2 with separate projections, scores that are not scaled, and windows on the local blocks."""
    heads, width = c.get("num_heads", "num_attention_heads"), c.get("hidden_size")
    c.get("intermediate_size", "num_layers", "num_hidden_layers", default=None)
    written = c.get("attention_types", default=[[["global", "local"], 12]])
    kinds = c.get("attention_layers", default=[kind for names, times in written for kind in list(names) * times])
    if unknown := set(kinds) - {"global", "local"}:
        raise ValueError(f"The config has attention of type {', '.join(sorted(unknown))}; global and local are described.")
    window = c.get("window_size", default=256)
    norm = NormSpec("layer", c.get("layer_norm_epsilon", default=1e-5))
    mlp = MlpSpec(c.act("activation_function", "gelu_new"))

    def block(kind: str) -> BlockSpec:
        attention = AttentionSpec(heads, heads, width // heads, scale=1.0, window=window if kind == "local" else None)
        return BlockSpec(attention, mlp, norm, NEO_LINEARS, NORMS)

    return ModelSpec(
        tuple(block(kind) for kind in kinds),
        "transformer.h.{i}.",
        TENSORS,
        norm,
        tied=c.get("tie_word_embeddings", default=True),
        ignored=(r".*\.attn\.attention\.(bias|masked_bias)",),
    )


def openai_gpt(c: Config) -> ModelSpec:
    """The first GPT: GPT-2 with norms behind each residual sum and none at the end."""
    norm = NormSpec("layer", c.get("layer_norm_epsilon", default=1e-5))
    heads, act = c.get("n_head", "num_attention_heads"), c.get("afn", default="gelu")
    attention = AttentionSpec(heads, heads, c.get("n_embd", "hidden_size") // heads, qkv="concat")
    # what this model calls gelu is the approximation with tanh
    mlp = MlpSpec("gelu_tanh" if act == "gelu" else c.act("afn", "gelu"))
    block = BlockSpec(attention, mlp, norm, LINEARS, (("attn_res", "ln_1"), ("mlp_res", "ln_2")))
    return ModelSpec(
        (block,) * c.get("n_layer", "num_hidden_layers"),
        "transformer.h.{i}.",
        (("embed", "transformer.tokens_embed"), ("positions", "transformer.positions_embed"), ("head", "lm_head")),
        norm,
        tied=c.get("tie_word_embeddings", default=True),
        ignored=(r".*\.attn\.bias", "transformer.position_ids"),
    )
