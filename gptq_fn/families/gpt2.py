"""GPT-2."""

from gptq_fn.families._config import Config
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("qkv", "attn.c_attn", "attn_in", stored="in_out"),
    LinearSpec("o", "attn.c_proj", "o_in", stored="in_out"),
    LinearSpec("up", "mlp.c_fc", "mlp_in", stored="in_out"),
    LinearSpec("down", "mlp.c_proj", "down_in", stored="in_out"),
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
