"""Quantizing the linears that read one input: their Hessian in, codes and reports out."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from gptq_fn._config import QuantConfig
from gptq_fn._factor import Factor, factor_by
from gptq_fn._hessian import Hessian
from gptq_fn._mesh import WHOLE, part, placed, split, together
from gptq_fn._product import energy, product
from gptq_fn._programs import program
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._refine import refine
from gptq_fn._report import LinearReport
from gptq_fn._runtime import Runtime
from gptq_fn._solve import RoundBlock, round_in_loops, round_to_nearest, solve
from gptq_fn._target import Moments, aim_at


def quantize_linears(
    linears: Mapping[str, Mapping[str, Any]],
    h: Hessian,
    plan: Mapping[str, QuantConfig],
    *,
    factor: Callable[[Hessian, QuantConfig], Factor] | None = None,
    moments: Sequence[Moments] = (),
    runtime: Runtime | None = None,
) -> Iterator[tuple[str, QuantizedLinear, LinearReport]]:
    """Each of these linears quantized, with its report; `h` is the Hessian of the input that they share.

    `linears` maps names to {"weight": [out, in], "bias": [out]}, the bias optional, and `plan` the same names to
    configurations. Linears of one configuration are solved together, as rows of one matrix; those that fewer tokens than
    its min_rows reached are rounded to nearest. Who has factors already passes a `factor` that returns them. Where alpha is not 0,
    `moments` are those of the same rows, or of two shares of them: see `gptq_fn._target`. Raises
    ValueError naming the linear for weights that are not finite or too large, that have another width than `h`, and for a
    Hessian that cannot be factorized.
    """
    runtime = runtime or Runtime()
    linears, h, moments = placed((dict(linears), h, tuple(moments)), runtime.mesh, WHOLE)
    find = factor or partial(_factor, mesh=runtime.mesh)
    for config, names in alike(plan).items():
        began = time.perf_counter()
        weights = [linears[name]["weight"] for name in names]
        if weights[0].shape[1] != len(h.xx):
            raise ValueError(
                f"{names[0]}: its weight has {weights[0].shape[1]} inputs but {len(h.xx)} features enter it. "
                "Weights are [out, in]; a Conv1D checkpoint needs stored='in_out' in its LinearSpec."
            )
        if len(moments) < 1 + (config.alpha is None):
            config = config.alone("there are no moments of it")
        f = placed(find(h, config), runtime.mesh, WHOLE)
        fitted = placed(find(moments[0].h, config), runtime.mesh, WHOLE) if config.alpha is None else None
        mine = moments if config.alpha != 0 else ()
        solved = _solve(tuple(weights), f, h, config, runtime.round_block, runtime.mesh, mine, fitted)
        f, rows, told = jax.device_get((f._replace(upper=None), h.rows, [(one.losses, one.sound) for one in solved]))
        for name, (_, sound) in zip(names, told, strict=True):
            require_sound(name, sound)
        seconds, whole = time.perf_counter() - began, sum(len(w) for w in weights)
        for name, one, (losses, _) in zip(names, solved, told, strict=True):
            linear = one.q.with_bias(linears[name].get("bias"))
            share = seconds * linear.shape[0] / whole
            yield name, linear, report_of(name, config, linear.shape, losses, f, int(rows), share)


def alike(plan: Mapping[str, QuantConfig]) -> dict[QuantConfig, list[str]]:
    """The names of `plan` by their configuration."""
    found: dict[QuantConfig, list[str]] = defaultdict(list)
    for name, config in plan.items():
        found[config].append(name)
    return found


class Losses(NamedTuple):
    """Squared norms over the calibration inputs: of a linear's error, of the error of rounding, and of its output; and by how much
    the target lowers that of the difference from the float model's output, there and on rows that are held out, with the
    output on these; and the target's alpha."""

    lost: Float[Array, ""]
    rounding: Float[Array, ""]
    whole: Float[Array, ""]
    fall: Float[Array, ""]
    held_fall: Float[Array, ""]
    held_whole: Float[Array, ""]
    alpha: Float[Array, ""]


class Sound(NamedTuple):
    """What has to be finite: a linear's weight, the damping of its Hessian, and its scales."""

    weight: Bool[Array, ""]
    damp: Bool[Array, ""]
    scale: Bool[Array, ""]


class Solved(NamedTuple):
    """A linear without its bias, quantized, and what is to be told of it."""

    q: QuantizedLinear
    losses: Losses
    sound: Sound


@partial(program, static_argnames=("config", "mesh"))
def _factor(h: Hessian, config: QuantConfig, mesh: Mesh | None) -> Factor:
    """The factor of `h`, whole on each device of a mesh, which share its large products."""

    def share(a: Array, b: Array) -> Array:
        return together(product(part(a, mesh), b), mesh)[: len(a)]

    return split(partial(factor_by, share, config=config), mesh, WHOLE, WHOLE)(h)


def solve_together(
    weights: Sequence[Array],
    f: Factor,
    h: Hessian,
    config: QuantConfig,
    round_block: RoundBlock = round_in_loops,
    mesh: Mesh | None = None,
    moments: Sequence[Moments] = (),
    fitted: Factor | None = None,
) -> list[Solved]:
    """Each weight [out, in] that reads the input of `h` quantized, as rows of one matrix; each device of a mesh solves as many.

    What is solved is the target that `moments` give, if there are any: see `aim_at`.
    """

    def rows_of(
        weights: Sequence[Array], f: Factor, h: Hessian, moments: Sequence[Moments], fitted: Factor | None
    ) -> tuple[QuantizedLinear, Float[Array, "rows 6"], Float[Array, ""]]:
        w = part(jnp.concatenate([weight.astype(jnp.float32) for weight in weights]), mesh)
        aim = aim_at(w, f, moments, fitted, config, mesh)
        rounded = round_to_nearest(w, config)
        found = refine(solve(aim.w, f, config, round_block)[0], aim.w, h, f.damp, config, round_block)
        q = jax.tree.map(lambda a, b: jnp.where(h.rows < config.min_rows, a, b), rounded, found)
        energies = [energy(e, h.xx) for e in (aim.w - dequantize(q), w - dequantize(rounded), w)]
        energies = jnp.stack([*energies, aim.fall, aim.held_fall, aim.held_whole])
        codes, scale, zero, energies = together((q.codes, q.scale, q.zero, energies.T), mesh)
        return QuantizedLinear(codes, scale, zero, q.group_of, q.bits), energies, aim.alpha

    q, energies, alpha = split(rows_of, mesh, WHOLE, WHOLE)(weights, f, h, moments, fitted)
    found, start = [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start = rows.stop
        mine = QuantizedLinear(q.codes[rows], q.scale[rows], q.zero[rows], q.group_of, q.bits)
        sound = Sound(jnp.isfinite(weight).all(), jnp.isfinite(f.damp), jnp.isfinite(mine.scale).all())
        found.append(Solved(mine, Losses(*energies[rows].sum(0), alpha=alpha), sound))
    return found


_solve = program(solve_together, static_argnames=("config", "round_block", "mesh"))


def require_sound(name: str, sound: Sound) -> None:
    """Raise ValueError where a linear could not be quantized."""
    if not bool(sound.weight):
        raise ValueError(f"{name}: its weight holds infinite or NaN values; the checkpoint is damaged.")
    if not bool(sound.damp):
        raise ValueError(f"{name}: its Hessian cannot be factorized at any damping; its inputs may overflow float32.")
    if not bool(sound.scale):
        raise ValueError(f"{name}: a scale overflows float16, the type that checkpoints store; its weights are too large.")


def report_of(name: str, config: QuantConfig, shape: tuple[int, int], losses: Losses, f: Factor, rows: int, seconds: float) -> LinearReport:
    """The report of a linear that was quantized with this factor."""
    lost, rounding, whole, fall, held_fall, held_whole, alpha = (float(a) for a in losses)
    return LinearReport(
        name=name,
        bits=config.bits,
        group_size=config.group_size,
        shape=shape,
        rows=rows,
        dead=int(np.count_nonzero(f.dead)),
        error=_relative(lost, whole),
        rtn_error=_relative(rounding, whole),
        energy=whole,
        damp=float(f.damp),
        seconds=seconds,
        rounded=rows < config.min_rows,
        alpha=alpha,
        restored=_share(fall, whole),
        restored_held_out=_share(held_fall, held_whole) if config.alpha is None else None,
    )


def _relative(lost: float, whole: float) -> float:
    return float(np.sqrt(max(_share(lost, whole), 0.0)))


def _share(a: float, whole: float) -> float:
    return a / whole if whole > 0 else 0.0
