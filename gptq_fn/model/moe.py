"""Mixtures of experts: routing, and experts as one program over parameters with a leading axis."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptq_fn.model.ffn import expand
from gptq_fn.model.linear import Linear, linear
from gptq_fn.spec import MoeSpec


class Route(NamedTuple):
    """The experts of each token, and the weights of their outputs."""

    expert: Int[Array, "*rows top_k"]
    weight: Float[Array, "*rows top_k"]

    def chosen(self, n: Int[Array, ""] | int) -> Bool[Array, "*rows"]:
        """Which tokens go to expert `n`."""
        return (self.expert == n).any(-1)

    def share(self, n: Int[Array, ""] | int) -> Float[Array, "*rows"]:
        """The weight of expert `n` for each token; 0 for those that do not go there."""
        return jnp.where(self.expert == n, self.weight, 0).sum(-1)


def route(spec: MoeSpec, p: Mapping[str, Any], h: Float[Array, "*rows width"]) -> Route:
    """Where each token goes. Scores are computed in float32 from logits in h's dtype."""
    logits = linear(p["router"], h).astype(jnp.float32)
    scores = jax.nn.softmax(logits, -1) if spec.score == "softmax" else jax.nn.sigmoid(logits)
    wanted = scores
    if "route_bias" in p:
        bias = p["route_bias"].astype(jnp.float32)
        wanted = scores + bias.reshape((1,) * (scores.ndim - 1) + (-1,))
    if spec.groups > 1:
        groups = wanted.reshape(*wanted.shape[:-1], spec.groups, -1)
        best = jax.lax.top_k(groups, 1 if spec.group_score == "best" else 2)[0].sum(-1)
        limit = jax.lax.top_k(best, spec.top_groups)[0][..., -1:]
        wanted = jnp.where((best >= limit)[..., None], groups, -jnp.inf).reshape(wanted.shape)
    expert = jax.lax.top_k(wanted, spec.top_k)[1]
    weight = jnp.take_along_axis(scores, expert, -1)
    if spec.renormalise:
        weight = weight / (weight.sum(-1, keepdims=True) + 1e-20)
    return Route(expert, (weight * spec.scale).astype(h.dtype))


def expert_params(p: Mapping[str, Any]) -> dict[str, Linear]:
    """The experts' parameters by the role that each has inside an expert, all with a leading axis of experts."""
    return {role.removeprefix("experts."): leaf for role, leaf in p.items() if role.startswith("experts.")}


def shared_params(p: Mapping[str, Any]) -> dict[str, Linear]:
    """The shared MLP's parameters by their role inside it."""
    return {role.removeprefix("shared."): leaf for role, leaf in p.items() if role.startswith("shared.")}


def mix_experts(spec: MoeSpec, p: Mapping[str, Any], h: Float[Array, "*rows width"], to: Route) -> Float[Array, "*rows width"]:
    """The weighted sum of the experts' outputs.

    Every expert sees every token and the weights of those not routed to it are 0, so that shapes do not depend on the
    routing; one expert is at work at a time. Of few tokens, only the experts that they go to are run.
    """
    experts = expert_params(p)
    rows = h.reshape(-1, h.shape[-1])
    if len(rows) * spec.top_k < spec.experts:
        return _few(spec, experts, rows, Route(*(a.reshape(len(rows), -1) for a in to))).reshape(h.shape)

    def add(y: Array, one: tuple[Array, Mapping[str, Linear]]) -> tuple[Array, None]:
        n, mine = one
        out = linear(mine["down"], expand(spec.mlp, mine, h))
        return y + out * to.share(n)[..., None], None

    return jax.lax.scan(add, jnp.zeros_like(h), (jnp.arange(spec.experts), experts))[0]


def _few(spec: MoeSpec, experts: Mapping[str, Linear], rows: Float[Array, "n width"], to: Route) -> Float[Array, "n width"]:
    def one(task: tuple[Array, Array, Array]) -> Array:
        x, n, weight = task
        mine = jax.tree.map(lambda a: a[n], experts)
        return linear(mine["down"], expand(spec.mlp, mine, x[None]))[0] * weight

    tasks = jnp.repeat(rows, spec.top_k, axis=0), to.expert.reshape(-1), to.weight.reshape(-1)
    return jax.lax.map(one, tasks).reshape(len(rows), spec.top_k, -1).sum(1)
