"""OPT."""

from gptq_fn.families._config import Config
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("q", "self_attn.q_proj", "attn_in"),
    LinearSpec("k", "self_attn.k_proj", "attn_in"),
    LinearSpec("v", "self_attn.v_proj", "attn_in"),
    LinearSpec("o", "self_attn.out_proj", "o_in"),
    LinearSpec("up", "fc1", "mlp_in"),
    LinearSpec("down", "fc2", "down_in"),
)
TENSORS = (("embed", "embed_tokens"), ("positions", "embed_positions"))
PROJECTIONS = (("project_in", "project_in"), ("project_out", "project_out"))


def opt(c: Config) -> ModelSpec:
    """Layer norms before (350m: after) each half, learned positions that start at 2, embeddings that may be narrower."""
    heads, width = c.get("num_attention_heads"), c.get("hidden_size")
    c.only("layer_norm_elementwise_affine", True)
    c.get("ffn_dim", "enable_bias", default=None)
    before = c.get("do_layer_norm_before", default=True)
    slots = ("attn_in", "mlp_in") if before else ("attn_res", "mlp_res")
    norm = NormSpec("layer", 1e-5)
    block = BlockSpec(
        AttentionSpec(heads, heads, width // heads),
        MlpSpec(c.act("activation_function", "relu")),
        norm,
        LINEARS,
        tuple(zip(slots, ("self_attn_layer_norm", "final_layer_norm"), strict=True)),
    )
    tensors = TENSORS
    if before and not c.get("_remove_final_layer_norm", default=False):
        tensors += (("final_norm", "final_layer_norm"),)
    if c.get("word_embed_proj_dim", default=width) != width:
        tensors += PROJECTIONS
    return ModelSpec(
        (block,) * c.get("num_hidden_layers"),
        "model.decoder.layers.{i}.",
        (*((role, f"model.decoder.{name}") for role, name in tensors), ("head", "lm_head")),
        norm,
        position_offset=2,
        tied=c.get("tie_word_embeddings", default=True),
    )
