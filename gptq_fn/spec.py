"""Descriptions of decoder-only language models: everything that varies between architectures, as frozen data.

A spec names *roles* ("q", "up", "attn_in") and says what their tensors are called in a checkpoint. `gptq_fn.model`
interprets any spec; `gptq_fn.families` derives specs from Hugging Face configs; `gptq_fn.check` holds one against the
tensors that exist. Specs are hashable: equal blocks share one compiled program.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["relu", "relu2", "silu", "gelu", "gelu_tanh", "quick_gelu"]
Tap = Literal["attn_in", "q_latent", "kv_latent", "o_in", "router_in", "mlp_in", "expert_in", "down_in", "expert_down_in"]
TAPS: tuple[Tap, ...] = ("attn_in", "q_latent", "kv_latent", "o_in", "router_in", "mlp_in", "expert_in", "down_in", "expert_down_in")
"""The activations of a block that enter linears, in forward order. Those of experts are the tokens routed to each."""

Stop = Literal["attn_in", "latent", "o_in", "router_in", "mlp_in", "down_in"]
STOP_OF: dict[Tap, Stop] = {
    "attn_in": "attn_in",
    "q_latent": "latent",
    "kv_latent": "latent",
    "o_in": "o_in",
    "router_in": "router_in",
    "mlp_in": "mlp_in",
    "expert_in": "mlp_in",
    "down_in": "down_in",
    "expert_down_in": "down_in",
}
"""Where in a block each tap is known."""

NORM_SLOTS = ("attn_in", "attn_out", "attn_res", "mlp_in", "mlp_out", "mlp_res")
"""Where a block may normalize: the input, output or residual sum of its two halves; an absent slot is identity."""
INNER_NORMS = ("q_norm", "k_norm", "q_latent", "kv_latent")
"""Norms inside attention: of queries and keys, and of the latents of latent attention."""


@dataclass(frozen=True)
class NormSpec:
    """Layer norm or RMS norm; features are scaled by `weight + offset` where there is a weight."""

    kind: Literal["layer", "rms"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class LinearScaling:
    """All rotary frequencies divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class DynamicScaling:
    """Rotary frequencies that slow down as the text grows beyond `original_length` tokens (NTK-aware, "dynamic")."""

    factor: float
    original_length: int


@dataclass(frozen=True)
class YarnScaling:
    """Slow rotary frequencies divided by `factor`, fast ones kept, with a ramp between (Peng et al. 2023, arXiv 2309.00071).

    The ramp lies between the pairs that turn `fast` and `slow` times in `original_length` tokens, at whole pairs where
    `truncate`. `amplitude` multiplies cosines and sines.
    """

    factor: float
    original_length: float
    fast: float = 32.0
    slow: float = 1.0
    amplitude: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class LongScaling:
    """A divisor for each rotary pair: `short` for texts of up to `original_length` tokens, `long` beyond (arXiv 2402.13753)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    amplitude: float = 1.0


@dataclass(frozen=True)
class Llama3Scaling:
    """Rotary pairs divided by `factor` where their wavelength is long against `original_length` tokens.

    The passage is smooth between wavelengths of `original_length / high` and `original_length / low`.
    """

    factor: float
    low: float
    high: float
    original_length: int


@dataclass(frozen=True)
class ProportionalScaling:
    """The first `part` of all pairs of a head rotates, at the frequencies of a head that rotates whole, over `factor`."""

    part: float
    factor: float = 1.0


Role = tuple[Tap, int | None, int | None]
"""What a projection of attention reads, its outputs and inputs; None is the width of the residual stream."""

RopeScaling = LinearScaling | DynamicScaling | YarnScaling | LongScaling | Llama3Scaling | ProportionalScaling


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions on the first `dim` features of a head, paired as halves or, interleaved, as neighbours."""

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class AlibiSpec:
    """A bias on attention scores that falls with distance, by a slope for each head (Press et al. 2021, arXiv 2108.12409).

    `slopes` is the order of slopes where the heads are no power of two. Falcon multiplies the bias by the scores' scale
    (`scaled`) and rounds it to bfloat16 (`rounded`). Of `steepest` s, the slopes are 2^(-s/heads) to 2^-s.
    """

    slopes: Literal["bloom", "mpt"] = "bloom"
    scaled: bool = False
    rounded: bool = False
    steepest: float = 8.0


@dataclass(frozen=True)
class QkNormSpec:
    """A norm of queries and keys: of each head, or over all heads at once ("flat"); before or after rotation."""

    over: Literal["head", "flat"]
    norm: NormSpec
    after_rope: bool = False


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with `heads` query heads that share `kv_heads` key and value heads.

    `qkv` is how the projections are stored: "separate" (roles q, k, v), or one role qkv that is "concat" [Q | K | V],
    "grouped" [kv head, (its query heads, key, value), head_dim], or "mp_split" [4, (q, v, k), heads / 4 * head_dim].
    `clip` bounds queries, keys (behind their norms, before rotation) and values. Scores are multiplied by `scale`
    (head_dim^-1/2 by default) and pass through softcap * tanh(. / softcap). `window`: a token sees itself and
    window - 1 before it. With `sinks`, a learned score for each head (the array "sinks") takes its share of the softmax.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv: Literal["separate", "concat", "grouped", "mp_split"] = "separate"
    position: RopeSpec | AlibiSpec | None = None
    scale: float | None = None
    window: int | None = None
    qk_norm: QkNormSpec | None = None
    softcap: float | None = None
    clip: float | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key and value heads evenly.")
        if self.qkv == "mp_split" and (self.heads % 4 or self.heads != self.kv_heads):
            raise ValueError(
                f"mp_split projections hold 4 equal parts of heads that share nothing, not {self.heads} heads on {self.kv_heads}."
            )

    @property
    def roles(self) -> dict[str, Role]:
        """The projections by their role."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        separate: dict[str, Role] = {"q": ("attn_in", q, None), "k": ("attn_in", kv, None), "v": ("attn_in", kv, None)}
        projections: dict[str, Role] = separate if self.qkv == "separate" else {"qkv": ("attn_in", q + 2 * kv, None)}
        return {**projections, "o": ("o_in", None, q)}

    @property
    def norms(self) -> dict[str, tuple[int, int]]:
        """Slot -> (copies, width) of the norms inside."""
        if self.qk_norm is None:
            return {}
        sizes = {"q_norm": self.heads, "k_norm": self.kv_heads}
        return {slot: (n, self.head_dim) if self.qk_norm.over == "head" else (1, n * self.head_dim) for slot, n in sizes.items()}


@dataclass(frozen=True)
class LatentAttentionSpec:
    """Multi-head latent attention (DeepSeek-AI 2024, arXiv 2405.04434): keys and values are expanded from one latent a token.

    Each head has `plain` features without position and `position.dim` rotary ones, whose keys all heads share. Roles:
    kv_a makes the latent of `kv_rank` and the rotary key, kv_b expands it to [head, plain + value_dim]; q makes the
    queries, or q_a and q_b do through a latent of `q_rank`. Latents are normalized by `norm`.
    """

    heads: int
    plain: int
    value_dim: int
    kv_rank: int
    q_rank: int | None
    position: RopeSpec
    scale: float
    norm: NormSpec

    @property
    def head_dim(self) -> int:
        """Features of a query or key."""
        return self.plain + self.position.dim

    @property
    def roles(self) -> dict[str, Role]:
        """The projections by their role."""
        q, rank = self.heads * self.head_dim, self.q_rank
        queries: dict[str, Role] = (
            {"q": ("attn_in", q, None)} if rank is None else {"q_a": ("attn_in", rank, None), "q_b": ("q_latent", q, rank)}
        )
        return {
            **queries,
            "kv_a": ("attn_in", self.kv_rank + self.position.dim, None),
            "kv_b": ("kv_latent", self.heads * (self.plain + self.value_dim), self.kv_rank),
            "o": ("o_in", None, self.heads * self.value_dim),
        }

    @property
    def norms(self) -> dict[str, tuple[int, int]]:
        """Slot -> (copies, width) of the norms inside."""
        return {"kv_latent": (1, self.kv_rank)} | ({} if self.q_rank is None else {"q_latent": (1, self.q_rank)})


@dataclass(frozen=True)
class MlpSpec:
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))` with gate and up apart or as one role gate_up [gate | up].

    With a `limit`, gates are cut above it and ups to +- it. `shift` is added to up.
    """

    act: Activation
    form: Literal["plain", "gated", "fused_gated"] = "plain"
    limit: float | None = None
    shift: float = 0.0

    @property
    def opening(self) -> tuple[str, ...]:
        """The roles that read the MLP's input."""
        return {"plain": ("up",), "gated": ("gate", "up"), "fused_gated": ("gate_up",)}[self.form]


@dataclass(frozen=True)
class MoeSpec:
    """Each token goes to `top_k` of the experts, which are `mlp`s (roles "experts.up" and so on), and to a shared MLP if any.

    The router's scores are the softmax or sigmoid of its outputs. Experts are chosen by score, plus the array
    "route_bias" where the block has one, among the `top_groups` best of `groups` groups of experts; a group is as good
    as its best expert or as its best two together. The chosen scores, divided by their sum where `renormalise`, times
    `scale`, weigh the experts' outputs. `shared` has roles "shared.up" and so on; where `shared_gate`, its output is
    multiplied by the sigmoid of one more linear, "shared_gate".
    """

    experts: int
    top_k: int
    mlp: MlpSpec
    score: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: Literal["best", "best_two"] = "best"
    shared: MlpSpec | None = None
    shared_gate: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.top_k <= self.experts:
            raise ValueError(f"A token cannot go to {self.top_k} of {self.experts} experts.")
        if self.experts % self.groups or not 0 < self.top_groups <= self.groups:
            raise ValueError(f"{self.top_groups} of {self.groups} groups cannot be chosen among {self.experts} experts.")


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a block: its role, its tensors' name after the block's prefix, and the tap it reads.

    The name of an expert's linear holds "{n}", the number of the expert. `stored` says how the weight lies on disk;
    [in, out] (GPT-2's Conv1D) is transposed once, when it is read. `quantize=False` keeps the layer as it is unless a
    rule with a configuration names it.
    """

    role: str
    name: str
    tap: Tap
    stored: Literal["out_in", "in_out"] = "out_in"
    quantize: bool = True


@dataclass(frozen=True)
class FusedSpec:
    """One tensor on disk, `name` after the block's prefix, that holds the weights or biases of all experts of some roles.

    A weight is [experts, out, in] or, stored "in_out", [experts, in, out], and a bias [experts, out]. Two roles share the
    outputs as "halves" or "interleaved". Quantized experts are stored one by one, under the names of their LinearSpecs.
    """

    name: str
    leaf: Literal["weight", "bias"]
    roles: tuple[str, ...]
    split: Literal["halves", "interleaved"] = "halves"
    stored: Literal["out_in", "in_out"] = "out_in"


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block. `norms` are pairs (slot, name after the prefix), the name None for a norm without a weight.

    Residual wiring, with absent norms as identity and s = residual_scale:
    sequential: x = attn_res(x + s attn_out(attention(attn_in(x)))); x = mlp_res(x + s mlp_out(ffn(mlp_in(x))))
    parallel:   h = attn_in(x); x = x + s attn_out(attention(h)) + s mlp_out(ffn(mlp_in(x), or h where mlp_in is absent))

    `arrays` are pairs (role, full name after the prefix) of tensors that are no linear's and no norm's: "sinks" and
    "route_bias". Norms of heads that each have a tensor hold "{n}" in their name.
    """

    attn: AttentionSpec | LatentAttentionSpec
    ffn: MlpSpec | MoeSpec
    norm: NormSpec
    linears: tuple[LinearSpec, ...]
    norms: tuple[tuple[str, str | None], ...]
    parallel: bool = False
    residual_scale: float = 1.0
    arrays: tuple[tuple[str, str], ...] = ()
    fused: tuple[FusedSpec, ...] = ()

    def __post_init__(self) -> None:
        for slot, _ in self.norms:
            if slot not in NORM_SLOTS + INNER_NORMS:
                raise ValueError(f"There is no norm slot {slot!r}; the slots are {', '.join(NORM_SLOTS + INNER_NORMS)}.")

    @property
    def shares_tap(self) -> bool:
        """Whether the feed-forward half reads what attention reads."""
        return self.parallel and "mlp_in" not in dict(self.norms)

    def linear(self, role: str) -> LinearSpec:
        """The linear with this role."""
        return next(linear for linear in self.linears if linear.role == role)

    def copies(self, role: str) -> int | None:
        """How many tensors on disk make up this role, where they are stacked; None where there is just one."""
        if role.startswith("experts."):
            return self.ffn.experts if isinstance(self.ffn, MoeSpec) else None
        name = dict(self.norms).get(role)
        return self.attn.norms[role][0] if name and "{n}" in name and role in self.attn.norms else None

    @property
    def stages(self) -> tuple[tuple[Tap, tuple[str, ...]], ...]:
        """The roles that may be quantized, grouped by the tap they read, in forward order."""
        roles: dict[Tap, tuple[str, ...]] = {tap: tuple(x.role for x in self.linears if x.tap == tap) for tap in TAPS}
        return tuple((tap, found) for tap, found in roles.items() if found)

    @property
    def stops(self) -> tuple[Stop, ...]:
        """The stops of this block in forward order."""
        latent: tuple[Stop, ...] = ("latent",) if isinstance(self.attn, LatentAttentionSpec) else ()
        router: tuple[Stop, ...] = ("router_in",) if isinstance(self.ffn, MoeSpec) else ()
        return ("attn_in", *latent, "o_in", *router, "mlp_in", "down_in")


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `tensors` are pairs (role, name) of what lies outside the blocks, the name None for a norm without a weight.

    Roles outside: embed, positions, embed_norm, project_in, final_norm, project_out, head; all but embed are optional.
    With `sinusoids`, embeddings have fixed positions added: sines, then cosines, at rates from 1 to 1/10000 radians a token.
    `ignored` are regular expressions of tensors on disk that say nothing new (buffers, copies of tied weights).
    """

    blocks: tuple[BlockSpec, ...]
    prefix: str
    tensors: tuple[tuple[str, str | None], ...]
    norm: NormSpec
    position_offset: int = 0
    sinusoids: bool = False
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    tied: bool = False
    ignored: tuple[str, ...] = ()
    origin: str | None = field(default=None, compare=False, repr=False)
    """The config.json that the spec was derived from, as text; None for a spec written by hand."""

    def name_of(self, i: int, linear: LinearSpec) -> str:
        """The full checkpoint name of a linear of block `i`, without ".weight"; of experts, with "{n}" for their number."""
        return self.prefix.format(i=i) + linear.name

    def names_of(self, i: int, linear: LinearSpec) -> Iterator[str]:
        """The full checkpoint names of the linear, or of each expert's, of block `i`."""
        name, copies = self.name_of(i, linear), self.blocks[i].copies(linear.role)
        yield from (name,) if copies is None else (name.format(n=n) for n in range(copies))

    @property
    def embedding(self) -> str:
        """The name of the embedding's weight."""
        return f"{dict(self.tensors)['embed']}.weight"
