"""Mixtures of experts whose attention is that of a dense family."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gptq_fn.families._config import Config
from gptq_fn.families.llama import (
    NORMS,
    QK_NORMS,
    attention,
    ernie4_5,
    granite,
    granite_swa,
    head_dim,
    headwise,
    hunyuan,
    llama,
    rms,
    sliding,
    windows,
    with_sinks,
)
from gptq_fn.families.olmo import olmo2
from gptq_fn.families.qwen import late_windows
from gptq_fn.spec import FusedSpec, LinearSpec, MlpSpec, ModelSpec, MoeSpec, QkNormSpec

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
W132 = ("w1", "w3", "w2")
"""The names of gate, up and down in a Mixtral."""


def expert_linears(
    at: str = "mlp.", names: tuple[str, str, str] = PROJECTIONS, *, router: str = "gate", shared: str | None = None
) -> tuple[LinearSpec, ...]:
    """The router, experts and shared MLP at this place in a block."""
    gate, up, down = (f"{at}experts.{{n}}.{name}" for name in names)
    routed = (
        LinearSpec("router", at + router, "router_in", quantize=False),
        LinearSpec("experts.gate", gate, "expert_in"),
        LinearSpec("experts.up", up, "expert_in"),
        LinearSpec("experts.down", down, "expert_down_in"),
    )
    beside = (
        LinearSpec("shared.gate", f"{at}{shared}.gate_proj", "mlp_in"),
        LinearSpec("shared.up", f"{at}{shared}.up_proj", "mlp_in"),
        LinearSpec("shared.down", f"{at}{shared}.down_proj", "down_in"),
    )
    return routed + beside if shared else routed


def with_experts(
    spec: ModelSpec,
    ffn: MoeSpec,
    linears: tuple[LinearSpec, ...],
    sparse: Callable[[int], bool] = lambda i: True,
    *,
    arrays: tuple[tuple[str, str], ...] = (),
    fused: tuple[FusedSpec, ...] = (),
) -> ModelSpec:
    """The spec with experts in place of the MLPs of the blocks that are `sparse`."""
    attn = tuple(x for x in spec.blocks[0].linears if x.tap not in ("mlp_in", "down_in"))
    blocks = (
        replace(block, ffn=ffn, linears=attn + linears, arrays=block.arrays + arrays, fused=fused) if sparse(i) else block
        for i, block in enumerate(spec.blocks)
    )
    return replace(spec, blocks=tuple(blocks))


def mixtral(c: Config) -> ModelSpec:
    """Mistral with experts."""
    spec = llama(c, attn=attention(c, window=c.get("sliding_window", default=None)))
    return with_experts(spec, softmax_experts(c), expert_linears("block_sparse_moe.", W132))


def softmax_experts(c: Config, *, top_k: int | None = None, renormalise: bool = True) -> MoeSpec:
    """Gated experts that are chosen by softmax, `top_k` or as many as the config says."""
    c.get("moe_intermediate_size", default=None)  # the tensors say so themselves
    experts, mlp = c.get("num_local_experts", "num_experts"), MlpSpec(c.act("hidden_act", "silu"), "gated")
    return MoeSpec(experts, top_k or c.get("num_experts_per_tok"), mlp, renormalise=renormalise)


def qwen2_moe(c: Config) -> ModelSpec:
    """Qwen2 with experts in some blocks, and a shared one behind a gate."""
    c.get("shared_expert_intermediate_size", default=None)
    moe = softmax_experts(c, renormalise=c.get("norm_topk_prob", default=False))
    gate = LinearSpec("shared_gate", "mlp.shared_expert_gate", "router_in", quantize=False)
    linears = (*expert_linears(shared="shared_expert"), gate)
    return with_experts(llama(c, windows=late_windows(c)), replace(moe, shared=moe.mlp, shared_gate=True), linears, _steps(c))


def qwen3_moe(c: Config) -> ModelSpec:
    """Qwen3 with experts in some blocks, and one window for all where the config asks for one."""
    window = c.get("sliding_window", default=None)
    attn = attention(c, qk_norm=headwise(rms(c)), window=window if c.get("use_sliding_window", default=False) else None)
    c.get("max_window_layers", default=None)
    moe = softmax_experts(c, renormalise=c.get("norm_topk_prob", default=False))
    return with_experts(llama(c, attn=attn, norms=NORMS + QK_NORMS), moe, expert_linears(), _steps(c))


def _steps(c: Config, usual: Sequence[int] = ()) -> Callable[[int], bool]:
    """Whether the config of a Qwen gives experts to a block; `usual` are the dense blocks where it does not say."""
    dense, step = c.get("mlp_only_layers", default=usual), c.get("decoder_sparse_step", default=1)
    return lambda i: i not in dense and (i + 1) % step == 0


def mellum(c: Config) -> ModelSpec:
    """Qwen3-MoE with windows on some blocks, which have positions of their own."""
    kinds, each = sliding(c), c.get("mlp_layer_types", default=["sparse"] * c.get("num_hidden_layers"))
    whole, local = (c.rope(head_dim(c), theta=theta, layer=kind) for kind, theta in (("full_attention", 5e5), ("sliding_attention", 1e4)))
    attn = attention(c, whole, qk_norm=headwise(rms(c)))
    positions = [(whole, local)[slide] for slide in kinds]
    spec = llama(c, attn=attn, norms=NORMS + QK_NORMS, windows=windows(c, kinds, 1024), positions=positions)
    moe = softmax_experts(c, renormalise=c.get("norm_topk_prob", default=True))
    return with_experts(spec, moe, expert_linears(), lambda i: each[i] == "sparse")


def flint(c: Config) -> ModelSpec:
    """Qwen3-MoE with attention sinks, windows on most blocks, which alone have positions, and sigmoid routing beside a shared MLP."""
    last = c.get("num_hidden_layers") - 1
    kinds = sliding(c, lambda i: i >= 2 and i % 4 != 1 and i != last)
    attn = attention(c, qk_norm=headwise(rms(c)), sinks=True)
    positions = [attn.position if slide else None for slide in kinds]
    spec = llama(c, attn=attn, norms=NORMS + QK_NORMS, windows=windows(c, kinds, 513), positions=positions)
    c.get("shared_expert_intermediate_size", default=None)
    moe = softmax_experts(c, renormalise=c.get("norm_topk_prob", default=True))
    moe = replace(moe, score="sigmoid", shared=moe.mlp)
    return with_experts(with_sinks(spec, "self_attn.softmax_offset"), moe, expert_linears(shared="shared_expert"), _steps(c, [0, 1]))


def olmoe(c: Config) -> ModelSpec:
    """Llama with experts, norms on all queries and all keys at once, and projections that may be clipped."""
    attn = attention(c, qk_norm=QkNormSpec("flat", rms(c)), clip=c.number("clip_qkv", None))
    moe = softmax_experts(c, renormalise=c.get("norm_topk_prob", default=False))
    return with_experts(llama(c, attn=attn, norms=NORMS + QK_NORMS), moe, expert_linears())


def flex_olmo(c: Config) -> ModelSpec:
    """OLMo 2 with experts."""
    return with_experts(olmo2(c), softmax_experts(c, renormalise=c.get("norm_topk_prob", default=False)), expert_linears())


def hunyuan_moe(c: Config) -> ModelSpec:
    """Hunyuan with experts and a shared MLP."""
    top_k = c.get("moe_topk", default=1)
    if isinstance(top_k, list):
        c.only("moe_topk", [top_k[0]] * len(top_k))
        top_k = top_k[0]
    moe = softmax_experts(c, top_k=top_k)
    return with_experts(hunyuan(c), replace(moe, shared=moe.mlp), expert_linears(router="gate.wg", shared="shared_mlp"))


def ernie4_5_moe(c: Config) -> ModelSpec:
    """Ernie 4.5 with experts in some blocks, chosen with a bias, and shared ones that are one MLP."""
    mlp, layers = MlpSpec(c.act("hidden_act", "silu"), "gated"), c.get("num_hidden_layers")
    first, last = c.get("moe_layer_start_index", default=1), c.get("moe_layer_end_index", default=-1)
    step, shared = c.get("moe_layer_interval", default=1), c.get("moe_num_shared_experts", default=2)
    c.get("moe_intermediate_size", "moe_norm_min", default=None)
    moe = MoeSpec(c.get("moe_num_experts"), c.get("moe_k"), mlp, shared=mlp if shared else None)
    return with_experts(
        ernie4_5(c),
        moe,
        expert_linears(shared="shared_experts" if shared else None),
        lambda i: (i + 1) % step == 0 and first <= i <= last % layers,
        arrays=(("route_bias", "mlp.moe_statics.e_score_correction_bias"),),
    )


def granitemoe(c: Config) -> ModelSpec:
    """Granite with experts, which lie together on disk, and perhaps a shared MLP."""
    at, shared = "block_sparse_moe.", c.get("shared_intermediate_size", default=0)
    moe, linears = softmax_experts(c), expert_linears(at, W132, router="router.layer")
    if shared:
        moe = replace(moe, shared=MlpSpec(moe.mlp.act, "fused_gated"))
        opening = LinearSpec("shared.gate_up", "shared_mlp.input_linear", "mlp_in")
        linears += (opening, LinearSpec("shared.down", "shared_mlp.output_linear", "down_in"))
    return with_experts(granite(c), moe, linears, fused=halves(f"{at}input_linear.weight", f"{at}output_linear.weight"))


def granitemoe_swa(c: Config) -> ModelSpec:
    """Granite-SWA with experts, which lie together on disk."""
    at = "block_sparse_moe."
    fused = halves(f"{at}experts.gate_up_proj", f"{at}experts.down_proj")
    return with_experts(granite_swa(c, tied=False), softmax_experts(c), expert_linears(at, router="router"), fused=fused)


def halves(opening: str, down: str) -> tuple[FusedSpec, ...]:
    """Two tensors that hold the weights of all experts, gate above up."""
    return FusedSpec(opening, "weight", ("experts.gate", "experts.up")), FusedSpec(down, "weight", ("experts.down",))


def gpt_oss(c: Config) -> ModelSpec:
    """Attention sinks, windows on every second block, and experts with biases, which lie interleaved on disk."""
    c.get("experts_per_token", "initial_context_length", "num_experts", "hidden_act", default=None)
    c.only("swiglu_alpha", 1.702)
    kinds = sliding(c, lambda i: i % 2 == 0)
    mlp = MlpSpec("quick_gelu", "gated", limit=c.number("swiglu_limit", 7.0), shift=1.0)
    spec = llama(c, attn=attention(c, c.rope(head_dim(c), theta=150000.0), sinks=True), windows=windows(c, kinds, 128))
    opening, down = ("experts.gate", "experts.up"), ("experts.down",)
    fused = (
        FusedSpec("mlp.experts.gate_up_proj", "weight", opening, "interleaved", "in_out"),
        FusedSpec("mlp.experts.gate_up_proj_bias", "bias", opening, "interleaved"),
        FusedSpec("mlp.experts.down_proj", "weight", down, stored="in_out"),
        FusedSpec("mlp.experts.down_proj_bias", "bias", down),
    )
    return with_experts(with_sinks(spec), replace(softmax_experts(c), mlp=mlp), expert_linears(router="router"), fused=fused)
