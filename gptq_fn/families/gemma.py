"""The Gemmas: norms scaled by 1 + weight, embeddings by the root of their width."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gptq_fn.families._config import Config
from gptq_fn.families.llama import NORMS, QK_NORMS, attention, head_dim, headwise, llama, rms, sliding, windows
from gptq_fn.spec import AttentionSpec, MlpSpec, ModelSpec, RopeSpec

FOUR_NORMS = (
    ("attn_in", "input_layernorm"),
    ("attn_out", "post_attention_layernorm"),
    ("mlp_in", "pre_feedforward_layernorm"),
    ("mlp_out", "post_feedforward_layernorm"),
)


def gemma(c: Config) -> ModelSpec:
    """Llama with a (1 + weight) norm and scaled embeddings."""
    act = c.act("hidden_act", "gelu_pytorch_tanh")
    c.get("hidden_activation", default=None)
    # the first files say "gelu" and mean its approximation
    mlp = MlpSpec("gelu_tanh" if act == "gelu" else act, "gated")
    return replace(llama(c, mlp=mlp, norm=rms(c, 1.0), tied=True), embed_scale=c.get("hidden_size") ** 0.5)


def gemma2(c: Config) -> ModelSpec:
    """Gemma with norms before and behind each half, soft caps, and windows on every second block."""
    return _capped(c, _attention(c), FOUR_NORMS, lambda i: i % 2 == 0)


def vaultgemma(c: Config) -> ModelSpec:
    """Gemma 2 without the norms behind each half."""
    return _capped(c, _attention(c), (NORMS[0], FOUR_NORMS[2]), lambda i: i % 2 == 0)


def gemma3(c: Config) -> ModelSpec:
    """Gemma 2 with norms on queries and keys, and positions of their own on the five blocks of six that have windows."""
    pattern = c.get("sliding_window_pattern", "_sliding_window_pattern", default=6)
    whole, local = (c.rope(head_dim(c), theta=theta, layer=kind) for kind, theta in (("full_attention", 1e6), ("sliding_attention", 1e4)))
    attn = _attention(c, whole, qk_norm=headwise(rms(c, 1.0)))
    return _capped(c, attn, FOUR_NORMS + QK_NORMS, lambda i: (i + 1) % pattern != 0, local)


def _attention(c: Config, rope: RopeSpec | None = None, **options: Any) -> AttentionSpec:
    softcap = c.number("attn_logit_softcapping", None)
    return attention(c, rope, scale=c.number("query_pre_attn_scalar", 256.0) ** -0.5, softcap=softcap, **options)


def _capped(
    c: Config, attn: AttentionSpec, norms: tuple[tuple[str, str], ...], slides: Callable[[int], bool], local: RopeSpec | None = None
) -> ModelSpec:
    """Gemma 2 with this attention and these norms; `local` are the positions of blocks with windows."""
    mlp, kinds = MlpSpec(c.act("hidden_activation", "gelu_pytorch_tanh"), "gated"), sliding(c, slides)
    c.get("hidden_act", default=None)
    positions = [local if local and slide else attn.position for slide in kinds]
    spec = llama(c, attn=attn, mlp=mlp, norm=rms(c, 1.0), norms=norms, windows=windows(c, kinds), positions=positions, tied=True)
    return replace(spec, embed_scale=c.get("hidden_size") ** 0.5, logit_softcap=c.number("final_logit_softcapping", None))
