"""Quantizing the linears that read one input: their Hessian in, codes and reports out."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptq_fn._config import QuantConfig
from gptq_fn._hessian import Hessian
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._report import LinearReport
from gptq_fn._solve import factor, round_to_nearest, solve


def quantize_linears(
    linears: Mapping[str, Mapping[str, Any]], h: Hessian, plan: Mapping[str, QuantConfig]
) -> Iterator[tuple[str, QuantizedLinear, LinearReport]]:
    """Each of these linears quantized, with its report; `h` is the Hessian of the input that they share.

    `linears` maps names to {"weight": [out, in], "bias": [out]}, the bias optional, and `plan` the same names to
    configurations. Linears of one configuration are solved together, as rows of one matrix. Raises ValueError naming
    the linear for weights that are not finite or too large, that have another width than `h`, and for a Hessian that
    cannot be factorized.
    """
    alike: dict[QuantConfig, list[str]] = defaultdict(list)
    for name in linears:
        alike[plan[name]].append(name)
    for config, together in alike.items():
        began = time.perf_counter()
        for name in together:
            if not bool(jnp.isfinite(linears[name]["weight"]).all()):
                raise ValueError(f"{name}: its weight holds infinite or NaN values; the checkpoint is damaged.")
        w = jnp.concatenate([linears[name]["weight"].astype(jnp.float32) for name in together])
        if w.shape[1] != len(h.xx):
            raise ValueError(
                f"{together[0]}: its weight has {w.shape[1]} inputs but {len(h.xx)} features enter it. "
                "Weights are [out, in]; a Conv1D checkpoint needs stored='in_out' in its LinearSpec."
            )
        f = factor(h, config)
        if not bool(jnp.isfinite(f.damp)):
            raise ValueError(f"{together[0]}: its Hessian cannot be factorized at any damping; its inputs may overflow float32.")
        q, _ = solve(w, f, config)
        lost, rtn_lost, whole = _energies(w, q, round_to_nearest(w, config), h)
        if not bool(jnp.isfinite(q.scale).all()):
            raise ValueError(f"{together[0]}: a scale overflows float16, the type that checkpoints store; its weights are too large.")
        seconds, start = time.perf_counter() - began, 0
        for name in together:
            rows = slice(start, start + linears[name]["weight"].shape[0])
            start = rows.stop
            mine = QuantizedLinear(q.codes[rows], q.scale[rows], q.zero[rows], q.group_of, q.bits, linears[name].get("bias"))
            report = LinearReport(
                name=name,
                bits=config.bits,
                group_size=config.group_size,
                shape=mine.shape,
                rows=int(h.rows),
                dead=int(f.dead.sum()),
                error=_relative(lost[rows], whole[rows]),
                rtn_error=_relative(rtn_lost[rows], whole[rows]),
                damp=float(f.damp),
                seconds=seconds * mine.shape[0] / len(w),
            )
            yield name, mine, report


@jax.jit
def _energies(
    w: Float[Array, "out in"], q: QuantizedLinear, rtn: QuantizedLinear, h: Hessian
) -> tuple[Float[Array, " out"], Float[Array, " out"], Float[Array, " out"]]:
    """For each row, the squared norm over the calibration inputs of the error of `q`, of that of `rtn`, and of the output."""
    rows = jnp.stack([w - dequantize(q), w - dequantize(rtn), w])
    energies = (jnp.matmul(rows, h.xx, precision=jax.lax.Precision.HIGHEST) * rows).sum(-1)
    return energies[0], energies[1], energies[2]


def _relative(lost: Float[Array, " rows"], whole: Float[Array, " rows"]) -> float:
    lost, whole = (np.asarray(a, np.float64).sum() for a in (lost, whole))
    return float(np.sqrt(max(lost, 0.0) / whole)) if whole > 0 else 0.0
