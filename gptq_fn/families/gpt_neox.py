"""GPT-NeoX, the family of Pythia."""

from gptq_fn.families._config import Config
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("qkv", "attention.query_key_value", "attn_in"),
    LinearSpec("o", "attention.dense", "o_in"),
    LinearSpec("up", "mlp.dense_h_to_4h", "mlp_in"),
    LinearSpec("down", "mlp.dense_4h_to_h", "down_in"),
)
NORMS = (("attn_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm"))
TENSORS = (("embed", "gpt_neox.embed_in"), ("final_norm", "gpt_neox.final_layer_norm"), ("head", "embed_out"))


def gpt_neox(c: Config) -> ModelSpec:
    """Layer norms, rotary positions on a part of each head, projections grouped by head, and parallel halves."""
    heads, width = c.get("num_attention_heads"), c.get("hidden_size")
    c.get("intermediate_size", "attention_bias", default=None)
    norm = NormSpec("layer", c.get("layer_norm_eps", default=1e-5))
    attention = AttentionSpec(heads, heads, width // heads, qkv="grouped", position=c.rope(width // heads, partial=0.25))
    parallel = c.get("use_parallel_residual", default=True)
    block = BlockSpec(attention, MlpSpec(c.act("hidden_act", "gelu")), norm, LINEARS, NORMS, parallel)
    return ModelSpec(
        (block,) * c.get("num_hidden_layers"),
        "gpt_neox.layers.{i}.",
        TENSORS,
        norm,
        tied=c.get("tie_word_embeddings", default=False),
        ignored=(r".*\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",),
    )
