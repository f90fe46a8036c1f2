"""BLOOM and Falcon, whose blocks have the same names."""

from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.spec import AlibiSpec, AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("qkv", "self_attention.query_key_value", "attn_in"),
    LinearSpec("o", "self_attention.dense", "o_in"),
    LinearSpec("up", "mlp.dense_h_to_4h", "mlp_in"),
    LinearSpec("down", "mlp.dense_4h_to_h", "down_in"),
)
NORMS = (("attn_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm"))
TENSORS = (("embed", "transformer.word_embeddings"), ("final_norm", "transformer.ln_f"), ("head", "lm_head"))
EMBED_NORM = (("embed_norm", "transformer.word_embeddings_layernorm"),)


def bloom(c: Config) -> ModelSpec:
    """Layer norms, also of the embeddings, projections grouped by head, and attention that falls with distance (ALiBi)."""
    heads, width = c.get("n_head", "num_attention_heads"), c.get("hidden_size", "n_embed")
    attention = AttentionSpec(heads, heads, width // heads, qkv="grouped", position=AlibiSpec())
    block = BlockSpec(attention, MlpSpec("gelu_tanh"), _norm(c), LINEARS, NORMS)
    return _model(c, block, TENSORS + EMBED_NORM)


def falcon(c: Config, *, new: bool = False) -> ModelSpec:
    """Rotary positions or ALiBi, few key and value heads, and halves that are parallel (but for -rw), behind one norm or two.

    `new` is what files mean that do not say whether their blocks are those of the 40b.
    """
    heads, width = c.get("num_attention_heads", "n_head"), c.get("hidden_size", "n_embed")
    new = c.get("new_decoder_architecture", default=new)
    parallel = c.get("parallel_attn", default=True) or new
    several, one = c.get("num_kv_heads", "n_head_kv", default=heads), c.get("multi_query", default=True) and not new
    c.get("bias", "ffn_hidden_size", default=None)
    rope = c.rope(width // heads)
    # the bias is scaled with the scores, and rounded as in training
    position = AlibiSpec(scaled=True, rounded=True) if c.get("alibi", default=False) else rope
    attention = AttentionSpec(heads, 1 if one else several, width // heads, qkv="grouped", position=position)
    block = BlockSpec(attention, MlpSpec(c.act("activation", "gelu")), _norm(c), LINEARS, NORMS, parallel)
    if parallel and c.get("num_ln_in_parallel_attn", default=2 if new else 1) == 2:
        return _model(c, replace(block, norms=(("attn_in", "ln_attn"), ("mlp_in", "ln_mlp"))), TENSORS)
    if parallel:
        linears = tuple(replace(linear, tap="attn_in") if linear.role == "up" else linear for linear in LINEARS)
        return _model(c, replace(block, linears=linears, norms=NORMS[:1]), TENSORS)
    return _model(c, block, TENSORS)


def refined_web(c: Config) -> ModelSpec:
    """Falcon-40b as it was first published: the type RefinedWeb means the new blocks."""
    return falcon(c, new=True)


def _norm(c: Config) -> NormSpec:
    return NormSpec("layer", c.get("layer_norm_epsilon", default=1e-5))


def _model(c: Config, block: BlockSpec, tensors: tuple[tuple[str, str], ...]) -> ModelSpec:
    c.only("apply_residual_connection_post_layernorm", False)
    return ModelSpec(
        (block,) * c.get("n_layer", "num_hidden_layers"),
        "transformer.h.{i}.",
        tensors,
        block.norm,
        tied=c.get("tie_word_embeddings", default=True),
    )
