"""How well a model predicts held-out text, and how far a quantized one strays from its float original."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptq_fn import ModelSpec, QuantizedLinear, dequantize, forward
from gptq_fn_interop.windows import Window

Model = tuple[Mapping[str, Any], ModelSpec]
"""(params, spec), as `load_gptq` returns them."""

Predict = Callable[[Int[Array, "batch time"]], Float[Array, "batch time vocab"]]
"""Logits from token ids."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What was measured at each scored token of a window; arrays [scored], natural logarithms. All but `nll` need a reference."""

    nll: np.ndarray
    """Negative log likelihood."""
    reference_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    """KL(reference || model) of the predictions."""
    same: np.ndarray | None = None
    """Whether both models find the same token likeliest."""


@dataclass(frozen=True)
class Evaluation:
    """Means over predicted tokens, in nats, with standard errors over windows; what compares needs a reference.

    Tokens of a window are not independent, so a mean over tokens errs as the windows differ. An error is NaN for one window.
    """

    tokens: int
    nll: float
    nll_error: float
    reference_nll: float | None = None
    change_error: float | None = None
    """The error of nll - reference_nll, from the differences at the same tokens."""
    kl: float | None = None
    kl_error: float | None = None
    kl_99: float | None = None
    """What 99% of the tokens' KL are below."""
    agreement: float | None = None
    """How often both models find the same token likeliest."""
    agreement_error: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log likelihood."""
        return float(np.exp(self.nll))

    @property
    def perplexity_error(self) -> float:
        """The standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_error


def evaluate(
    model: Model | Predict,
    tokens: Int[np.ndarray, "samples time"] | Sequence[Window],
    reference: Model | Predict | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Perplexity of `model` on `tokens`, each window on its own; with a `reference`, KL(reference || model) per token.

    Rows of an array are scored from their second token on; `strided` and `chunks` make other windows. Quantized weights are
    dequantized once, to float32. `progress` is called with the windows done and their number. Raises ValueError
    for tokens that the model does not know, where there is nothing to measure, and where the reference predicts other tokens.
    """
    found = []
    for row in score(model, tokens, reference):
        found.append(row)
        if progress:
            progress(len(found), len(tokens))
    return summary(found)


def score(
    model: Model | Predict, tokens: Int[np.ndarray, "samples time"] | Sequence[Window], reference: Model | Predict | None = None
) -> Iterator[Scores]:
    """The scores of each window as soon as they are there; see `evaluate`.

    Raises ValueError for tokens that the model does not know, and where its reference predicts another number of tokens.
    """
    predict, compare = predictor(model), None if reference is None else predictor(reference)
    for window in tokens:
        window = window if isinstance(window, Window) else Window(window)
        x = jnp.asarray(window.tokens, jnp.int32)[None]
        logits = predict(x)
        if window.tokens.max() >= logits.shape[-1]:
            raise ValueError(
                f"Tokens reach to {window.tokens.max()} but the model knows {logits.shape[-1]}: another model's tokenizer made them."
            )
        if compare is None:
            yield Scores(_host(_nll(logits, x), window))
            continue
        other = compare(x)
        if logits.shape != other.shape:
            raise ValueError(
                f"The model predicts {logits.shape[-1]} tokens and its reference {other.shape[-1]}; compare models of one vocabulary."
            )
        yield Scores(*(_host(a, window) for a in (_nll(logits, x), _nll(other, x), *_against(logits, other))))


def summary(found: Sequence[Scores]) -> Evaluation:
    """Means and standard errors of windows' scores. Raises ValueError where there is none."""
    if not found:
        raise ValueError("There is nothing to measure: the text fills no window; give more text, or ask for shorter windows.")
    count = sum(len(row.nll) for row in found)
    nll, nll_error = mean([row.nll for row in found])
    if found[0].kl is None:
        return Evaluation(count, nll, nll_error)
    kls: Any = [row.kl for row in found]
    references: Any = [row.reference_nll for row in found]
    kl, kl_error = mean(kls)
    agreement, agreement_error = mean([row.same for row in found])
    _, change_error = mean([row.nll - other for row, other in zip(found, references, strict=True)])
    high = float(np.quantile(np.concatenate(kls), 0.99))
    return Evaluation(count, nll, nll_error, mean(references)[0], change_error, kl, kl_error, high, agreement, agreement_error)


def mean(groups: Sequence[Any]) -> tuple[float, float]:
    """The mean of all values in groups (arrays [n_i]), and its standard error where groups are independent and their values not.

    The mean is a ratio of sums over groups, whose error is that of the groups' residuals (Cochran, Sampling Techniques, 6.4);
    with groups of one size it is the standard error of the groups' means.
    """
    sums, sizes = (np.asarray([f(group) for group in groups], np.float64) for f in (lambda g: np.sum(g, dtype=np.float64), len))
    ratio = sums.sum() / sizes.sum()
    n = len(groups)
    error = math.sqrt(n / (n - 1) * np.square(sums - ratio * sizes).sum()) / sizes.sum() if n > 1 else math.nan
    return float(ratio), float(error)


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


def _host(a: Array, window: Window) -> np.ndarray:
    """What belongs to the scored tokens of a window, of what was computed for each but the first."""
    return np.asarray(a)[window.first - 1 :]


@jax.jit
def _nll(logits: Float[Array, "1 time vocab"], x: Int[Array, "1 time"]) -> Float[Array, " time-1"]:
    """Negative log likelihood of each token but the first."""
    log_p = jax.nn.log_softmax(logits[0, :-1].astype(jnp.float32))
    return -jnp.take_along_axis(log_p, x[0, 1:, None], axis=1)[:, 0]


@jax.jit
def _against(logits: Float[Array, "1 time vocab"], reference: Float[Array, "1 time vocab"]) -> tuple[Array, Array]:
    """KL from the reference, and whether the likeliest tokens are the same, for each token but the first; both [time - 1]."""
    log_p, log_r = (jax.nn.log_softmax(a[0, :-1].astype(jnp.float32)) for a in (logits, reference))
    return (jnp.exp(log_r) * (log_r - log_p)).sum(-1), log_p.argmax(-1) == log_r.argmax(-1)
