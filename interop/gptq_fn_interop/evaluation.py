"""How well a model predicts held-out text, and how far a quantized one strays from its float original."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptq_fn import ModelSpec, QuantizedLinear, dequantize, forward

Model = tuple[Mapping[str, Any], ModelSpec]
"""(params, spec), as `load_gptq` returns them."""

Predict = Callable[[Int[Array, "1 time"]], Float[Array, "1 time vocab"]]
"""Logits from token ids."""


@dataclass(frozen=True)
class Evaluation:
    """Means over predicted tokens, in nats; the standard error is over samples. `kl` and `agreement` need a reference."""

    tokens: int
    nll: float
    kl: float | None = None
    kl_error: float | None = None
    agreement: float | None = None
    """How often both models find the same token likeliest."""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return math.exp(self.nll)


def evaluate(
    model: Model | Predict,
    tokens: Int[np.ndarray, "samples time"],
    reference: Model | Predict | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` on `tokens`, each sample on its own; with a `reference`, KL(reference || model) per token.

    Quantized weights are dequantized once, to float32. `progress` is called with the samples done and their number.
    """
    predict, compare = predictor(model), None if reference is None else predictor(reference)
    rows = []
    for i, sample in enumerate(tokens):
        x = jnp.asarray(sample, jnp.int32)[None]
        logits = predict(x)
        other = logits if compare is None else compare(x)
        rows.append(np.asarray(_measure(logits, other, x), np.float64))
        if progress:
            progress(i + 1, len(tokens))
    nll, kl, same = np.asarray(rows).T
    count = len(tokens) * (tokens.shape[1] - 1)
    if reference is None:
        return Evaluation(count, float(nll.mean()))
    spread = float(kl.std(ddof=1) / math.sqrt(len(kl))) if len(kl) > 1 else math.nan
    return Evaluation(count, float(nll.mean()), float(kl.mean()), spread, float(same.mean()))


def predictor(model: Model | Predict) -> Predict:
    """The function that predicts as this model does."""
    return partial(forward, model[1], dense(model[0])) if isinstance(model, tuple) else model


def dense(params: Mapping[str, Any]) -> dict[str, Any]:
    """The same model with float32 weights in place of quantized ones."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, QuantizedLinear):
            return jax.tree.map(lambda a: a.astype(jnp.float32), x)
        bias = {} if x.bias is None else {"bias": x.bias.astype(jnp.float32)}
        return {"weight": jax.jit(dequantize)(x), **bias}

    return {
        "top": {role: leaf(x) for role, x in params["top"].items()},
        "blocks": [{role: leaf(x) for role, x in p.items()} for p in params["blocks"]],
    }


@jax.jit
def _measure(logits: Float[Array, "1 time vocab"], reference: Float[Array, "1 time vocab"], x: Int[Array, "1 time"]) -> Float[Array, "3"]:
    """Means over one sample: negative log likelihood, KL from the reference, agreement of the likeliest tokens."""
    log_p, log_r = (jax.nn.log_softmax(a[0, :-1].astype(jnp.float32)) for a in (logits, reference))
    nll = -jnp.take_along_axis(log_p, x[0, 1:, None], axis=1).mean()
    kl = (jnp.exp(log_r) * (log_r - log_p)).sum(-1).mean()
    same = (log_p.argmax(-1) == log_r.argmax(-1)).astype(jnp.float32).mean()
    return jnp.stack([nll, kl, same])
