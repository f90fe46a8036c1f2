"""OPT, and BioGPT and XGLM, whose blocks are its."""

from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.spec import Activation, AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

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


def biogpt(c: Config) -> ModelSpec:
    """OPT with scaled embeddings."""
    c.get("intermediate_size", "layer_norm_eps", default=None)  # the norms do not follow the config
    block = _block(c, c.get("num_attention_heads"), c.get("hidden_size"), c.act("hidden_act", "gelu"))
    tensors = (*((role, f"biogpt.{name}") for role, name in TENSORS), ("final_norm", "biogpt.layer_norm"), ("head", "output_projection"))
    spec = ModelSpec((block,) * c.get("num_hidden_layers"), "biogpt.layers.{i}.", tensors, block.norm, position_offset=2)
    return _scaled(c, spec, c.get("hidden_size"))


def xglm(c: Config) -> ModelSpec:
    """OPT with scaled embeddings and fixed positions."""
    c.get("ffn_dim", default=None)
    width = c.get("d_model", "hidden_size")
    block = _block(c, c.get("attention_heads", "num_attention_heads"), width, c.act("activation_function", "gelu"))
    tensors = (("embed", "model.embed_tokens"), ("final_norm", "model.layer_norm"), ("head", "lm_head"))
    blocks = (block,) * c.get("num_layers", "num_hidden_layers")
    spec = ModelSpec(blocks, "model.layers.{i}.", tensors, block.norm, position_offset=2, sinusoids=True)
    return _scaled(c, replace(spec, ignored=("model.embed_positions.weights",)), width)


def _block(c: Config, heads: int, width: int, act: Activation) -> BlockSpec:
    names = (("attn_in", "self_attn_layer_norm"), ("mlp_in", "final_layer_norm"))
    return BlockSpec(AttentionSpec(heads, heads, width // heads), MlpSpec(act), NormSpec("layer", 1e-5), LINEARS, names)


def _scaled(c: Config, spec: ModelSpec, width: int) -> ModelSpec:
    scale = width**0.5 if c.get("scale_embedding", default=True) else 1.0
    return replace(spec, embed_scale=scale, tied=c.get("tie_word_embeddings", default=True))
