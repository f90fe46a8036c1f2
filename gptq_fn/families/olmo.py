"""The dense OLMos."""

from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.families.llama import NORMS, POST_NORMS, QK_NORMS, TENSORS, attention, head_dim, llama, rms, sliding, windows
from gptq_fn.spec import ModelSpec, NormSpec, QkNormSpec


def olmo(c: Config) -> ModelSpec:
    """Llama with layer norms that have no weights, and projections that may be clipped."""
    attn = attention(c, clip=c.number("clip_qkv", None))
    spec = llama(c, attn=attn, norm=NormSpec("layer", 1e-5), norms=tuple((slot, None) for slot, _ in NORMS))
    return replace(spec, tensors=tuple((role, None if role == "final_norm" else name) for role, name in TENSORS))


def olmo2(c: Config) -> ModelSpec:
    """Llama with norms behind each half instead of before it, and on all queries and all keys at once."""
    return llama(c, attn=attention(c, qk_norm=QkNormSpec("flat", rms(c))), norms=POST_NORMS + QK_NORMS)


def olmo3(c: Config) -> ModelSpec:
    """OLMo 2 with windows on three blocks of four, whose positions are not scaled."""
    kinds = sliding(c, lambda i: (i + 1) % 4 != 0)
    whole, local = (c.rope(head_dim(c), theta=5e5, layer=kind) for kind in ("full_attention", "sliding_attention"))
    attn = attention(c, whole, qk_norm=QkNormSpec("flat", rms(c)))
    return llama(c, attn=attn, norms=POST_NORMS + QK_NORMS, windows=windows(c, kinds), positions=[(whole, local)[i] for i in kinds])
