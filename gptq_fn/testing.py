"""Hypothesis strategies and comparisons for testing this library, and code that uses it, by properties.

The values of large arrays come from a drawn seed; what matters about them (outliers, correlation, dead inputs) is drawn
by itself, so that a failing example shrinks to the plainest arrays that fail. Needs hypothesis, which the library does not.
"""

from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jaxtyping import Array, Float

from gptq_fn._config import QuantConfig
from gptq_fn._hessian import Hessian
from gptq_fn._quantized import QuantizedLinear

GROUP_SIZES = (16, 32, 48, 128, 256, None)


def configs(**fixed: Any) -> st.SearchStrategy[QuantConfig]:
    """Configurations without rules; `fixed` fields keep their value. Each one costs a compilation: fix what does not matter."""
    drawn = {
        "bits": st.sampled_from((2, 3, 4, 8)),
        "group_size": st.sampled_from(GROUP_SIZES),
        "sym": st.booleans(),
        "order": st.sampled_from(("natural", "act", "group")),
        "static_groups": st.booleans(),
        "grid": st.sampled_from(("minmax", "mse", "hid", "loop")),
        "negative_scales": st.booleans(),
        "damp": st.sampled_from((None, 0.01)),
    }
    fields = st.fixed_dictionaries({**drawn, **{name: st.just(value) for name, value in fixed.items()}})
    return fields.filter(_possible).map(lambda chosen: QuantConfig(**chosen))


def weights(out: int, inputs: int) -> st.SearchStrategy[Float[Array, "out in"]]:
    """Weights of very different rows: normal, with an outlier, of one sign, constant, zero, tiny."""
    kinds = st.lists(st.sampled_from(_ROWS), min_size=out, max_size=out)
    return st.builds(_weights, _SEEDS, kinds, st.just(inputs))


def activations(rows: int, inputs: int, *, whole: bool = False, dead: bool = True) -> st.SearchStrategy[Float[Array, "rows in"]]:
    """Inputs of a linear layer, as unequal and correlated as a model's, some of them always 0 where `dead`.

    Where `whole` they are whole numbers from -8 to 8, so that float32 sums of their products are exact in any order.
    """
    zero = st.lists(st.integers(0, inputs - 1), max_size=3 if dead else 0, unique=True)
    shape = st.just((rows, inputs))
    return st.builds(
        _activations, _SEEDS, shape, shared=st.sampled_from((0.0, 0.3, 1.0)), spread=st.booleans(), dead=zero, whole=st.just(whole)
    )


def hessians(inputs: int, rows: int | None = None, *, dead: bool = True) -> st.SearchStrategy[Hessian]:
    """Hessians of drawn activations, of full rank but for dead inputs unless there are fewer `rows`."""
    return activations(rows or 2 * inputs, inputs, dead=dead).map(hessian_of)


def hessian_of(x: Float[Array, "rows in"]) -> Hessian:
    """The Hessian of these rows, summed in float64."""
    exact = np.asarray(x, np.float64)
    return Hessian(jnp.asarray(exact.T @ exact, jnp.float32), jnp.asarray(len(exact), jnp.int32))


def quantized_linears(out: int, inputs: int, bits: int, *, sym: bool = False) -> st.SearchStrategy[QuantizedLinear]:
    """Valid quantized linears with any codes and scales of either sign; groups lie in a row or, as act-order leaves them, anywhere."""
    width = st.sampled_from(sorted({min(w, inputs) for w in (16, 32, 48, inputs)}))
    fixed = {"shape": st.just((out, inputs)), "bits": st.just(bits), "sym": st.just(sym)}
    return st.builds(_quantized_linear, _SEEDS, width=width, scattered=st.booleans(), biased=st.booleans(), **fixed)


def assert_equal_up_to_ties(found: QuantizedLinear, expected: QuantizedLinear, w: Float[Array, "out in"], tie: float = 1e-4) -> None:
    """Raise AssertionError unless both are the same linear, but for weights halfway between two levels.

    Grids and groups have to be equal. A code may differ by one where the weight of `w` that it stands for lies within
    `tie` steps of the middle between both levels.
    """
    for name in ("scale", "zero", "group_of"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    a, b = (np.asarray(q.codes, np.int64) for q in (found, expected))
    rows, columns = np.nonzero(a != b)
    group = np.asarray(expected.group_of)[columns]
    level = np.asarray(w, np.float64)[rows, columns] / np.asarray(expected.scale, np.float64)[rows, group]
    middle = (a + b)[rows, columns] / 2 - np.asarray(expected.zero, np.float64)[rows, group]
    wrong = (np.abs(a - b)[rows, columns] > 1) | (np.abs(level - middle) > tie)
    assert not wrong.any(), f"{wrong.sum()} codes differ away from ties, the first at row {rows[wrong][0]}, column {columns[wrong][0]}."


def _possible(fields: dict[str, Any]) -> bool:
    """Whether a configuration may have these fields together, and each of them counts."""
    found = fields["sym"] and fields["grid"] != "minmax"
    return (found or not fields["negative_scales"]) and not (fields["grid"] == "loop" and fields["static_groups"])


_SEEDS = st.integers(0, 2**32 - 1)
_ROWS = ("normal", "outlier", "positive", "negative", "constant", "zero", "tiny")


def _weights(seed: int, kinds: Collection[str], inputs: int) -> Float[Array, "out in"]:
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(len(kinds), inputs))
    for row, kind in zip(w, kinds, strict=True):
        match kind:
            case "outlier":
                row[rng.integers(inputs)] *= 20
            case "positive":
                row[:] = np.abs(row) + 1
            case "negative":
                row[:] = -np.abs(row) - 1
            case "constant":
                row[:] = row[0]
            case "zero":
                row[:] = 0
            case "tiny":
                row *= 1e-3
    return jnp.asarray(w, jnp.float32)


def _activations(
    seed: int, shape: tuple[int, int], *, shared: float, spread: bool, dead: Collection[int], whole: bool
) -> Float[Array, "rows in"]:
    rng = np.random.default_rng(seed)
    rows, inputs = shape
    x = rng.normal(size=shape) + shared * rng.normal(size=(rows, 4)) @ rng.normal(size=(4, inputs))
    if spread:  # some inputs are much larger than others
        x = x * np.exp(rng.normal(size=inputs))
    if whole:
        x = np.clip(np.round(2 * x), -8, 8)
    x[:, list(dead)] = 0
    return jnp.asarray(x, jnp.float32)


def _quantized_linear(
    seed: int, *, shape: tuple[int, int], bits: int, width: int, scattered: bool, biased: bool, sym: bool
) -> QuantizedLinear:
    rng = np.random.default_rng(seed)
    out, inputs = shape
    groups = -(-inputs // width)
    group_of = np.arange(inputs, dtype=np.int32) // width
    zero = np.full((out, groups), 2 ** (bits - 1)) if sym else rng.integers(0, 2**bits, (out, groups))
    return QuantizedLinear(
        codes=jnp.asarray(rng.integers(0, 2**bits, shape), jnp.uint8),
        scale=jnp.asarray(rng.uniform(0.001, 1, (out, groups)) * rng.choice((-1, 1), (out, groups)), jnp.float16),
        zero=jnp.asarray(zero, jnp.uint8),
        group_of=jnp.asarray(rng.permutation(group_of) if scattered else group_of),
        bits=bits,
        bias=jnp.asarray(rng.normal(size=out), jnp.float16) if biased else None,
    )
