"""MPT."""

from gptq_fn.families._config import Config
from gptq_fn.spec import AlibiSpec, AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("qkv", "attn.Wqkv", "attn_in"),
    LinearSpec("o", "attn.out_proj", "o_in"),
    LinearSpec("up", "ffn.up_proj", "mlp_in"),
    LinearSpec("down", "ffn.down_proj", "down_in"),
)
NORMS = (("attn_in", "norm_1"), ("mlp_in", "norm_2"))
TENSORS = (("embed", "transformer.wte"), ("final_norm", "transformer.norm_f"), ("head", "lm_head"))


def mpt(c: Config) -> ModelSpec:
    """Layer norms without bias, ALiBi with slopes in an order of its own, and fused projections that may be clipped."""
    heads, width, inner = c.get("n_heads", "num_attention_heads"), c.get("d_model", "hidden_size"), c.section("attn_config")
    inner.only("attn_type", "multihead_attention")
    inner.only("alibi", True)
    c.get("learned_pos_emb", "no_bias", "expansion_ratio", default=None)  # ALiBi excludes the first; the tensors say the others
    if c.get("norm_type", default="layernorm") != "low_precision_layernorm":
        c.only("norm_type", "layernorm")
    scale, clip = inner.get("softmax_scale", default=None), inner.get("clip_qkv", default=None)
    norm = NormSpec("layer", c.get("layer_norm_epsilon", default=1e-5))
    attention = AttentionSpec(
        heads,
        heads,
        width // heads,
        qkv="concat",
        position=AlibiSpec("mpt", steepest=float(inner.get("alibi_bias_max", default=8))),
        scale=scale and float(scale),
        clip=clip and float(clip),
    )
    block = BlockSpec(attention, MlpSpec("gelu"), norm, LINEARS, NORMS)
    layers = c.get("n_layers", "num_hidden_layers")
    return ModelSpec((block,) * layers, "transformer.blocks.{i}.", TENSORS, norm, tied=c.get("tie_word_embeddings", default=True))
