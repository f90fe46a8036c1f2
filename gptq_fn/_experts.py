"""Quantizing the experts of a block: one program over all of them, each with the Hessian of the tokens routed to it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from gptq_fn._batches import Batch
from gptq_fn._config import QuantConfig
from gptq_fn._factor import factor
from gptq_fn._hessian import Hessian
from gptq_fn._linears import Told, alike, report_of, solve_together
from gptq_fn._mesh import AXIS, PARTS, WHOLE, added, adding, size, split, together, zeros
from gptq_fn._programs import program
from gptq_fn._quantized import QuantizedLinear
from gptq_fn._report import LinearReport
from gptq_fn._runtime import Runtime
from gptq_fn._solve import RoundBlock
from gptq_fn._target import Moments, add, fitted_to, no_rows, rows_of, total
from gptq_fn.model.block import BlockParams
from gptq_fn.model.ffn import expand
from gptq_fn.model.moe import Route, expert_params
from gptq_fn.spec import MoeSpec, Tap

HESSIAN_BYTES = 2**30
"""Memory for the moments of experts that are solved together."""


def quantize_experts(
    spec: MoeSpec,
    models: Sequence[BlockParams],
    tap: Tap,
    streams: Sequence[Sequence[Any]],
    batches: Sequence[Batch],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    runtime: Runtime,
) -> Iterator[tuple[str, QuantizedLinear, Callable[[], tuple[LinearReport, ...]]]]:
    """Each role of `plan`, which read `tap`, quantized with a leading axis of experts, and what gives the report of every expert.

    The experts that are solved together are divided among the devices of a mesh where their number allows it.

    The states of each of the `streams` wait in the runtime's store, and `models` are the block as each sees it; `names` maps roles
    to names with "{n}" for the number of the expert.
    An expert that fewer tokens than the configuration's min_rows reach is rounded to nearest. What the float stream has of a token is
    compared where the quantized stream routes it. What gives the reports raises ValueError as `quantize_linears` does.
    """
    p, inputs = models[0], models[0][next(iter(plan))]["weight"].shape[-1]
    begin = partial(no_rows, inputs, plan.values())
    matrices = sum(a.ndim == 2 for a in jax.tree.leaves(jax.eval_shape(begin)))
    limit = max(1, HESSIAN_BYTES // (4 * inputs**2 * matrices))
    chunks = [n for n in range(min(limit, spec.experts), 0, -1) if spec.experts % n == 0]
    chunk = next((n for n in chunks if n % size(runtime.mesh) == 0), chunks[0])
    parts = WHOLE if chunk % size(runtime.mesh) else PARTS
    found: dict[str, list[tuple[QuantizedLinear, Callable[[], list[LinearReport]]]]] = {role: [] for role in plan}
    seen = next(iter(plan.values())).experts
    for first in range(0, spec.experts, chunk):
        gathered = _gather(spec, models, tap, streams, batches, begin, first, chunk, runtime, everything=seen == "all")
        moments = tuple(added(m, runtime.mesh, parts) for m in gathered)
        h = total(moments).h
        for n in range(chunk if runtime.observe else 0):
            assert runtime.observe
            runtime.observe(tuple(names[role].format(n=first + n) for role in plan), _picked(h, np.int32(n), runtime.mesh, parts))
        for config, roles in alike(plan).items():
            for role, q, tell in _solve_chunk(p, roles, first, chunk, moments, config, names, runtime, parts):
                found[role].append((q, tell))
    for role, chunks in found.items():
        q = jax.tree.map(lambda *parts: jnp.concatenate(parts), *(q for q, _ in chunks))
        yield role, q, partial(_all_told, [tell for _, tell in chunks])


def _all_told(chunks: Sequence[Callable[[], list[LinearReport]]]) -> tuple[LinearReport, ...]:
    return tuple(report for tell in chunks for report in tell())


def _gather(
    spec: MoeSpec,
    models: Sequence[BlockParams],
    tap: Tap,
    streams: Sequence[Sequence[Any]],
    batches: Sequence[Batch],
    begin: Callable[[], tuple[Moments, ...]],
    first: int,
    chunk: int,
    runtime: Runtime,
    *,
    everything: bool,
) -> list[Moments]:
    """The moments of `chunk` experts, with a leading axis, from the tokens routed to each or from all; of a mesh, its terms."""
    mine = tuple(jax.tree.map(lambda a: a[first : first + chunk], expert_params(p)) for p in models)
    inner = tap == "expert_down_in"
    found = list(zeros(partial(_repeated, begin, chunk), runtime.mesh))
    for batch, *waiting in zip(batches, *streams, strict=True):
        states = [runtime.store.get(a) for a in waiting if a is not None]
        xs = tuple(state.held["experts_in"] if inner else state.taps["mlp_in"] for state in states)
        to = Route(*states[0].held["route"])
        for share, keep in rows_of(batch.keep, batch.share, len(found), runtime.mesh):
            arguments = found[share], mine, xs, keep, to, np.int32(first)
            found[share] = _add(spec, *arguments, inner=inner, everything=everything, mesh=runtime.mesh)
    return found


def _repeated(begin: Callable[[], tuple[Moments, ...]], experts: int) -> tuple[Moments, ...]:
    return jax.tree.map(lambda a: jnp.repeat(a[None], experts, 0), begin())


@partial(program, static_argnames=("spec", "inner", "everything", "mesh"), donate_argnums=1)
def _add(
    spec: MoeSpec,
    m: Moments,
    experts: Sequence[Mapping[str, Any]],
    xs: Sequence[Array],
    keep: Array,
    to: Route,
    first: Array | np.int32,
    *,
    inner: bool,
    everything: bool,
    mesh: Mesh | None,
) -> Moments:
    def all_of(m: Moments, experts: Sequence[Any], xs: Sequence[Array], keep: Array, to: Route, first: Array) -> tuple[Moments, tuple[()]]:
        def one(task: tuple[Array, Moments, Sequence[Mapping[str, Any]]]) -> Moments:
            n, m, mine = task
            entering = [expand(spec.mlp, p, x) for p, x in zip(mine, xs, strict=True)] if inner else xs
            return add(m, entering, keep if everything else keep & to.chosen(first + n))

        return jax.lax.map(one, (jnp.arange(len(m.h.rows)), m, experts)), ()

    return adding(all_of, mesh, (WHOLE, PARTS, PARTS, PARTS, WHOLE))(m, experts, xs, keep, to, first)[0]


@partial(program, static_argnames=("mesh", "parts"))
def _picked(h: Hessian, n: np.int32 | Array, mesh: Mesh | None, parts: P) -> Hessian:
    """The Hessian of the expert with this number, on all devices."""
    if mesh is None or parts == WHOLE:
        return _expert(n, h)

    def here(h: Hessian, n: Array) -> Hessian:
        owner, place = n // len(h.rows), n % len(h.rows)
        mine = jax.lax.axis_index(AXIS) == owner
        return jax.tree.map(lambda a: jax.lax.psum(jnp.where(mine, a[place], jnp.zeros_like(a[place])), AXIS), h)

    return split(here, mesh, (PARTS, WHOLE), WHOLE)(h, n)


def _solve_chunk(
    p: BlockParams,
    roles: Sequence[str],
    first: int,
    chunk: int,
    moments: Sequence[Moments],
    config: QuantConfig,
    names: Mapping[str, str],
    runtime: Runtime,
    parts: P,
) -> Iterator[tuple[str, QuantizedLinear, Callable[[], list[LinearReport]]]]:
    """Each role quantized for the experts from `first` on; roles of one input are solved together, as rows of one matrix."""
    mine = {role: jax.tree.map(lambda a: a[first : first + chunk], p[role]) for role in roles}
    solved, told = _solve([mine[role]["weight"] for role in roles], moments, config, runtime.round_block, runtime.mesh, parts)
    for i, (role, q) in enumerate(zip(roles, solved, strict=True)):
        linear = q.with_bias(mine[role].get("bias"))
        of_chunk = [names[role].format(n=first + n) for n in range(chunk)]
        yield role, linear, partial(_reports, of_chunk, config, linear.codes.shape[1:], told, i)


def _reports(names: Sequence[str], config: QuantConfig, shape: tuple[int, int], told: Told, i: int) -> list[LinearReport]:
    """The report of each expert, of linear number `i` of those that were solved together."""
    told = jax.device_get(told)
    return [report_of(name, config, shape, _expert(n, told), i) for n, name in enumerate(names)]


def _expert(n: Any, stacked: Any) -> Any:
    return jax.tree.map(lambda a: a[n], stacked)


@partial(program, static_argnames=("config", "round_block", "mesh", "parts"))
def _solve(
    weights: Sequence[Array], moments: Sequence[Moments], config: QuantConfig, round_block: RoundBlock, mesh: Mesh | None, parts: P
) -> tuple[list[QuantizedLinear], Told]:
    """The linears of each expert solved, with a leading axis of experts, and what is to be told of them."""

    def one(weights: Sequence[Array], moments: Sequence[Moments]) -> tuple[list[QuantizedLinear], Told]:
        h = total(moments).h
        mine = moments if config.alpha != 0 else ()
        fitted = factor(fitted_to(mine, config).h, config) if mine else None
        return solve_together(weights, factor(h, config), h, config, round_block, moments=mine, fitted=fitted)

    def here(weights: Sequence[Array], moments: Sequence[Moments]) -> tuple[list[QuantizedLinear], Told]:
        return together(jax.vmap(one)(weights, moments), mesh if parts == PARTS else None)

    return split(here, mesh, parts, WHOLE)(weights, moments)
