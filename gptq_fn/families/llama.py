"""Llama, the base of most families, and those that differ from it by a field."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gptq_fn.families._config import Config
from gptq_fn.spec import (
    AlibiSpec,
    AttentionSpec,
    BlockSpec,
    LatentAttentionSpec,
    LinearScaling,
    LinearSpec,
    MlpSpec,
    ModelSpec,
    NormSpec,
    QkNormSpec,
    RopeSpec,
)

ATTENTION = (
    LinearSpec("q", "self_attn.q_proj", "attn_in"),
    LinearSpec("k", "self_attn.k_proj", "attn_in"),
    LinearSpec("v", "self_attn.v_proj", "attn_in"),
    LinearSpec("o", "self_attn.o_proj", "o_in"),
)
MLP = (
    LinearSpec("gate", "mlp.gate_proj", "mlp_in"),
    LinearSpec("up", "mlp.up_proj", "mlp_in"),
    LinearSpec("down", "mlp.down_proj", "down_in"),
)
LINEARS = ATTENTION + MLP
FUSED = (
    LinearSpec("qkv", "self_attn.qkv_proj", "attn_in"),
    LinearSpec("o", "self_attn.o_proj", "o_in"),
    LinearSpec("gate_up", "mlp.gate_up_proj", "mlp_in"),
    LinearSpec("down", "mlp.down_proj", "down_in"),
)
NORMS = (("attn_in", "input_layernorm"), ("mlp_in", "post_attention_layernorm"))
POST_NORMS = (("attn_out", "post_attention_layernorm"), ("mlp_out", "post_feedforward_layernorm"))
QK_NORMS = (("q_norm", "self_attn.q_norm"), ("k_norm", "self_attn.k_norm"))
TENSORS = (("embed", "model.embed_tokens"), ("final_norm", "model.norm"), ("head", "lm_head"))

Windows = Sequence[int | None]
"""The attention window of each block; None sees everything before it."""


def llama(
    c: Config,
    *,
    attn: AttentionSpec | LatentAttentionSpec | None = None,
    mlp: MlpSpec | None = None,
    norm: NormSpec | None = None,
    linears: tuple[LinearSpec, ...] = LINEARS,
    norms: tuple[tuple[str, str | None], ...] = NORMS,
    windows: Windows | None = None,
    positions: Sequence[RopeSpec | AlibiSpec | None] | None = None,
    tied: bool = False,
) -> ModelSpec:
    """RMS norms, rotary grouped-query attention and a gated MLP, each as the config says unless it is given.

    `windows` and `positions` replace the attention's in each block; `tied` is what files mean that do not say it.
    """
    layers, attn = c.get("num_hidden_layers"), attn or attention(c)
    mlp, norm = mlp or MlpSpec(c.act("hidden_act", "silu"), "gated"), norm or rms(c)
    c.get("hidden_size", "intermediate_size", default=None)  # the tensors say these themselves
    c.get("attention_bias", "attention_out_bias", "mlp_bias", "qkv_bias", "use_bias", default=None)
    attentions = [attn] * layers
    if isinstance(attn, AttentionSpec):
        each = zip(windows or (attn.window,) * layers, positions or (attn.position,) * layers, strict=True)
        attentions = [replace(attn, window=window, position=position) for window, position in each]
    return ModelSpec(
        tuple(BlockSpec(attn, mlp, norm, linears, norms) for attn in attentions),
        "model.layers.{i}.",
        TENSORS,
        norm,
        tied=c.get("tie_word_embeddings", default=tied),
        ignored=(r".*\.rotary_emb\.inv_freq",),
    )


def attention(c: Config, rope: RopeSpec | None = None, **options: Any) -> AttentionSpec:
    """Rotary grouped-query attention as the config says; `options` are further fields."""
    heads, dim = c.get("num_attention_heads"), head_dim(c)
    return AttentionSpec(heads, c.get("num_key_value_heads", default=heads), dim, position=rope or c.rope(dim), **options)


def head_dim(c: Config) -> int:
    """Features of a head."""
    return c.get("head_dim", default=None) or c.get("hidden_size") // c.get("num_attention_heads")


def rms(c: Config, offset: float = 0.0) -> NormSpec:
    """An RMS norm as the config says."""
    return NormSpec("rms", c.number("rms_norm_eps", 1e-6), offset)


def headwise(norm: NormSpec, *, after_rope: bool = False) -> QkNormSpec:
    """This norm on each head of the queries and keys."""
    return QkNormSpec("head", norm, after_rope)


def sliding(c: Config, default: Callable[[int], bool] = lambda i: False) -> tuple[bool, ...]:
    """Which blocks attend through a window: those that the config lists or, where it lists none, those that `default` names."""
    found = (("full_attention", "sliding_attention")[default(i)] for i in range(c.get("num_hidden_layers")))
    kinds = c.get("layer_types", default=list(found))
    if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
        raise ValueError(f"The config has layers of type {', '.join(sorted(unknown))}; full_attention and sliding_attention are described.")
    return tuple(kind == "sliding_attention" for kind in kinds)


def windows(c: Config, slides: Sequence[bool], usual: int | None = 4096) -> Windows:
    """The config's window for the blocks that attend through one."""
    window = c.get("sliding_window", default=usual if any(slides) else None)
    return [window if slide else None for slide in slides]


def mistral(c: Config) -> ModelSpec:
    """Llama with one attention window for all blocks."""
    return llama(c, attn=attention(c, window=c.get("sliding_window", default=None)))


def ministral(c: Config) -> ModelSpec:
    """Mistral with a window on the blocks that the config lists."""
    return llama(c, windows=windows(c, sliding(c, lambda i: c.get("sliding_window", default=None) is not None)))


def cwm(c: Config) -> ModelSpec:
    """Llama with windows on three blocks of four."""
    return llama(c, windows=windows(c, sliding(c, lambda i: i % 4 != 0), 8192))


def arcee(c: Config) -> ModelSpec:
    """Llama with a plain MLP of squared ReLUs."""
    return llama(c, mlp=MlpSpec(c.act("hidden_act", "relu2")), linears=tuple(x for x in LINEARS if x.role != "gate"))


def jais2(c: Config) -> ModelSpec:
    """Llama with layer norms and a plain MLP of squared ReLUs."""
    norm, mlp = NormSpec("layer", c.number("layer_norm_eps", 1e-5)), MlpSpec(c.act("hidden_act", "relu2"))
    return llama(c, mlp=mlp, norm=norm, linears=tuple(x for x in LINEARS if x.role != "gate"))


def helium(c: Config) -> ModelSpec:
    """Llama whose rotary positions pair neighbours."""
    return llama(c, attn=attention(c, c.rope(head_dim(c), interleaved=True, theta=100000.0)))


def smollm3(c: Config) -> ModelSpec:
    """Llama without positions on every fourth block, which may have windows."""
    layers, interval = c.get("num_hidden_layers"), c.get("no_rope_layer_interval", default=4)
    rotary = c.get("no_rope_layers", default=[int((i + 1) % interval != 0) for i in range(layers)])  # 1 where there is rope
    narrow = c.get("use_sliding_window", default=False) and c.get("sliding_window", default=None) is not None
    slides = sliding(c, lambda i: narrow and not rotary[i])
    attn = attention(c, c.rope(head_dim(c), theta=2e6))
    positions = [attn.position if on else None for on in rotary]
    return llama(c, attn=attn, windows=windows(c, [narrow and slide for slide in slides]), positions=positions, tied=True)


def phi3(c: Config) -> ModelSpec:
    """Llama with fused projections, positions on a part of each head, and one window for all blocks."""
    attn = attention(c, qkv="concat", window=c.get("sliding_window", default=None))
    return llama(c, attn=attn, mlp=MlpSpec(c.act("hidden_act", "silu"), "fused_gated"), linears=FUSED)


def exaone4(c: Config) -> ModelSpec:
    """Llama with norms behind each half and on queries and keys; where some blocks have windows, only those have positions."""
    window, pattern = c.get("sliding_window", default=None), c.get("sliding_window_pattern", default=4)
    pattern = "L" * (int(pattern) - 1) + "G" if str(pattern).isdigit() else pattern  # local and global
    slides = sliding(c, lambda i: window is not None and pattern[i % len(pattern)] == "L")
    attn = attention(c, qk_norm=headwise(rms(c)))
    positions = [attn.position if slide or window is None else None for slide in slides]
    return llama(c, attn=attn, norms=POST_NORMS + QK_NORMS, windows=windows(c, slides), positions=positions)


def nanochat(c: Config) -> ModelSpec:
    """Norms without weights, of embeddings too, a plain MLP, soft caps on logits; positions turn the other way."""
    norm, rope = rms(c), c.rope(head_dim(c))
    attn = attention(c, replace(rope, scaling=LinearScaling(-1.0)), qk_norm=headwise(norm, after_rope=True))
    linears = (*ATTENTION, LinearSpec("up", "mlp.fc1", "mlp_in"), LinearSpec("down", "mlp.fc2", "down_in"))
    slots = tuple((slot, None) for slot, _ in NORMS + QK_NORMS)
    spec = llama(c, attn=attn, mlp=MlpSpec(c.act("hidden_act", "relu2")), norm=norm, linears=linears, norms=slots)
    tensors = (("embed", "model.embed_tokens"), ("embed_norm", None), ("final_norm", None), ("head", "lm_head"))
    return replace(spec, tensors=tensors, logit_softcap=c.number("final_logit_softcapping", None))


def ernie4_5(c: Config) -> ModelSpec:
    """Llama whose rotary positions pair neighbours."""
    return llama(c, attn=attention(c, c.rope(head_dim(c), interleaved=True, theta=5e5)), tied=True)


def hunyuan(c: Config) -> ModelSpec:
    """Llama with norms on queries and keys behind their rotation; "alpha" may slow all positions down for long texts."""
    dim, norms = head_dim(c), (("q_norm", "self_attn.query_layernorm"), ("k_norm", "self_attn.key_layernorm"))
    found = {**c.get("rope_scaling", default={}), **c.get("rope_parameters", default={})}
    if alpha := found.get("alpha"):
        rope = RopeSpec(dim, found.get("rope_theta", c.get("rope_theta", default=1e4)) * alpha ** (dim / (dim - 2)))
    else:
        rope = c.rope(dim)
    return llama(c, attn=attention(c, rope, qk_norm=headwise(rms(c), after_rope=True)), norms=NORMS + norms)


def granite(c: Config) -> ModelSpec:
    """Llama with four multipliers: of embeddings, attention scores, both halves of a block, and logits."""
    return multiplied(c, llama(c, attn=attention(c, scale=c.number("attention_multiplier", 1.0))))


def granite_swa(c: Config, *, tied: bool = True) -> ModelSpec:
    """Granite with attention sinks, and a window and a theta for each block; those without a theta have no positions."""
    attn, kinds = attention(c, scale=c.number("attention_multiplier", 1.0), sinks=True), sliding(c, lambda i: i % 4 != 0)
    assert isinstance(attn.position, RopeSpec)
    thetas = c.get("layer_rope_theta", default=[attn.position.theta] * len(kinds))
    positions = [replace(attn.position, theta=float(theta)) if theta else None for theta in thetas]
    return with_sinks(multiplied(c, llama(c, attn=attn, windows=windows(c, kinds, 128), positions=positions, tied=tied)))


def with_sinks(spec: ModelSpec, name: str = "self_attn.sinks") -> ModelSpec:
    """The spec with the tensors of attention sinks, under this name in each block."""
    return replace(spec, blocks=tuple(replace(block, arrays=(("sinks", name),)) for block in spec.blocks))


def hyperclovax(c: Config) -> ModelSpec:
    """Granite with, perhaps, norms behind each half."""
    scale = c.number("attention_multiplier", head_dim(c) ** -0.5)
    after = (("attn_out", "post_norm1"), ("mlp_out", "post_norm2")) if c.get("use_post_norm", default=True) else ()
    spec = multiplied(c, llama(c, attn=attention(c, scale=scale), norms=NORMS + after))
    return replace(spec, logit_scale=c.number("logits_scaling", 1.0))  # Granite divides


def multiplied(c: Config, spec: ModelSpec) -> ModelSpec:
    """The spec with Granite's multipliers of embeddings, halves of blocks and logits."""
    blocks = tuple(replace(block, residual_scale=c.number("residual_multiplier", 1.0)) for block in spec.blocks)
    logits, embeddings = c.number("logits_scaling", 1.0), c.number("embedding_multiplier", 1.0)
    return replace(spec, blocks=blocks, embed_scale=embeddings, logit_scale=1 / logits)
