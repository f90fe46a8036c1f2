"""Quantizing a model block by block: each block sees its inputs as the quantized blocks before it make them."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from gptq_fn._batches import Batch, Samples, embed_batches
from gptq_fn._config import QuantConfig
from gptq_fn._experts import quantize_experts
from gptq_fn._hessian import Hessian, add_rows, empty
from gptq_fn._linears import quantize_linears
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._report import LinearReport, Report
from gptq_fn.model.block import BlockParams, State, advance, enter
from gptq_fn.model.decoder import Params, head_input
from gptq_fn.spec import STOP_OF, BlockSpec, ModelSpec, MoeSpec, Stop, Tap


class Quantized(NamedTuple):
    """A quantized model: `params` has QuantizedLinear leaves where linears were quantized."""

    params: Params
    spec: ModelSpec
    report: Report


def quantize(params: Params, spec: ModelSpec, calib: Samples, config: QuantConfig | None = None) -> Quantized:
    """GPTQ on a whole model in memory.

    `params` is {"top": {role: {"weight", "bias"}}, "blocks": [{role: {"weight", "bias"}}]} with weights [out, in], those
    of experts [experts, out, in]; `calib` holds token ids [samples, time], or samples of any lengths. Computation runs
    in the dtype of the embedding. Raises ValueError where weights or activations are not finite, and for rules that cannot be followed.
    """
    config = config or QuantConfig()
    head_plan(spec, config)
    batches, blocks, reports = embed_batches(spec, params["top"], calib), [], []
    for p, found, after in quantize_blocks(spec, params["blocks"], batches, config):
        batches = after
        blocks.append(p)
        reports.extend(found)
    spec, top, found = quantize_head(spec, params["top"], batches, config)
    return Quantized({"top": top, "blocks": blocks}, spec, Report(config, (*reports, *found)))


def quantize_blocks(
    spec: ModelSpec, blocks: Iterable[BlockParams], batches: Sequence[Batch], config: QuantConfig
) -> Iterator[tuple[BlockParams, tuple[LinearReport, ...], Sequence[Batch]]]:
    """Each block of `blocks` quantized, its reports, and what leaves it, in order; one block at a time is asked for.

    `batches` are what enters the first block. Raises ValueError as `quantize` does, naming the linear and the sample.
    """
    for i, (block_spec, p) in enumerate(zip(spec.blocks, blocks, strict=True)):
        names = {linear.role: spec.name_of(i, linear) for linear in block_spec.linears}
        quantized, reports, batches = quantize_block(block_spec, p, batches, _plan(spec, i, config), names, sequential=config.sequential)
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
    spec: ModelSpec, top: Mapping[str, Any], batches: Sequence[Batch], config: QuantConfig
) -> tuple[ModelSpec, Mapping[str, Any], tuple[LinearReport, ...]]:
    """The spec and the parameters outside the blocks, with the head quantized where a rule asks for it.

    `batches` are what leaves the last block. Raises ValueError as `head_plan` does.
    """
    plan, name = head_plan(spec, config), dict(spec.tensors).get("head")
    if plan is None or name is None:
        return spec, top, ()
    shell = replace(spec, blocks=())
    states = [State(batch.x, {"head_in": _head_input(shell, top, batch.x)}, {}) for batch in batches]
    leaf = top["embed"] if spec.tied else top["head"]
    ((_, head, report),) = quantize_linears({name: leaf}, _gather(states, batches, "head_in", name), {name: plan})
    return _untied(spec), {**top, "head": head}, (report,)


def _untied(spec: ModelSpec) -> ModelSpec:
    """The spec with a head of its own, which its config.json says too."""
    if not spec.tied:
        return spec
    origin = None if spec.origin is None else json.dumps({**json.loads(spec.origin), "tie_word_embeddings": False})
    return replace(spec, tied=False, origin=origin)


_head_input = jax.jit(head_input, static_argnames="spec")


def quantize_block(
    spec: BlockSpec,
    p: BlockParams,
    batches: Sequence[Batch],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    *,
    sequential: bool = True,
) -> tuple[BlockParams, tuple[LinearReport, ...], list[Batch]]:
    """The block with the roles of `plan` quantized, their reports, and what leaves the quantized block.

    Where `sequential`, the linears at a tap are solved before the next tap is computed; else all taps are computed from
    the float block. `names` maps roles to the names that reports use, with "{n}" for the number of an expert.
    """
    running, result, reports = dict(p), dict(p), []
    states = [_enter(spec, p, batch.x) for batch in batches]
    for stop in spec.stops:
        for tap, roles in spec.stages:
            mine = {role: plan[role] for role in roles if role in plan}
            if STOP_OF[tap] == stop and mine:
                for role, q, found in _quantize_tap(spec, running, tap, states, batches, mine, names):
                    result[role] = q
                    reports.extend(found)
        if sequential:
            running.update({role: _dequantized(q) for role, q in result.items() if isinstance(q, QuantizedLinear)})
        _advance_all(spec, running, states, stop)
    if not sequential:
        states = [_enter(spec, result, batch.x) for batch in batches]
        for stop in spec.stops:
            _advance_all(spec, result, states, stop)
    return result, tuple(reports), [batch._replace(x=state.x) for batch, state in zip(batches, states, strict=True)]


def _quantize_tap(
    spec: BlockSpec,
    p: BlockParams,
    tap: Tap,
    states: Sequence[State],
    batches: Sequence[Batch],
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
) -> Iterator[tuple[str, QuantizedLinear, tuple[LinearReport, ...]]]:
    """The roles of `plan`, which read `tap`, quantized, with their reports."""
    if tap in ("expert_in", "expert_down_in"):
        assert isinstance(spec.ffn, MoeSpec)
        yield from quantize_experts(spec.ffn, p, tap, states, [batch.keep for batch in batches], plan, names)
        return
    role_of = {names[role]: role for role in plan}
    h = _gather(states, batches, tap, next(iter(role_of)))
    for name, q, report in quantize_linears({n: p[r] for n, r in role_of.items()}, h, {n: plan[r] for n, r in role_of.items()}):
        yield role_of[name], q, (report,)


def _dequantized(q: QuantizedLinear) -> dict[str, Array]:
    weight = _dequantize(q.with_bias(None))
    return {"weight": weight} if q.bias is None else {"weight": weight, "bias": q.bias}


_dequantize = jax.jit(dequantize)


@partial(jax.jit, static_argnames="spec")
def _enter(spec: BlockSpec, p: BlockParams, x: Array) -> State:
    return enter(spec, p, x)


@partial(jax.jit, static_argnames=("spec", "stop"))
def _advance(spec: BlockSpec, p: BlockParams, state: State, stop: Stop) -> State:
    return advance(spec, p, state, stop)[0]


def _advance_all(spec: BlockSpec, p: BlockParams, states: list[State], stop: Stop) -> None:
    """Move every state on from `stop`, in place: only one state exists twice at a time."""
    for i, state in enumerate(states):
        states[i] = _advance(spec, p, state, stop)


@partial(jax.jit, donate_argnums=0)
def _add(
    h: Hessian, x: Float[Array, "samples time features"], keep: Bool[Array, "samples time"]
) -> tuple[Hessian, Bool[Array, " samples"]]:
    return add_rows(h, x, keep), (jnp.isfinite(x).all(2) | ~keep).all(1)


def _gather(states: Sequence[State], batches: Sequence[Batch], tap: str, name: str) -> Hessian:
    """The Hessian of what enters the linear `name`. Raises ValueError naming the first sample that is not finite."""
    h, finite = empty(states[0].taps[tap].shape[-1]), []
    for state, batch in zip(states, batches, strict=True):
        h, fine = _add(h, state.taps[tap], batch.keep)
        finite.append(fine)
    bad = [n for batch, fine in zip(batches, finite, strict=True) for n, ok in zip(batch.samples, np.asarray(fine), strict=False) if not ok]
    if bad:
        raise ValueError(
            f"{name}: calibration sample {min(bad)} makes its input infinite or NaN. "
            "Check the sample and the model's weights; a float16 model may need bfloat16 or float32."
        )
    return h
