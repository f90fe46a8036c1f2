"""Descriptions of decoder-only language models: everything that varies between architectures, as frozen data.

A spec names *roles* ("q", "up", "attn_in") and says what their tensors are called in a checkpoint. `gptq_fn.model`
interprets any spec; `gptq_fn.families` derives specs from Hugging Face configs; `gptq_fn.check` holds one against the
tensors that exist. Specs are hashable: equal blocks share one compiled program.
"""

from dataclasses import dataclass, field
from typing import Literal

Activation = Literal["relu", "silu", "gelu", "gelu_tanh"]
Tap = Literal["attn_in", "o_in", "mlp_in", "down_in"]
TAPS: tuple[Tap, ...] = ("attn_in", "o_in", "mlp_in", "down_in")
"""The four activations of a block that enter linears, in forward order."""

NORM_SLOTS = ("attn_in", "attn_out", "attn_res", "mlp_in", "mlp_out", "mlp_res")
"""Where a block may normalize: the input, output or residual sum of its two halves; an absent slot is identity."""


@dataclass(frozen=True)
class NormSpec:
    """Layer norm or RMS norm; features are scaled by `weight + offset`."""

    kind: Literal["layer", "rms"]
    eps: float
    offset: float = 0.0


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than in pretraining.

    "linear" divides all of them by `factor`; "llama3" only those whose wavelength is long against `original_length`
    tokens, with a smooth passage between `original_length / high` and `original_length / low`.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


@dataclass(frozen=True)
class RopeSpec:
    """Rotary positions on the first `dim` features of a head, paired as halves or, interleaved, as neighbours."""

    dim: int
    theta: float = 10000.0
    interleaved: bool = False
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class AttentionSpec:
    """Causal attention with `heads` query heads that share `kv_heads` key and value heads.

    `qkv` is how the projections are stored: "separate" (roles q, k, v), or one role qkv that is "concat" [Q | K | V] or
    "grouped" [kv head, (its query heads, key, value), head_dim]. `window`: a token sees itself and window - 1 before it.
    """

    heads: int
    kv_heads: int
    head_dim: int
    qkv: Literal["separate", "concat", "grouped"] = "separate"
    position: RopeSpec | None = None
    scale: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads cannot share {self.kv_heads} key and value heads evenly.")


@dataclass(frozen=True)
class MlpSpec:
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`."""

    act: Activation
    form: Literal["plain", "gated"] = "plain"


@dataclass(frozen=True)
class LinearSpec:
    """One linear layer of a block: its role, its tensors' name after the block's prefix, and the tap it reads.

    `stored` says how its weight lies on disk; [in, out] (GPT-2's Conv1D) is transposed once, when it is read.
    `quantize=False` keeps the layer as it is.
    """

    role: str
    name: str
    tap: Tap
    stored: Literal["out_in", "in_out"] = "out_in"
    quantize: bool = True


@dataclass(frozen=True)
class BlockSpec:
    """One decoder block. `norms` are pairs (slot, name after the prefix).

    Residual wiring, with absent norms as identity:
    sequential: x = attn_res(x + attn_out(attention(attn_in(x)))); x = mlp_res(x + mlp_out(ffn(mlp_in(x))))
    parallel:   h = attn_in(x); x = x + attn_out(attention(h)) + mlp_out(ffn(mlp_in(x), or h where mlp_in is absent))
    """

    attn: AttentionSpec
    ffn: MlpSpec
    norm: NormSpec
    linears: tuple[LinearSpec, ...]
    norms: tuple[tuple[str, str], ...]
    parallel: bool = False

    def __post_init__(self) -> None:
        for slot, _ in self.norms:
            if slot not in NORM_SLOTS:
                raise ValueError(f"There is no norm slot {slot!r}; the slots are {', '.join(NORM_SLOTS)}.")

    @property
    def shares_tap(self) -> bool:
        """Whether the feed-forward half reads what attention reads."""
        return self.parallel and "mlp_in" not in dict(self.norms)

    def linear(self, role: str) -> LinearSpec:
        """The linear with this role."""
        return next(linear for linear in self.linears if linear.role == role)

    @property
    def stages(self) -> tuple[tuple[Tap, tuple[str, ...]], ...]:
        """The roles to quantize, grouped by the tap they read, in forward order."""
        roles: dict[Tap, tuple[str, ...]] = {tap: tuple(x.role for x in self.linears if x.tap == tap and x.quantize) for tap in TAPS}
        return tuple((tap, found) for tap, found in roles.items() if found)


@dataclass(frozen=True)
class ModelSpec:
    """A whole model. `tensors` are pairs (role, name) of what lies outside the blocks.

    Roles outside: embed, positions, embed_norm, project_in, final_norm, project_out, head; all but embed are optional.
    `ignored` are regular expressions of tensors on disk that say nothing new (buffers, copies of tied weights).
    """

    blocks: tuple[BlockSpec, ...]
    prefix: str
    tensors: tuple[tuple[str, str], ...]
    norm: NormSpec
    position_offset: int = 0
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    tied: bool = False
    ignored: tuple[str, ...] = ()
    origin: str | None = field(default=None, compare=False, repr=False)
    """The config.json that the spec was derived from, as text; None for a spec written by hand."""

    def name_of(self, i: int, linear: LinearSpec) -> str:
        """The full checkpoint name of a linear of block `i`, without ".weight"."""
        return self.prefix.format(i=i) + linear.name
