"""Quantizing the linears that read one input: their Hessian in, codes and reports out."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from gptq_fn._config import QuantConfig
from gptq_fn._factor import Factor, damped_diagonal, factor_by
from gptq_fn._hessian import Hessian
from gptq_fn._mesh import WHOLE, part, placed, split, together
from gptq_fn._product import energy, product
from gptq_fn._programs import program
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._refine import refine
from gptq_fn._report import LinearReport
from gptq_fn._runtime import Runtime
from gptq_fn._solve import RoundBlock, round_in_loops, round_to_nearest, solve
from gptq_fn._target import Moments, aim_at, fitted_to


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
    `moments` are those of the shares of the same rows: see `gptq_fn._target`. Raises
    ValueError naming the linear for weights that are not finite or too large, that have another width than `h`, and for a
    Hessian that cannot be factorized.
    """
    for name, q, tell in begin_linears(linears, h, plan, factor=factor, moments=moments, runtime=runtime or Runtime()):
        yield name, q, tell()


def begin_linears(
    linears: Mapping[str, Mapping[str, Any]],
    h: Hessian,
    plan: Mapping[str, QuantConfig],
    *,
    factor: Callable[[Hessian, QuantConfig], Factor] | None = None,
    moments: Sequence[Moments] = (),
    runtime: Runtime,
) -> Iterator[tuple[str, QuantizedLinear, Callable[[], LinearReport]]]:
    """What `quantize_linears` yields, without waiting for a device: a report is there, and errors are raised, once it is asked for."""
    linears, h, moments = placed((dict(linears), h, tuple(moments)), runtime.mesh, WHOLE)
    find = factor or partial(_factor, mesh=runtime.mesh)
    for config, names in alike(plan).items():
        weights = [linears[name]["weight"] for name in names]
        for name, weight in zip(names, weights, strict=True):
            if weight.ndim != 2 or weight.shape[1] != len(h.xx):
                raise ValueError(
                    f"{name}: its weight is {list(weight.shape)} but {len(h.xx)} features enter it. "
                    "Weights are [out, in]; a Conv1D checkpoint needs stored='in_out' in its LinearSpec."
                )
        if config.alpha != 0 and len(moments) < 2:
            config = config.alone("there are no moments of it")
        f = placed(find(h, config), runtime.mesh, WHOLE)
        mine = moments if config.alpha != 0 else ()
        fitted = placed(find(fitted_to(mine, config).h, config), runtime.mesh, WHOLE) if mine else None
        found, told = _solve(tuple(weights), f, h, config, runtime.round_block, runtime.mesh, mine, fitted)
        for i, (name, q) in enumerate(zip(names, found, strict=True)):
            linear = q.with_bias(linears[name].get("bias"))
            yield name, linear, partial(_report, name, config, linear.shape, told, i)


def _report(name: str, config: QuantConfig, shape: tuple[int, int], told: "Told", i: int) -> LinearReport:
    """The report of linear number `i` of those that were solved together. Raises ValueError where it is not sound."""
    return report_of(name, config, shape, jax.device_get(told), i)


def alike(plan: Mapping[str, QuantConfig]) -> dict[QuantConfig, list[str]]:
    """The names of `plan` by their configuration."""
    found: dict[QuantConfig, list[str]] = defaultdict(list)
    for name, config in plan.items():
        found[config].append(name)
    return found


class Told(NamedTuple):
    """What is to be told of linears that were solved together.

    `losses` are squared norms over the calibration inputs: of each linear's error, of the error of rounding, and of its output; and
    by how much the target lowers that of the difference from the float model's output, there and on rows that are held out, with
    the output on these. `sound` says of which the weight and the scales are finite. `alpha` is the target's, `damp` that of the
    factor, `dead` counts inputs that were always 0, and `rows` are the tokens.
    """

    losses: Float[Array, "linears 6"]
    sound: Bool[Array, "linears 2"]
    alpha: Float[Array, ""]
    damp: Float[Array, ""]
    dead: Int[Array, ""]
    rows: Int[Array, ""]


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
) -> tuple[list[QuantizedLinear], Told]:
    """Each weight [out, in] that reads the input of `h` quantized, as rows of one matrix; each device of a mesh solves as many.

    What is solved is the target that `moments` give, if there are any: see `aim_at`.
    """

    def rows_of(
        weights: Sequence[Array], f: Factor, h: Hessian, moments: Sequence[Moments], fitted: Factor | None
    ) -> tuple[QuantizedLinear, Float[Array, "rows 6"], Float[Array, ""]]:
        w = part(jnp.concatenate([weight.astype(jnp.float32) for weight in weights]), mesh)
        aim = aim_at(w, moments, fitted, config, mesh)
        rounded = round_to_nearest(w, config)
        found, objective = solve(aim.w, f, config, round_block)
        if config.refine:
            found = refine(found, aim.w, h, f.damp, config, round_block)
            lost = energy(aim.w - dequantize(found), h.xx)
        else:  # the objective, but for what damping adds to it
            diagonal, e = jnp.diagonal(h.xx), jnp.where(f.dead[None], 0.0, aim.w - dequantize(found))
            lost = objective - ((damped_diagonal(diagonal, f.damp) - diagonal)[None] * e**2).sum(1)
        nearest, whole = energy(w - dequantize(rounded), h.xx), energy(w, h.xx)
        few = h.rows < config.min_rows
        q = jax.tree.map(lambda a, b: jnp.where(few, a, b), rounded, found)
        energies = jnp.stack([jnp.where(few, nearest, lost), nearest, whole, aim.fall, aim.held_fall, aim.held_whole])
        codes, scale, zero, energies = together((q.codes, q.scale, q.zero, energies.T), mesh)
        return QuantizedLinear(codes, scale, zero, q.group_of, q.bits), energies, aim.alpha

    q, energies, alpha = split(rows_of, mesh, WHOLE, WHOLE)(weights, f, h, moments, fitted)
    found, losses, sound, start = [], [], [], 0
    for weight in weights:
        rows = slice(start, start + len(weight))
        start = rows.stop
        found.append(QuantizedLinear(q.codes[rows], q.scale[rows], q.zero[rows], q.group_of, q.bits))
        losses.append(energies[rows].sum(0))
        sound.append(jnp.stack([jnp.isfinite(weight).all(), jnp.isfinite(q.scale[rows]).all()]))
    return found, Told(jnp.stack(losses), jnp.stack(sound), alpha, f.damp, f.dead.sum(), h.rows)


_solve = program(solve_together, static_argnames=("config", "round_block", "mesh"))


def report_of(name: str, config: QuantConfig, shape: tuple[int, int], told: Told, i: int) -> LinearReport:
    """The report of linear number `i` of those of which this was told, on the host. Raises ValueError where it could not be quantized."""
    weight, scale = told.sound[i]
    if not weight:
        raise ValueError(f"{name}: its weight holds infinite or NaN values; the checkpoint is damaged.")
    if not np.isfinite(told.damp):
        raise ValueError(f"{name}: its Hessian cannot be factorized at any damping; its inputs may overflow float32.")
    if not scale:
        raise ValueError(f"{name}: a scale overflows float16, the type that checkpoints store; its weights are too large.")
    lost, rounding, whole, fall, held_fall, held_whole = map(float, told.losses[i])
    rows = int(told.rows)
    return LinearReport(
        name=name,
        bits=config.bits,
        group_size=config.group_size,
        shape=shape,
        rows=rows,
        dead=int(told.dead),
        error=_relative(lost, whole),
        rtn_error=_relative(rounding, whole),
        energy=whole,
        damp=float(told.damp),
        rounded=rows < config.min_rows,
        alpha=float(told.alpha),
        restored=_share(fall, whole),
        restored_held_out=_share(held_fall, held_whole) if config.alpha is None else None,
    )


def _relative(lost: float, whole: float) -> float:
    return float(np.sqrt(max(_share(lost, whole), 0.0)))


def _share(a: float, whole: float) -> float:
    return a / whole if whole > 0 else 0.0
