"""Quantizing the linears that read one input: their Hessian in, codes and reports out."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_fn._config import QuantConfig
from gptq_fn._hessian import Hessian
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._report import LinearReport
from gptq_fn._solve import Factor, factor, round_to_nearest, solve


def quantize_linears(
    linears: Mapping[str, Mapping[str, Any]], h: Hessian, plan: Mapping[str, QuantConfig]
) -> Iterator[tuple[str, QuantizedLinear, LinearReport]]:
    """Each of these linears quantized, with its report; `h` is the Hessian of the input that they share.

    `linears` maps names to {"weight": [out, in], "bias": [out]}, the bias optional, and `plan` the same names to
    configurations. Linears of one configuration are solved together, as rows of one matrix. Raises ValueError naming
    the linear for weights that are not finite or too large, that have another width than `h`, and for a Hessian that
    cannot be factorized.
    """
    rows = int(h.rows)
    for config, together in alike(plan).items():
        began = time.perf_counter()
        for name in together:
            require_finite(name, linears[name]["weight"])
        w = jnp.concatenate([linears[name]["weight"].astype(jnp.float32) for name in together])
        if w.shape[1] != len(h.xx):
            raise ValueError(
                f"{together[0]}: its weight has {w.shape[1]} inputs but {len(h.xx)} features enter it. "
                "Weights are [out, in]; a Conv1D checkpoint needs stored='in_out' in its LinearSpec."
            )
        f = factor(h, config)
        require_solvable(together[0], f.damp)
        rounded = round_to_nearest(w, config)
        q = rounded if rows < config.min_rows else solve(w, f, config)[0]
        losses = energies(w, q, rounded, h)
        require_storable(together[0], q.scale)
        seconds, start = time.perf_counter() - began, 0
        for name in together:
            mine = slice(start, start + linears[name]["weight"].shape[0])
            start = mine.stop
            linear = QuantizedLinear(q.codes[mine], q.scale[mine], q.zero[mine], q.group_of, q.bits, linears[name].get("bias"))
            lost = Losses(*(a[mine] for a in losses))
            yield name, linear, report_of(name, config, linear.shape, lost, f, rows, seconds * linear.shape[0] / len(w))


def alike(plan: Mapping[str, QuantConfig]) -> dict[QuantConfig, list[str]]:
    """The names of `plan` by their configuration."""
    found: dict[QuantConfig, list[str]] = defaultdict(list)
    for name, config in plan.items():
        found[config].append(name)
    return found


def report_of(
    name: str, config: QuantConfig, shape: tuple[int, int], losses: "Losses", f: Factor, rows: int, seconds: float
) -> LinearReport:
    """The report of a linear that was quantized with this factor; `losses` are those of its rows."""
    lost, rounding, whole = (float(np.asarray(a, np.float64).sum()) for a in losses)
    return LinearReport(
        name=name,
        bits=config.bits,
        group_size=config.group_size,
        shape=shape,
        rows=rows,
        dead=int(f.dead.sum()),
        error=_relative(lost, whole),
        rtn_error=_relative(rounding, whole),
        damp=float(f.damp),
        seconds=seconds,
        rounded=rows < config.min_rows,
    )


def require_solvable(name: str, damp: Float[Array, ""]) -> None:
    """Raise ValueError where no damping helped."""
    if not bool(jnp.isfinite(damp)):
        raise ValueError(f"{name}: its Hessian cannot be factorized at any damping; its inputs may overflow float32.")


def require_storable(name: str, scale: Float[Array, "out groups"]) -> None:
    """Raise ValueError where a scale overflowed."""
    if not bool(jnp.isfinite(scale).all()):
        raise ValueError(f"{name}: a scale overflows float16, the type that checkpoints store; its weights are too large.")


def require_finite(name: str, weight: Float[Array, "out in"]) -> None:
    """Raise ValueError where a weight is not finite."""
    if not bool(jnp.isfinite(weight).all()):
        raise ValueError(f"{name}: its weight holds infinite or NaN values; the checkpoint is damaged.")


class Losses(NamedTuple):
    """Of each row, the squared norm over the calibration inputs of its error, of rounding's error, and of its output."""

    lost: Float[Array, " out"]
    rounding: Float[Array, " out"]
    whole: Float[Array, " out"]


@jax.jit
def energies(w: Float[Array, "out in"], q: QuantizedLinear, rounded: QuantizedLinear, h: Hessian) -> Losses:
    """The losses of a weight that became `q`, where rounding to nearest would have made it `rounded`."""
    rows = jnp.stack([w - dequantize(q), w - dequantize(rounded), w])
    found = (jnp.matmul(rows, h.xx, precision=jax.lax.Precision.HIGHEST) * rows).sum(-1)
    return Losses(found[0], found[1], found[2])


def _relative(lost: float, whole: float) -> float:
    return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0
