"""The feed-forward half of a block: plain and gated MLPs."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptq_fn.model.linear import linear, linears
from gptq_fn.spec import Activation, MlpSpec

_ACT: dict[Activation, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


def expand(spec: MlpSpec, p: Mapping[str, Any], x: Float[Array, "*rows width"]) -> Float[Array, "*rows hidden"]:
    """What enters the down projection."""
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
