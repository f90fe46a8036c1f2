"""The dense GLMs."""

from gptq_fn.families._config import Config
from gptq_fn.families.llama import ATTENTION, FUSED, NORMS, attention, head_dim, llama
from gptq_fn.spec import MlpSpec, ModelSpec

FOUR_NORMS = (*NORMS, ("attn_out", "post_self_attn_layernorm"), ("mlp_out", "post_mlp_layernorm"))


def glm(c: Config, norms: tuple[tuple[str, str], ...] = NORMS) -> ModelSpec:
    """Llama with neighbours paired by positions on half of each head, biases on q, k and v, and a fused MLP."""
    attn = attention(c, c.rope(head_dim(c), partial=0.5, interleaved=True))
    linears = ATTENTION + tuple(x for x in FUSED if x.role in ("gate_up", "down"))
    return llama(c, attn=attn, mlp=MlpSpec(c.act("hidden_act", "silu"), "fused_gated"), linears=linears, norms=norms)


def glm4(c: Config) -> ModelSpec:
    """GLM with norms behind each half, too."""
    return glm(c, FOUR_NORMS)
