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
from gptq_fn._config import QuantConfig, preset
from gptq_fn._experts import quantize_experts
from gptq_fn._linears import begin_linears
from gptq_fn._mesh import PARTS, WHOLE, added, adding, gathered, local, placed, split, zeros
from gptq_fn._programs import program
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._report import LinearReport, Report
from gptq_fn._runtime import Runtime
from gptq_fn._target import Moments, add, no_rows, rows_of, total
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
    """GPTQ on a whole model in memory, by default as the preset "default" has it.

    `params` is {"top": {role: {"weight", "bias"}}, "blocks": [{role: {"weight", "bias"}}]} with weights [out, in], those
    of experts [experts, out, in]; `calib` holds token ids [samples, time], or samples of any lengths. Computation runs
    in the dtype of the embedding, with the means that `runtime` names. Raises ValueError where weights or activations are
    not finite, for what is no tokens of the model or quantized already, for other blocks or linears than the spec has, and for rules that
    cannot be followed.
    """
    config, runtime = config or preset("default"), runtime or Runtime()
    if len(params["blocks"]) != len(spec.blocks):
        raise ValueError(f"The parameters have {len(params['blocks'])} blocks but the spec describes {len(spec.blocks)}.")
    if any(isinstance(leaf, QuantizedLinear) for p in params["blocks"] for leaf in p.values()):
        raise ValueError("These parameters hold linears that are quantized already; quantize the float ones that they were made from.")
    for i, (block, p) in enumerate(zip(spec.blocks, params["blocks"], strict=True)):
        if missing := sorted({linear.role for linear in block.linears} - p.keys()):
            raise ValueError(f"Block {i} of the parameters has no {' and no '.join(missing)}, of which the spec tells.")
    head_plan(spec, config)
    batches, blocks, reports = embed_batches(spec, params["top"], calib, runtime, beside=config.asymmetric), [], []
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

    `blocks` are those from number `first` on, and `batches` what enters that one, in both streams where `config` is asymmetric.
    Raises ValueError as `quantize` does, naming the linear and the sample.
    """
    config = _for_streams(config, batches)
    for i, (block_spec, p) in enumerate(zip(spec.blocks[first:], blocks, strict=True), first):
        names = {linear.role: spec.name_of(i, linear) for linear in block_spec.linears}
        quantized, reports, batches = quantize_block(
            block_spec, p, batches, _plan(spec, i, config), names, sequential=config.sequential, runtime=runtime
        )
        yield quantized, reports, batches


def _for_streams(config: QuantConfig, batches: Sequence[Batch]) -> QuantConfig:
    """The configuration for these batches, which may lack the float stream. Raises ValueError where a given alpha needs it."""
    if any(batch.exact is not None for batch in batches):
        return config
    return config.alone("the batches hold one stream, as embed_batches makes them without beside=True")


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
    plan, name = head_plan(spec, _for_streams(config, batches)), dict(spec.tensors).get("head")
    if plan is None or name is None:
        return spec, top, ()
    runtime, shell = runtime or Runtime(), replace(spec, blocks=())
    leaf, shared = placed((top["embed"] if spec.tied else top["head"], {r: top[r] for r in _BEFORE_HEAD if r in top}), runtime.mesh, WHOLE)
    passing, streams = replace(runtime, store=runtime.store._replace(put=lambda _: ())), _streams(batches)

    def enter(x: Array) -> State:
        return State(x, {"head_in": _head_input(shell, shared, x, runtime.mesh)}, {})

    moments, require_finite = _pass([enter] * len(streams), streams, batches, {"head_in": {name: plan}}, passing)
    require_finite()
    ((_, head, tell),) = _quantize_dense({name: leaf}, moments["head_in"], {name: plan}, runtime)
    return _untied(spec), {**top, "head": local(head, runtime.mesh)}, (tell(),)


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
    the float block. `names` maps roles to the names that reports use, with "{n}" for the number of an expert. Where batches
    have a float stream, the float block takes it along from stop to stop.

    What devices find is read when all that they have to do is under way, so that they never wait for the host: errors are raised
    then, unless the runtime observes, which waits for each Hessian.
    """
    runtime, streams = runtime or Runtime(), _streams(batches)
    dtype = runtime.store.get(batches[0].x).dtype
    running, result, told = dict(placed(p, runtime.mesh, WHOLE)), dict(p), list[Callable[[], tuple[LinearReport, ...]]]()
    models = [running, dict(running)][: len(streams)]
    steps = [partial(_enter, spec, model, mesh=runtime.mesh) for model in models]
    moments, require_finite = _pass(steps, streams, batches, _linears_at(spec, 0, plan, names), runtime)
    for at, stop in enumerate(spec.stops):
        solved = {}
        told.append(require_finite)
        if runtime.observe:
            require_finite()
        for tap, roles in spec.stages:
            mine = {role: plan[role] for role in roles if role in plan}
            if STOP_OF[tap] == stop and mine:
                for role, q, tell in _quantize_tap(spec, models, tap, streams, moments, batches, mine, names, runtime):
                    solved[role] = q
                    told.append(tell)
        result.update({role: local(q.with_bias(None), runtime.mesh).with_bias(p[role].get("bias")) for role, q in solved.items()})
        if sequential:
            running.update({role: _dequantized(q, dtype) for role, q in solved.items()})
        steps = [_onward(spec, model, stop, runtime.mesh) for model in models]
        moments, require_finite = _pass(steps, streams, batches, _linears_at(spec, at + 1, plan, names), runtime)
    reports = tuple(report for tell in told for report in tell())
    after = _with(batches, streams)
    if not sequential:
        passed = run_block(spec, result, batches, runtime=runtime)
        after = [batch._replace(x=quantized.x) for batch, quantized in zip(after, passed, strict=True)]
    return result, reports, after


def run_block(
    spec: BlockSpec, p: BlockParams, batches: Sequence[Batch], *, exact: BlockParams | None = None, runtime: Runtime | None = None
) -> list[Batch]:
    """What leaves a block that is quantized already, to the last bit what `quantize_block` left.

    `exact` is the float block, through which the float stream goes on; without it, that ends here.
    """
    runtime = runtime or Runtime()
    dtype = runtime.store.get(batches[0].x).dtype
    models = placed([p] if exact is None else [p, exact], runtime.mesh, WHOLE)
    streams = _streams(batches)[: len(models)]

    def dense(leaf: Any) -> Any:
        return _dequantized(leaf, dtype) if isinstance(leaf, QuantizedLinear) else leaf

    def through(p: BlockParams, x: Array) -> Array:
        state = _enter(spec, p, x, mesh=runtime.mesh)
        for stop in spec.stops:
            state = _onward(spec, p, stop, runtime.mesh)(state)
        return state

    _pass([partial(through, {role: dense(leaf) for role, leaf in p.items()}) for p in models], streams, batches, {}, runtime)
    return _with(batches, streams)


def _streams(batches: Sequence[Batch]) -> list[list[Any]]:
    """What waits in the quantized stream and, where there is one, in the float stream, in which None waits for samples that go alone."""
    streams = [[batch.x for batch in batches], [batch.exact for batch in batches]]
    return [stream for stream in streams if any(waiting is not None for waiting in stream)]


def _with(batches: Sequence[Batch], streams: Sequence[Sequence[Any]]) -> list[Batch]:
    """The batches with what waits in these streams."""
    return [Batch(x, batch.keep, batch.samples, batch.share, *exact) for batch, x, *exact in zip(batches, *streams, strict=True)]


def _onward(spec: BlockSpec, p: BlockParams, stop: Stop, mesh: Mesh | None) -> Callable[[State], Any]:
    """From a state at `stop` to the next one, or to what leaves the block."""
    if stop == spec.stops[-1]:
        return lambda state: _advance(spec, p, state, stop, mesh).x
    return lambda state: _advance(spec, p, state, stop, mesh)


def _linears_at(spec: BlockSpec, at: int, plan: Mapping[str, QuantConfig], names: Mapping[str, str]) -> dict[Tap, dict[str, QuantConfig]]:
    """The taps of the stop of this number that linears of `plan` read, experts aside, each with their names and configurations."""
    return {
        tap: {names[role]: plan[role] for role in roles if role in plan}
        for tap, roles in spec.stages
        if STOP_OF[tap] in spec.stops[at : at + 1] and tap not in EXPERT_TAPS and any(role in plan for role in roles)
    }


def _pass(
    steps: Sequence[Callable[[Any], Any]],
    streams: Sequence[list[Any]],
    batches: Sequence[Batch],
    taps: Mapping[Any, Mapping[str, QuantConfig]],
    runtime: Runtime,
) -> tuple[dict[Any, tuple[Moments, ...]], Callable[[], tuple[()]]]:
    """Put in the place of all that waits in each stream what its step makes of it; the moments of what then enters each of `taps`.

    `taps` tell the linears that read each. What is returned beside raises ValueError naming the first sample that is not finite.
    """
    found: dict[Any, list[Moments]] = {}
    finite: dict[Any, list[tuple[Sequence[int], Array]]] = {tap: [] for tap in taps}
    for i, batch in enumerate(batches):
        waiting = [(step, stream) for step, stream in zip(steps, streams, strict=True) if stream[i] is not None]
        states = [step(runtime.store.get(stream[i])) for step, stream in waiting]
        for tap, readers in taps.items():
            xs = tuple(state.taps[tap] for state in states)
            if tap not in found:
                found[tap] = list(zeros(partial(no_rows, xs[0].shape[-1], readers.values()), runtime.mesh))
            for share, keep in rows_of(batch.keep, batch.share, len(found[tap]), runtime.mesh):
                found[tap][share], fine = _add(found[tap][share], xs, keep, runtime.mesh)
                finite[tap].append((batch.samples, fine))
        for (_, stream), state in zip(waiting, states, strict=True):
            stream[i] = runtime.store.put(state)
            if i >= AHEAD:
                jax.block_until_ready(stream[i - AHEAD])  # else what waits elsewhere would all be fetched at once
    flags = {tap: gathered([fine for _, fine in finite[tap]], runtime.mesh) for tap in taps}

    def require_finite() -> tuple[()]:
        for tap, readers in taps.items():
            samples = [numbers for numbers, _ in finite[tap]]
            _require_finite(next(iter(readers)), samples, jax.device_get(flags[tap]))
        return ()

    return {tap: tuple(added(m, runtime.mesh) for m in moments) for tap, moments in found.items()}, require_finite


def _quantize_tap(
    spec: BlockSpec,
    models: Sequence[BlockParams],
    tap: Tap,
    streams: Sequence[Sequence[Any]],
    moments: Mapping[Tap, Sequence[Moments]],
    batches: Sequence[Batch],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    runtime: Runtime,
) -> Iterator[tuple[str, QuantizedLinear, Callable[[], tuple[LinearReport, ...]]]]:
    """The roles of `plan`, which read `tap`, quantized, with what gives their reports."""
    if tap in EXPERT_TAPS:
        assert isinstance(spec.ffn, MoeSpec)
        yield from quantize_experts(spec.ffn, models, tap, streams, batches, plan, names, runtime)
        return
    role_of = {names[role]: role for role in plan}
    linears, mine = {n: models[0][r] for n, r in role_of.items()}, {n: plan[r] for n, r in role_of.items()}
    for name, q, tell in _quantize_dense(linears, moments[tap], mine, runtime):
        yield role_of[name], q, partial(_alone, tell)


def _alone(tell: Callable[[], LinearReport]) -> tuple[LinearReport, ...]:
    return (tell(),)


def _quantize_dense(
    linears: Mapping[str, Any], moments: Sequence[Moments], plan: Mapping[str, QuantConfig], runtime: Runtime
) -> Iterator[tuple[str, QuantizedLinear, Callable[[], LinearReport]]]:
    """Linears that read one input, of these moments, quantized, with what gives their reports."""
    h = total(moments).h
    if runtime.observe:
        runtime.observe(tuple(linears), h)
    yield from begin_linears(linears, h, plan, moments=moments, runtime=runtime)


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
    m: Moments, xs: Sequence[Float[Array, "samples time features"]], keep: Bool[Array, "samples time"], mesh: Mesh | None
) -> tuple[Moments, Bool[Array, " samples"]]:
    def one(m: Moments, xs: Sequence[Array], keep: Array) -> tuple[Moments, Array]:
        finite = jnp.stack([jnp.isfinite(x).all(2) for x in xs]).all(0)
        return add(m, xs, keep), (finite | ~keep).all(1)

    return adding(one, mesh, (PARTS, PARTS))(m, xs, keep)


def _require_finite(name: str, samples: Sequence[Sequence[int]], finite: Sequence[np.ndarray]) -> None:
    """Raise ValueError naming the first of the samples of each batch that makes the input of the linear `name` infinite or NaN."""
    bad = [n for numbers, fine in zip(samples, finite, strict=True) for n, ok in zip(numbers, fine, strict=False) if not ok]
    if bad:
        raise ValueError(
            f"{name}: calibration sample {min(bad)} makes its input infinite or NaN. "
            "Check the sample and the model's weights; a float16 model may need bfloat16 or float32."
        )
