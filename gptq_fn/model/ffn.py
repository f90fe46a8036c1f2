"""The feed-forward half of a block: plain and gated MLPs."""

from collections.abc import Callable, Mapping
from math import pi
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn.model.linear import Input, Joined, Product, linear, linears, multiplied
from gptq_fn.spec import Activation, MlpSpec

_ACT: dict[Activation, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


_SIGMOID: dict[Activation, tuple[float, float]] = {
    "silu": (1.0, 0.0),
    "gelu_tanh": (2 * (2 / pi) ** 0.5, 2 * (2 / pi) ** 0.5 * 0.044715),
    "quick_gelu": (1.702, 0.0),
}
"""a and b of the activations that are x * sigmoid(a x + b x^3)."""


def expand(spec: MlpSpec, p: Mapping[str, Any], x: Input) -> Float[Array, "*rows hidden"]:
    """What enters the down projection."""
    joined = p.get("gate+up") if spec.form == "gated" else p.get("gate_up")
    whole = joined.whole if isinstance(joined, Joined) else joined
    if isinstance(whole, Product) and spec.act in _SIGMOID and spec.limit is None and spec.shift == 0:
        return multiplied(whole, x, gate=_SIGMOID[spec.act])
    act = _ACT[spec.act]
    match spec.form:
        case "plain":
            return act(linear(p["up"], x))
        case "gated":
            gate, up = linears(p, ("gate", "up"), x)
        case "fused_gated":
            gate, up = jnp.split(linear(p["gate_up"], x), 2, -1)
    if spec.limit is not None:
        gate, up = jnp.minimum(gate, spec.limit), jnp.clip(up, -spec.limit, spec.limit)
    return act(gate) * (up + spec.shift)
