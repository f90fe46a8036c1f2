"""The feed-forward half of a block."""

from collections.abc import Callable, Mapping

import jax
from jaxtyping import Array, Float

from gptq_fn.model.linear import Linear, linear
from gptq_fn.spec import Activation, MlpSpec

_ACT: dict[Activation, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def expand(spec: MlpSpec, p: Mapping[str, Linear], x: Float[Array, "*rows width"]) -> Float[Array, "*rows hidden"]:
    """What enters the down projection."""
    act = _ACT[spec.act]
    return act(linear(p["gate"], x)) * linear(p["up"], x) if spec.form == "gated" else act(linear(p["up"], x))
