"""GPT-J, and CodeGen and MOSS, which came from it."""

from gptq_fn.families._config import Config
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec, RopeSpec

SEPARATE = (
    LinearSpec("q", "attn.q_proj", "attn_in"),
    LinearSpec("k", "attn.k_proj", "attn_in"),
    LinearSpec("v", "attn.v_proj", "attn_in"),
)
SPLIT = (LinearSpec("qkv", "attn.qkv_proj", "attn_in"),)
REST = (
    LinearSpec("o", "attn.out_proj", "o_in"),
    LinearSpec("up", "mlp.fc_in", "attn_in"),
    LinearSpec("down", "mlp.fc_out", "down_in"),
)
TENSORS = (("embed", "transformer.wte"), ("final_norm", "transformer.ln_f"), ("head", "lm_head"))


def gptj(c: Config) -> ModelSpec:
    """One layer norm before parallel halves, rotary positions that pair neighbours on a part of each head, a head with a bias."""
    heads, width = c.get("n_head", "num_attention_heads"), c.get("n_embd", "hidden_size")
    return _gptj(c, AttentionSpec(heads, heads, width // heads, position=_rope(c)), SEPARATE + REST)


def codegen(c: Config) -> ModelSpec:
    """GPT-J with fused projections in the order of the four accelerators that they were trained on."""
    heads, width = c.get("n_head", "num_attention_heads"), c.get("n_embd", "hidden_size")
    return _gptj(c, AttentionSpec(heads, heads, width // heads, qkv="mp_split", position=_rope(c)), SPLIT + REST)


def moss(c: Config) -> ModelSpec:
    """CodeGen, with causal masks in its checkpoints (github.com/OpenLMLab/MOSS); its files of quantized weights are not read."""
    c.only("wbits", 32)
    c.get("groupsize", default=None)
    return codegen(c)


def _rope(c: Config) -> RopeSpec:
    c.only("rotary", True)
    return RopeSpec(c.get("rotary_dim", default=64), interleaved=True)


def _gptj(c: Config, attention: AttentionSpec, linears: tuple[LinearSpec, ...]) -> ModelSpec:
    c.only("scale_attn_weights", True)
    c.get("n_inner", default=None)
    norm = NormSpec("layer", c.get("layer_norm_epsilon", default=1e-5))
    mlp = MlpSpec(c.act("activation_function", "gelu_new"))
    block = BlockSpec(attention, mlp, norm, linears, (("attn_in", "ln_1"),), parallel=True)
    return ModelSpec(
        (block,) * c.get("n_layer", "num_hidden_layers"),
        "transformer.h.{i}.",
        TENSORS,
        norm,
        tied=c.get("tie_word_embeddings", default=False),
        ignored=(r".*\.attn\.(bias|masked_bias|causal_mask)",),
    )
