"""Families with the layout of Llama and layer norms."""

from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.families.llama import ATTENTION, LINEARS, NORMS, QK_NORMS, attention, head_dim, headwise, llama, sliding, windows
from gptq_fn.spec import LinearSpec, MlpSpec, ModelSpec, NormSpec

PHI = (
    *ATTENTION[:3],
    LinearSpec("o", "self_attn.dense", "o_in"),
    LinearSpec("up", "mlp.fc1", "mlp_in"),
    LinearSpec("down", "mlp.fc2", "down_in"),
)
STARCODER = (*ATTENTION, LinearSpec("up", "mlp.c_fc", "mlp_in"), LinearSpec("down", "mlp.c_proj", "down_in"))
PERSIMMON = (
    LinearSpec("qkv", "self_attn.query_key_value", "attn_in"),
    LinearSpec("o", "self_attn.dense", "o_in"),
    LinearSpec("up", "mlp.dense_h_to_4h", "mlp_in"),
    LinearSpec("down", "mlp.dense_4h_to_h", "down_in"),
)
LAYER_NORMS = (("q_norm", "self_attn.q_layernorm"), ("k_norm", "self_attn.k_layernorm"))
NORMS_OF_HEADS = tuple((slot, f"{name}.norms.{{n}}") for slot, name in LAYER_NORMS)


def layer_norm(c: Config) -> NormSpec:
    """A layer norm as the config says."""
    return NormSpec("layer", c.get("layer_norm_eps", "norm_epsilon", "norm_eps", default=1e-5))


def parallel(spec: ModelSpec) -> ModelSpec:
    """The spec with both halves of each block behind the norm of the first."""
    block = spec.blocks[0]
    linears = tuple(replace(x, tap="attn_in") if x.tap == "mlp_in" else x for x in block.linears)
    norms = tuple((slot, name) for slot, name in block.norms if slot != "mlp_in")
    return replace(spec, blocks=tuple(replace(block, linears=linears, norms=norms, parallel=True) for block in spec.blocks))


def ends(spec: ModelSpec, name: str) -> ModelSpec:
    """The spec with a final norm of this name."""
    return replace(spec, tensors=tuple((role, name if role == "final_norm" else old) for role, old in spec.tensors))


def phi(c: Config) -> ModelSpec:
    """Parallel halves behind one norm, positions on a part of each head, a plain MLP, biases everywhere."""
    norm, normed = layer_norm(c), c.get("qk_layernorm", default=False)
    attn = attention(c, c.rope(head_dim(c), partial=0.5), qk_norm=headwise(norm) if normed else None)
    mlp = MlpSpec(c.act("hidden_act", "gelu_new"))
    spec = llama(c, attn=attn, mlp=mlp, norm=norm, linears=PHI, norms=NORMS + LAYER_NORMS if normed else NORMS)
    return ends(parallel(spec), "model.final_layernorm")


def persimmon(c: Config) -> ModelSpec:
    """Projections grouped by head, positions on a part of each, and a plain MLP of squared ReLUs."""
    norm, normed = layer_norm(c), c.get("qk_layernorm", default=True)
    attn = attention(c, c.rope(head_dim(c), partial=0.5), qkv="grouped", qk_norm=headwise(norm) if normed else None)
    mlp = MlpSpec(c.act("hidden_act", "relu2"))
    spec = llama(c, attn=attn, mlp=mlp, norm=norm, linears=PERSIMMON, norms=NORMS + LAYER_NORMS if normed else NORMS)
    return ends(spec, "model.final_layernorm")


def stablelm(c: Config) -> ModelSpec:
    """Positions on a part of each head, halves that may be parallel, and a norm for each head of queries and keys where asked for."""
    norm, normed = layer_norm(c), c.get("qk_layernorm", default=False)
    c.get("use_qkv_bias", default=None)
    attn = attention(c, c.rope(head_dim(c), partial=0.25), qk_norm=headwise(norm) if normed else None)
    spec = llama(c, attn=attn, norm=norm, norms=NORMS + NORMS_OF_HEADS if normed else NORMS)
    return parallel(spec) if c.get("use_parallel_residual", default=False) else spec


def starcoder2(c: Config) -> ModelSpec:
    """A plain MLP, biases, and one attention window for all blocks."""
    c.only("mlp_type", "default")
    c.only("norm_type", "layer_norm")
    c.only("scale_attn_weights", True)
    c.get("activation_function", default=None)  # published files say gelu, but hidden_act is what counts
    attn = attention(c, window=c.get("sliding_window", default=None))
    mlp = MlpSpec(c.act("hidden_act", "gelu_pytorch_tanh"))
    return llama(c, attn=attn, mlp=mlp, norm=layer_norm(c), linears=STARCODER, tied=True)


def nemotron(c: Config) -> ModelSpec:
    """Norms with 1 + weight, positions on a part of each head, and a plain MLP of squared ReLUs."""
    partial = c.get("rope_percent", "rope_percentage", default=0.5)
    attn, mlp = attention(c, c.rope(head_dim(c), partial=partial)), MlpSpec(c.act("hidden_act", "relu2"))
    linears = tuple(linear for linear in LINEARS if linear.role != "gate")
    return llama(c, attn=attn, mlp=mlp, norm=replace(layer_norm(c), offset=1.0), linears=linears)


def cohere(c: Config) -> ModelSpec:
    """Parallel halves behind one norm without bias, positions that pair neighbours, scaled logits."""
    norm, normed = layer_norm(c), c.get("use_qk_norm", default=False)
    attn = attention(c, c.rope(head_dim(c), interleaved=True), qk_norm=headwise(norm) if normed else None)
    spec = parallel(llama(c, attn=attn, norm=norm, norms=NORMS + QK_NORMS if normed else NORMS, tied=True))
    return replace(spec, logit_scale=float(c.get("logit_scale", default=0.0625)))


def cohere2(c: Config) -> ModelSpec:
    """Cohere with windows on three blocks of four, which alone have positions."""
    for name in ("use_gated_activation", "use_parallel_block", "use_embedding_sharing"):
        c.only(name, True)
    c.only("position_embedding_type", "rope_gptj")
    c.only("order_of_interleaved_layers", "local_attn_first")
    pattern = c.get("sliding_window_pattern", "layer_switch", default=4)
    found, attn = windows(c, sliding(c, lambda i: (i + 1) % pattern != 0)), attention(c, c.rope(head_dim(c), interleaved=True))
    positions = [attn.position if window is not None else None for window in found]
    spec = parallel(llama(c, attn=attn, norm=layer_norm(c), windows=found, positions=positions, tied=True))
    return replace(spec, logit_scale=float(c.get("logit_scale", default=0.0625)))
