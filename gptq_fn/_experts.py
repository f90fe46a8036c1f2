"""Quantizing the experts of a block: one program over all of them, each with the Hessian of the tokens routed to it."""

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from gptq_fn._config import QuantConfig
from gptq_fn._hessian import Hessian, add_rows, empty
from gptq_fn._linears import Solved, alike, report_of, require_sound, solve_together
from gptq_fn._quantized import QuantizedLinear
from gptq_fn._report import LinearReport
from gptq_fn._runtime import Runtime
from gptq_fn._solve import Factor, RoundBlock
from gptq_fn.model.block import BlockParams
from gptq_fn.model.ffn import expand
from gptq_fn.model.moe import Route, expert_params
from gptq_fn.spec import MoeSpec, Tap

HESSIAN_BYTES = 2 * 2**30
"""Memory for the Hessians of experts that are solved together."""


def quantize_experts(
    spec: MoeSpec,
    p: BlockParams,
    tap: Tap,
    states: Sequence[Any],
    keeps: Sequence[Bool[Array, "_ _"]],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    runtime: Runtime,
) -> Iterator[tuple[str, QuantizedLinear, tuple[LinearReport, ...]]]:
    """Each role of `plan`, which read `tap`, quantized with a leading axis of experts, and the report of every expert.

    `states` wait in the runtime's store, `keeps` tell which tokens of each count; `names` maps roles to names with "{n}" for
    the number of the expert.
    An expert that fewer tokens than the configuration's min_rows reach is rounded to nearest. Raises ValueError as
    `quantize_linears` does.
    """
    inputs = p[next(iter(plan))]["weight"].shape[-1]
    limit = max(1, HESSIAN_BYTES // (4 * inputs**2))
    chunk = next(size for size in range(min(limit, spec.experts), 0, -1) if spec.experts % size == 0)
    found: dict[str, list[tuple[QuantizedLinear, list[LinearReport]]]] = {role: [] for role in plan}
    seen = next(iter(plan.values())).experts
    for first in range(0, spec.experts, chunk):
        h = _gather(spec, p, tap, states, keeps, inputs, first, chunk, runtime, everything=seen == "all")
        for n in range(chunk):
            runtime.observe(tuple(names[role].format(n=first + n) for role in plan), _expert(n, h))
        for config, roles in alike(plan).items():
            for role, q, reports in _solve_chunk(p, roles, first, chunk, h, config, names, runtime):
                found[role].append((q, reports))
    for role, chunks in found.items():
        q = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(q for q, _ in chunks))
        yield role, q, tuple(report for _, reports in chunks for report in reports)


def _gather(
    spec: MoeSpec,
    p: BlockParams,
    tap: Tap,
    states: Sequence[Any],
    keeps: Sequence[Bool[Array, "_ _"]],
    inputs: int,
    first: int,
    chunk: int,
    runtime: Runtime,
    *,
    everything: bool,
) -> Hessian:
    """The Hessians of `chunk` experts, with a leading axis, from the tokens routed to each or from all."""
    mine = jax.tree.map(lambda a: a[first : first + chunk], expert_params(p))
    inner = tap == "expert_down_in"
    h = jax.tree.map(lambda a: jnp.repeat(a[None], chunk, 0), empty(inputs))
    for waiting, keep in zip(states, keeps, strict=True):
        state = runtime.store.get(waiting)
        x = state.held["experts_in"] if inner else state.taps["mlp_in"]
        h = _add(spec, h, mine, x, keep, Route(*state.held["route"]), jnp.asarray(first), inner=inner, everything=everything)
    return h


@partial(jax.jit, static_argnames=("spec", "inner", "everything"), donate_argnums=1)
def _add(
    spec: MoeSpec, h: Hessian, experts: Mapping[str, Any], x: Array, keep: Array, to: Route, first: Array, *, inner: bool, everything: bool
) -> Hessian:
    def one(task: tuple[Array, Hessian, Mapping[str, Any]]) -> Hessian:
        n, h, mine = task
        return add_rows(h, expand(spec.mlp, mine, x) if inner else x, keep if everything else keep & to.chosen(first + n))

    return jax.lax.map(one, (jnp.arange(len(h.rows)), h, experts))


def _solve_chunk(
    p: BlockParams,
    roles: Sequence[str],
    first: int,
    chunk: int,
    h: Hessian,
    config: QuantConfig,
    names: Mapping[str, str],
    runtime: Runtime,
) -> Iterator[tuple[str, QuantizedLinear, list[LinearReport]]]:
    """Each role quantized for the experts from `first` on; roles of one input are solved together, as rows of one matrix."""
    began = time.perf_counter()
    mine = {role: jax.tree.map(lambda a: a[first : first + chunk], p[role]) for role in roles}
    f, solved = _solve([mine[role]["weight"] for role in roles], h, config, runtime.round_block)
    f, told = jax.device_get((f._replace(upper=None), [(one.losses, one.sound) for one in solved]))
    rows, seconds = np.asarray(h.rows), time.perf_counter() - began
    whole = sum(mine[role]["weight"].shape[1] for role in roles)
    for role, one, (losses, sound) in zip(roles, solved, told, strict=True):
        out, inputs = mine[role]["weight"].shape[1:]
        reports = []
        for n in range(chunk):
            name, of = names[role].format(n=first + n), partial(_expert, n)
            require_sound(name, of(sound))
            share = seconds * out / (whole * chunk)
            reports.append(report_of(name, config, (out, inputs), of(losses), of(f), int(rows[n]), share))
        yield role, one.q.with_bias(mine[role].get("bias")), reports


def _expert(n: int, stacked: Any) -> Any:
    return jax.tree.map(lambda a: a[n], stacked)


@partial(jax.jit, static_argnames=("config", "round_block"))
@partial(jax.vmap, in_axes=(0, 0, None, None))
def _solve(weights: Sequence[Array], h: Hessian, config: QuantConfig, round_block: RoundBlock) -> tuple[Factor, list[Solved]]:
    return solve_together(weights, h, config, round_block=round_block)
