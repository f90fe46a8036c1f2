"""Llama and the families that differ from it by a field."""

from gptq_fn.families._config import Config
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec

LINEARS = (
    LinearSpec("q", "self_attn.q_proj", "attn_in"),
    LinearSpec("k", "self_attn.k_proj", "attn_in"),
    LinearSpec("v", "self_attn.v_proj", "attn_in"),
    LinearSpec("o", "self_attn.o_proj", "o_in"),
    LinearSpec("gate", "mlp.gate_proj", "mlp_in"),
    LinearSpec("up", "mlp.up_proj", "mlp_in"),
    LinearSpec("down", "mlp.down_proj", "down_in"),
)
NORMS = (("attn_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm"))
TENSORS = (("embed", "model.embed_tokens"), ("final_norm", "model.norm"), ("head", "lm_head"))


def llama(c: Config, windows: tuple[int | None, ...] | None = None) -> ModelSpec:
    """RMS norms, rotary grouped-query attention and a gated MLP; `windows` holds the attention window of each block."""
    heads = c.get("num_attention_heads")
    dim = c.get("head_dim", default=c.get("hidden_size") // heads)
    layers = c.get("num_hidden_layers")
    c.get("intermediate_size", "attention_bias", "mlp_bias", default=None)  # the tensors say so themselves
    norm = NormSpec("rms", c.get("rms_norm_eps", default=1e-6))
    mlp = MlpSpec(c.act("hidden_act", "silu"), "gated")
    kv_heads, rope = c.get("num_key_value_heads", default=heads), c.rope(dim)

    def block(window: int | None) -> BlockSpec:
        return BlockSpec(AttentionSpec(heads, kv_heads, dim, position=rope, window=window), mlp, norm, LINEARS, NORMS)

    blocks = tuple(block(window) for window in windows or (None,) * layers)
    tied = c.get("tie_word_embeddings", default=False)
    return ModelSpec(blocks, "model.layers.{i}.", TENSORS, norm, tied=tied, ignored=(r".*\.rotary_emb\.inv_freq",))


def mistral(c: Config) -> ModelSpec:
    """Llama with one attention window for all blocks."""
    window = c.get("sliding_window", default=None)
    return llama(c, (window,) * c.get("num_hidden_layers"))


def qwen2(c: Config) -> ModelSpec:
    """Llama with biases on q, k and v, and windows on some blocks where the config asks for them."""
    window = c.get("sliding_window", default=4096) if c.get("use_sliding_window", default=False) else None
    layers, first = c.get("num_hidden_layers"), c.get("max_window_layers", default=28)
    kinds = c.get("layer_types", default=["full_attention" if i < first else "sliding_attention" for i in range(layers)])
    c.get("sliding_window", default=None)
    return llama(c, tuple(window if kind == "sliding_attention" else None for kind in kinds))
