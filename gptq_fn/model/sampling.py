"""Which token comes next: functions of logits."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def likeliest(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """The logits with -inf where they are below the k-th largest of their row."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def nucleus(logits: Float[Array, "batch vocab"], p: Float[Array, ""]) -> Float[Array, "batch vocab"]:
    """The logits with -inf outside the fewest tokens of each row whose probabilities sum to at least `p` (arXiv 1904.09751).

    The likeliest token stays whatever `p` is; of tokens that are equally likely, all stay or none.
    """
    ranked = -jnp.sort(-logits, axis=-1)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    last = jnp.maximum((before < p).sum(-1, keepdims=True), 1) - 1
    return jnp.where(logits < jnp.take_along_axis(ranked, last, -1), -jnp.inf, logits)


def choose(
    logits: Float[Array, "batch vocab"],
    key: Key[Array, ""] | None,
    *,
    temperature: Float[Array, ""],
    top_k: int | None = None,
    top_p: Float[Array, ""] | None = None,
) -> Int[Array, " batch"]:
    """A token for each row: the likeliest one without a `key`, else one drawn.

    It is drawn at `temperature` from the `top_k` likeliest tokens, and of these from the nucleus of `top_p`.
    """
    if key is None:
        return logits.argmax(-1)
    logits = logits.astype(jnp.float32) / temperature
    if top_k is not None:
        logits = likeliest(logits, top_k)
    if top_p is not None:
        logits = nucleus(logits, top_p)
    return jax.random.categorical(key, logits)


def require_sound(*, temperature: float, top_k: int | None, top_p: float | None, key: Array | None) -> None:
    """Raise ValueError where options contradict each other."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"The temperature is {temperature}; it is 0 for the likeliest tokens, or positive for drawn ones.")
    if temperature > 0 and key is None:
        raise ValueError(f"Sampling at temperature {temperature} needs a PRNG key: pass key=jax.random.key(seed).")
    if temperature == 0 and (top_k is not None or top_p is not None):
        raise ValueError("top_k and top_p say what tokens are drawn from, but at temperature 0 none are. Pass a temperature and a key.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; at least one token has to be left to draw.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it is a probability above 0.")
