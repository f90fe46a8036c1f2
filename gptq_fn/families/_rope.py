"""Rope parameters of a config, as old and new files write them, to the scaling that they mean."""

import math
from collections.abc import Callable
from typing import Any

from gptq_fn.spec import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    ProportionalScaling,
    RopeScaling,
    YarnScaling,
)


def scaling_of(found: dict[str, Any], context: int | None, partial: float) -> RopeScaling | None:
    """The scaling that rope parameters without theta and the partial factor describe; `context` is the model's longest text.

    Raises ValueError for a type or a key that is not understood, and for a missing key.
    """
    found = {key: value for key, value in found.items() if value is not None}
    old_kind = found.pop("type", "default")
    kind = found.pop("rope_type", old_kind)
    if kind not in _KINDS:
        raise ValueError(f"The config asks for rope scaling of type {kind!r}; {', '.join(_KINDS)} are understood.")
    original = found.pop("original_max_position_embeddings", None)
    try:
        scaling = _KINDS[kind](found, original, context, partial)
    except KeyError as error:
        raise ValueError(f"The rope parameters of type {kind!r} have no {error.args[0]}.") from None
    if found:
        raise ValueError(f"The rope parameters of type {kind!r} have keys that are not understood: {', '.join(sorted(found))}.")
    return scaling


def _default(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> None:
    found.pop("factor", None)
    return None


def _linear(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> LinearScaling:
    return LinearScaling(float(found.pop("factor")))


def _dynamic(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> DynamicScaling:
    return DynamicScaling(float(found.pop("factor")), _known(context, "max_position_embeddings"))


def _yarn(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> YarnScaling:
    length = _known(original or context, "original_max_position_embeddings")
    factor = float(found.pop("factor", None) or _known(context, "factor") / length)
    part, whole = (float(found.pop(key, None) or 0) for key in ("mscale", "mscale_all_dim"))
    usual = magnitude(factor, part) / magnitude(factor, whole) if part and whole else magnitude(factor, 1.0)
    return YarnScaling(
        factor=factor,
        original_length=float(length),
        fast=float(found.pop("beta_fast", None) or 32),
        slow=float(found.pop("beta_slow", None) or 1),
        amplitude=float(found.pop("attention_factor", usual)),
        truncate=found.pop("truncate", True),
    )


def magnitude(factor: float, scale: float) -> float:
    """What yarn multiplies queries and keys by together, for texts longer by `factor` (DeepSeek's mscale)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> LongScaling:
    length = _known(original or context, "original_max_position_embeddings")
    factor = float(found.pop("factor", None) or _known(context, "factor") / length)
    usual = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(length))
    short, long = (tuple(map(float, found.pop(key))) for key in ("short_factor", "long_factor"))
    return LongScaling(short, long, length, float(found.pop("attention_factor", usual)))


def _llama3(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> Llama3Scaling:
    factor, low, high = (float(found.pop(key)) for key in ("factor", "low_freq_factor", "high_freq_factor"))
    return Llama3Scaling(factor, low, high, _known(original or context, "original_max_position_embeddings"))


def _proportional(found: dict[str, Any], original: int | None, context: int | None, partial: float) -> ProportionalScaling:
    return ProportionalScaling(partial, float(found.pop("factor", 1.0)))


def _known(value: int | None, key: str) -> int:
    if value is None:
        raise KeyError(key)
    return value


_KINDS: dict[str, Callable[[dict[str, Any], int | None, int | None, float], RopeScaling | None]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "su": _longrope,  # longrope as the first Phi-3 files call it
    "llama3": _llama3,
    "proportional": _proportional,
}
