"""One decoder block as a few steps, each of which ends at a stop: where activations (taps) enter linears.

Quantizing needs what enters each group of linears after the groups before it were rounded. With the block cut at its
stops nothing is computed twice: a step takes up where the one before left off.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float

from gptq_fn.model.attention import Cache, attention
from gptq_fn.model.ffn import expand
from gptq_fn.model.latent import attend, compress
from gptq_fn.model.linear import Input, linear, normed, value_of
from gptq_fn.model.moe import Route, mix_experts, route, shared_params
from gptq_fn.model.norm import norm
from gptq_fn.spec import AttentionSpec, BlockSpec, LatentAttentionSpec, MlpSpec, MoeSpec, Stop, Tap

BlockParams = Mapping[str, Any]
"""Role -> a Linear (with a leading axis for experts), {"weight", "bias"} of a norm, or an array."""


class State(NamedTuple):
    """A block under way: the residual stream, what enters the next linears, and what else the next steps need."""

    x: Float[Array, "batch time width"]
    taps: Mapping[str, Input]
    held: dict[str, Any]


def enter(spec: BlockSpec, p: BlockParams, x: Float[Array, "batch time width"]) -> State:
    """The state at the stop "attn_in"."""
    return State(x, {"attn_in": normed(spec.norm, p, "attn_in", x)}, {})


def advance(spec: BlockSpec, p: BlockParams, state: State, stop: Stop, cache: Cache | None = None) -> tuple[State, Cache | None]:
    """The state at the stop after `stop`; after "down_in" it has no taps and x is the block's output."""
    x, taps, held = state
    match stop:
        case "attn_in" if isinstance(spec.attn, AttentionSpec):
            mixed, cache = attention(spec.attn, p, taps["attn_in"], cache)
            return State(x, {"o_in": mixed}, {}), cache
        case "attn_in":
            assert isinstance(spec.attn, LatentAttentionSpec)
            return State(x, *compress(spec.attn, p, taps["attn_in"])), cache
        case "latent":
            assert isinstance(spec.attn, LatentAttentionSpec)
            mixed, cache = attend(spec.attn, p, taps, held, cache)
            return State(x, {"o_in": mixed}, {}), cache
        case "o_in":
            x, h = _attended(spec, p, x, taps["o_in"])
            return State(x, {"router_in" if isinstance(spec.ffn, MoeSpec) else "mlp_in": h}, {}), cache
        case "router_in":
            assert isinstance(spec.ffn, MoeSpec)
            h = value_of(taps["router_in"])
            gate = {"gate": jax.nn.sigmoid(linear(p["shared_gate"], h))} if spec.ffn.shared_gate else {}
            return State(x, {"mlp_in": h}, {"route": route(spec.ffn, p, h), **gate}), cache
        case "mlp_in" if isinstance(spec.ffn, MoeSpec):
            h, shared = taps["mlp_in"], spec.ffn.shared
            inner = {} if shared is None else {"down_in": expand(shared, shared_params(p), h)}
            return State(x, inner, {**held, "experts_in": h}), cache
        case "mlp_in":
            assert isinstance(spec.ffn, MlpSpec)
            return State(x, {"down_in": expand(spec.ffn, p, taps["mlp_in"])}, {}), cache
        case "down_in":
            if isinstance(spec.ffn, MoeSpec):
                x = x + _scaled(spec, norm(spec.norm, p.get("mlp_out"), _mixed(spec, spec.ffn, p, taps, held)))
            else:
                x = _onto(spec, p, x, "down", taps["down_in"], "mlp_out")
            return State(norm(spec.norm, p.get("mlp_res"), x), {}, {}), cache


def block(
    spec: BlockSpec, p: BlockParams, x: Float[Array, "batch time width"], cache: Cache | None = None
) -> tuple[Float[Array, "batch time width"], dict[Tap, Array], Cache]:
    """The block's output, the activations that enter its linears, and the cache with these tokens appended.

    What enters experts is not among the activations: it is those of "mlp_in" that are routed to each.
    """
    state, taps = enter(spec, p, x), {}
    for stop in spec.stops:
        taps |= {tap: value_of(read) for tap, read in state.taps.items()}
        state, cache = advance(spec, p, state, stop, cache)
    assert cache is not None  # attention makes one where there was none
    return state.x, taps, cache


def _attended(spec: BlockSpec, p: BlockParams, x: Array, mixed: Input) -> tuple[Array, Input]:
    """The residual stream with attention's output added, and what enters the feed-forward half."""
    after = _onto(spec, p, x, "o", mixed, "attn_out")
    if spec.parallel:
        return after, normed(spec.norm, p, "mlp_in" if "mlp_in" in p else "attn_in", x)
    x = norm(spec.norm, p.get("attn_res"), after)
    return x, normed(spec.norm, p, "mlp_in", x)


def _onto(spec: BlockSpec, p: BlockParams, x: Array, role: str, read: Input, out: str) -> Array:
    """x with what a half's last linear makes added, by the linear itself where nothing stands between."""
    if p.get(out) is None and spec.residual_scale == 1:
        return linear(p[role], read, plus=x)
    return x + _scaled(spec, norm(spec.norm, p.get(out), linear(p[role], read)))


def _mixed(spec: BlockSpec, ffn: MoeSpec, p: BlockParams, taps: Mapping[str, Input], held: Mapping[str, Any]) -> Array:
    """The output of experts."""
    out = mix_experts(ffn, p, held["experts_in"], Route(*held["route"]))
    if ffn.shared is None:
        return out
    shared = linear(p["shared.down"], taps["down_in"])
    return out + (shared * held["gate"] if ffn.shared_gate else shared)


def _scaled(spec: BlockSpec, half: Array) -> Array:
    return half if spec.residual_scale == 1 else half * spec.residual_scale
