"""One decoder block as four steps, each of which ends at a tap: an activation that enters linears.

Quantizing needs what enters each group of linears after the groups before it were rounded. With the block cut at its
taps nothing is computed twice: a step takes up where the one before left off.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxtyping import Array, Float

from gptq_fn.model.attention import Cache, attention
from gptq_fn.model.ffn import expand
from gptq_fn.model.linear import linear
from gptq_fn.model.norm import norm
from gptq_fn.spec import TAPS, BlockSpec, Tap

BlockParams = Mapping[str, Any]
"""Role -> a Linear, or {"weight", "bias"} of a norm."""


class State(NamedTuple):
    """A block under way: the residual stream and what enters the next linears."""

    x: Float[Array, "batch time width"]
    tap: Float[Array, "batch time features"]


def enter(spec: BlockSpec, p: BlockParams, x: Float[Array, "batch time width"]) -> State:
    """The state at tap "attn_in"."""
    return State(x, norm(spec.norm, p.get("attn_in"), x))


def advance(spec: BlockSpec, p: BlockParams, state: State, tap: Tap, cache: Cache | None = None) -> tuple[State, Cache | None]:
    """The state at the tap after `tap`; after "down_in" both its fields are the block's output."""
    x, h = state
    match tap:
        case "attn_in":
            mixed, cache = attention(spec.attn, p, h, cache)
            return State(x, mixed), cache
        case "o_in":
            attended = norm(spec.norm, p.get("attn_out"), linear(p["o"], h))
            if spec.parallel:
                h = norm(spec.norm, p["mlp_in"], x) if "mlp_in" in p else norm(spec.norm, p.get("attn_in"), x)
                return State(x + attended, h), cache
            x = norm(spec.norm, p.get("attn_res"), x + attended)
            return State(x, norm(spec.norm, p.get("mlp_in"), x)), cache
        case "mlp_in":
            return State(x, expand(spec.ffn, p, h)), cache
        case "down_in":
            x = norm(spec.norm, p.get("mlp_res"), x + norm(spec.norm, p.get("mlp_out"), linear(p["down"], h)))
            return State(x, x), cache


def block(
    spec: BlockSpec, p: BlockParams, x: Float[Array, "batch time width"], cache: Cache | None = None
) -> tuple[Float[Array, "batch time width"], dict[Tap, Array], Cache | None]:
    """The block's output, the activations that enter its linears, and the cache with these tokens appended."""
    state, taps = enter(spec, p, x), {}
    for tap in TAPS:
        taps[tap] = state.tap
        state, cache = advance(spec, p, state, tap, cache)
    return state.x, taps, cache
