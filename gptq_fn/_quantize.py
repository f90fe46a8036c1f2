"""Quantizing a model block by block: each block sees its inputs as the quantized blocks before it make them."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from gptq_fn._batches import Batch, Samples, embed_batches
from gptq_fn._config import QuantConfig
from gptq_fn._experts import quantize_experts
from gptq_fn._hessian import Hessian, add_rows, empty
from gptq_fn._linears import quantize_linears
from gptq_fn._mesh import PARTS, WHOLE, added, adding, gathered, local, placed, split, zeros
from gptq_fn._programs import program
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._report import LinearReport, Report
from gptq_fn._runtime import Runtime
from gptq_fn.model.block import BlockParams, State, advance, enter
from gptq_fn.model.decoder import Params, head_input
from gptq_fn.spec import STOP_OF, BlockSpec, ModelSpec, MoeSpec, Stop, Tap

AHEAD = 2
"""Batches that may be under way on a device at once."""

EXPERT_TAPS = ("expert_in", "expert_down_in")


class Quantized(NamedTuple):
    """A quantized model: `params` has QuantizedLinear leaves where linears were quantized."""

    params: Params
    spec: ModelSpec
    report: Report


def quantize(
    params: Params, spec: ModelSpec, calib: Samples, config: QuantConfig | None = None, *, runtime: Runtime | None = None
) -> Quantized:
    """GPTQ on a whole model in memory.

    `params` is {"top": {role: {"weight", "bias"}}, "blocks": [{role: {"weight", "bias"}}]} with weights [out, in], those
    of experts [experts, out, in]; `calib` holds token ids [samples, time], or samples of any lengths. Computation runs
    in the dtype of the embedding, with the means that `runtime` names. Raises ValueError where weights or activations are
    not finite, and for rules that cannot be followed.
    """
    config, runtime = config or QuantConfig(), runtime or Runtime()
    head_plan(spec, config)
    batches, blocks, reports = embed_batches(spec, params["top"], calib, runtime), [], []
    for p, found, after in quantize_blocks(spec, params["blocks"], batches, config, runtime=runtime):
        batches = after
        blocks.append(p)
        reports.extend(found)
    spec, top, found = quantize_head(spec, params["top"], batches, config, runtime=runtime)
    return Quantized({"top": top, "blocks": blocks}, spec, Report(config, (*reports, *found)))


def quantize_blocks(
    spec: ModelSpec,
    blocks: Iterable[BlockParams],
    batches: Sequence[Batch],
    config: QuantConfig,
    *,
    runtime: Runtime | None = None,
    first: int = 0,
) -> Iterator[tuple[BlockParams, tuple[LinearReport, ...], Sequence[Batch]]]:
    """Each block of `blocks` quantized, its reports, and what leaves it, in order; one block at a time is asked for.

    `blocks` are those from number `first` on, and `batches` what enters that one. Raises ValueError as `quantize` does, naming
    the linear and the sample.
    """
    for i, (block_spec, p) in enumerate(zip(spec.blocks[first:], blocks, strict=True), first):
        names = {linear.role: spec.name_of(i, linear) for linear in block_spec.linears}
        quantized, reports, batches = quantize_block(
            block_spec, p, batches, _plan(spec, i, config), names, sequential=config.sequential, runtime=runtime
        )
        yield quantized, reports, batches


def _plan(spec: ModelSpec, i: int, config: QuantConfig) -> dict[str, QuantConfig]:
    """The configuration of each role of block `i` that is to be quantized. Raises ValueError where experts would differ."""
    plan = {}
    for linear in spec.blocks[i].linears:
        chosen = {config.resolve(name, usual=linear.quantize) for name in spec.names_of(i, linear)}
        if len(chosen) > 1:
            raise ValueError(
                f"{spec.name_of(i, linear)}: the rules treat its experts differently, but one program computes them all. "
                "Write a rule that matches every expert of the block or none."
            )
        if (found := chosen.pop()) is not None:
            plan[linear.role] = found
    return plan


def head_plan(spec: ModelSpec, config: QuantConfig) -> QuantConfig | None:
    """How to quantize the head; None where it stays as it is. Raises ValueError where a rule asks for what cannot be."""
    name = dict(spec.tensors).get("head")
    found = None if name is None else config.resolve(name, usual=False)
    if found is not None and spec.tied and not config.untie:
        raise ValueError(
            f"A rule quantizes {name}, but this model's head is its embedding. Pass untie=True to give it a head of its own, "
            f"or put Rule({name!r}) before the other rules to leave it alone."
        )
    return found


def quantize_head(
    spec: ModelSpec, top: Mapping[str, Any], batches: Sequence[Batch], config: QuantConfig, *, runtime: Runtime | None = None
) -> tuple[ModelSpec, Mapping[str, Any], tuple[LinearReport, ...]]:
    """The spec and the parameters outside the blocks, with the head quantized where a rule asks for it.

    `batches` are what leaves the last block. Raises ValueError as `head_plan` does.
    """
    plan, name = head_plan(spec, config), dict(spec.tensors).get("head")
    if plan is None or name is None:
        return spec, top, ()
    runtime, shell = runtime or Runtime(), replace(spec, blocks=())
    leaf, shared = placed((top["embed"] if spec.tied else top["head"], {r: top[r] for r in _BEFORE_HEAD if r in top}), runtime.mesh, WHOLE)
    passing = replace(runtime, store=runtime.store._replace(put=lambda _: ()))

    def enter(x: Array) -> State:
        return State(x, {"head_in": _head_input(shell, shared, x, runtime.mesh)}, {})

    h = _pass(enter, [batch.x for batch in batches], batches, {"head_in": name}, passing)[1]["head_in"]
    if runtime.observe:
        runtime.observe((name,), h)
    ((_, head, report),) = quantize_linears({name: leaf}, h, {name: plan}, runtime=runtime)
    return _untied(spec), {**top, "head": local(head, runtime.mesh)}, (report,)


def _untied(spec: ModelSpec) -> ModelSpec:
    """The spec with a head of its own, which its config.json says too."""
    if not spec.tied:
        return spec
    origin = None if spec.origin is None else json.dumps({**json.loads(spec.origin), "tie_word_embeddings": False})
    return replace(spec, tied=False, origin=origin)


_BEFORE_HEAD = ("final_norm", "project_out")
"""The roles that `head_input` reads."""


@partial(program, static_argnames=("spec", "mesh"))
def _head_input(spec: ModelSpec, top: Mapping[str, Any], x: Array, mesh: Mesh | None) -> Array:
    return split(partial(head_input, spec), mesh, (WHOLE, PARTS), PARTS)(top, x)


def quantize_block(
    spec: BlockSpec,
    p: BlockParams,
    batches: Sequence[Batch],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    *,
    sequential: bool = True,
    runtime: Runtime | None = None,
) -> tuple[BlockParams, tuple[LinearReport, ...], list[Batch]]:
    """The block with the roles of `plan` quantized, their reports, and what leaves the quantized block.

    Where `sequential`, the linears at a tap are solved before the next tap is computed; else all taps are computed from
    the float block. `names` maps roles to the names that reports use, with "{n}" for the number of an expert.
    """
    runtime = runtime or Runtime()
    dtype = runtime.store.get(batches[0].x).dtype
    running, result, reports = dict(placed(p, runtime.mesh, WHOLE)), dict(p), []
    begin = partial(_enter, spec, running, mesh=runtime.mesh)
    states, hessians = _pass(begin, [batch.x for batch in batches], batches, _linears_at(spec, 0, plan, names), runtime)
    for at, stop in enumerate(spec.stops):
        solved = {}
        for tap, roles in spec.stages:
            mine = {role: plan[role] for role in roles if role in plan}
            if STOP_OF[tap] == stop and mine:
                for role, q, found in _quantize_tap(spec, running, tap, states, hessians, batches, mine, names, runtime):
                    solved[role] = q
                    reports.extend(found)
        result.update({role: local(q.with_bias(None), runtime.mesh).with_bias(p[role].get("bias")) for role, q in solved.items()})
        if sequential:
            running.update({role: _dequantized(q, dtype) for role, q in solved.items()})
        onward, taps = _onward(spec, running, stop, runtime.mesh), _linears_at(spec, at + 1, plan, names)
        states, hessians = _pass(onward, states, batches, taps, runtime)
    if not sequential:
        return result, tuple(reports), run_block(spec, result, batches, runtime=runtime)
    return result, tuple(reports), [batch._replace(x=x) for batch, x in zip(batches, states, strict=True)]


def run_block(spec: BlockSpec, p: BlockParams, batches: Sequence[Batch], *, runtime: Runtime | None = None) -> list[Batch]:
    """What leaves a block that is quantized already, to the last bit what `quantize_block` left."""
    runtime = runtime or Runtime()
    dtype = runtime.store.get(batches[0].x).dtype
    p = placed(p, runtime.mesh, WHOLE)
    p = {role: _dequantized(leaf, dtype) if isinstance(leaf, QuantizedLinear) else leaf for role, leaf in p.items()}

    def through(x: Array) -> Array:
        state = _enter(spec, p, x, mesh=runtime.mesh)
        for stop in spec.stops:
            state = _onward(spec, p, stop, runtime.mesh)(state)
        return state

    left, _ = _pass(through, [batch.x for batch in batches], batches, {}, runtime)
    return [batch._replace(x=x) for batch, x in zip(batches, left, strict=True)]


def _onward(spec: BlockSpec, p: BlockParams, stop: Stop, mesh: Mesh | None) -> Callable[[State], Any]:
    """From a state at `stop` to the next one, or to what leaves the block."""
    if stop == spec.stops[-1]:
        return lambda state: _advance(spec, p, state, stop, mesh).x
    return lambda state: _advance(spec, p, state, stop, mesh)


def _linears_at(spec: BlockSpec, at: int, plan: Mapping[str, QuantConfig], names: Mapping[str, str]) -> dict[Tap, str]:
    """The taps of the stop of this number that linears of `plan` read, experts aside, each with the name of one of them."""
    return {
        tap: next(names[role] for role in roles if role in plan)
        for tap, roles in spec.stages
        if STOP_OF[tap] in spec.stops[at : at + 1] and tap not in EXPERT_TAPS and any(role in plan for role in roles)
    }


def _pass(
    step: Callable[[Any], Any], waiting: list[Any], batches: Sequence[Batch], taps: Mapping[Any, str], runtime: Runtime
) -> tuple[list[Any], dict[Any, Hessian]]:
    """What `step` makes of all that waited, in the runtime's store, and the Hessian of what then enters each of `taps`.

    `taps` tell the name of a linear that reads each. Raises ValueError naming the first sample that is not finite.
    """
    found: dict[Any, Hessian] = {}
    finite: dict[Any, list[Array]] = {tap: [] for tap in taps}
    for i, batch in enumerate(batches):
        state = step(runtime.store.get(waiting[i]))
        for tap in taps:
            h = found[tap] if tap in found else zeros(partial(empty, state.taps[tap].shape[-1]), runtime.mesh)
            found[tap], fine = _add(h, state.taps[tap], batch.keep, runtime.mesh)
            finite[tap].append(fine)
        waiting[i] = runtime.store.put(state)
        if i >= AHEAD:
            jax.block_until_ready(waiting[i - AHEAD])  # else what waits elsewhere would all be fetched at once
    found = {tap: added(h, runtime.mesh) for tap, h in found.items()}
    for tap, name in taps.items():
        _require_finite(name, batches, jax.device_get(gathered(finite[tap], runtime.mesh)))
    return waiting, found


def _quantize_tap(
    spec: BlockSpec,
    p: BlockParams,
    tap: Tap,
    states: Sequence[Any],
    hessians: Mapping[Tap, Hessian],
    batches: Sequence[Batch],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    runtime: Runtime,
) -> Iterator[tuple[str, QuantizedLinear, tuple[LinearReport, ...]]]:
    """The roles of `plan`, which read `tap`, quantized, with their reports."""
    if tap in EXPERT_TAPS:
        assert isinstance(spec.ffn, MoeSpec)
        yield from quantize_experts(spec.ffn, p, tap, states, [batch.keep for batch in batches], plan, names, runtime)
        return
    role_of = {names[role]: role for role in plan}
    if runtime.observe:
        runtime.observe(tuple(role_of), hessians[tap])
    linears, mine = {n: p[r] for n, r in role_of.items()}, {n: plan[r] for n, r in role_of.items()}
    for name, q, report in quantize_linears(linears, hessians[tap], mine, runtime=runtime):
        yield role_of[name], q, (report,)


def _dequantized(q: QuantizedLinear, dtype: jnp.dtype) -> dict[str, Array]:
    """The dense linear that computes what `q` does, in the dtype of the activations."""
    weight = _dequantize(q.with_bias(None), dtype)
    return {"weight": weight} if q.bias is None else {"weight": weight, "bias": q.bias}


@partial(program, static_argnames="dtype")
def _dequantize(q: QuantizedLinear, dtype: jnp.dtype) -> Array:
    return dequantize(q).astype(dtype)


@partial(program, static_argnames=("spec", "mesh"))
def _enter(spec: BlockSpec, p: BlockParams, x: Array, mesh: Mesh | None) -> State:
    return split(partial(enter, spec), mesh, (WHOLE, PARTS), PARTS)(p, x)


@partial(program, static_argnames=("spec", "stop", "mesh"))
def _advance(spec: BlockSpec, p: BlockParams, state: State, stop: Stop, mesh: Mesh | None) -> State:
    return split(lambda p, state: advance(spec, p, state, stop)[0], mesh, (WHOLE, PARTS), PARTS)(p, state)


@partial(program, static_argnames="mesh", donate_argnums=0)
def _add(
    h: Hessian, x: Float[Array, "samples time features"], keep: Bool[Array, "samples time"], mesh: Mesh | None
) -> tuple[Hessian, Bool[Array, " samples"]]:
    def one(h: Hessian, x: Array, keep: Array) -> tuple[Hessian, Array]:
        return add_rows(h, x, keep), (jnp.isfinite(x).all(2) | ~keep).all(1)

    return adding(one, mesh, (PARTS, PARTS))(h, x, keep)


def _require_finite(name: str, batches: Sequence[Batch], finite: Sequence[np.ndarray]) -> None:
    """Raise ValueError naming the first sample that makes the input of the linear `name` infinite or NaN."""
    bad = [n for batch, fine in zip(batches, finite, strict=True) for n, ok in zip(batch.samples, fine, strict=False) if not ok]
    if bad:
        raise ValueError(
            f"{name}: calibration sample {min(bad)} makes its input infinite or NaN. "
            "Check the sample and the model's weights; a float16 model may need bfloat16 or float32."
        )
