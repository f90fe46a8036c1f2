"""Quantizing a model block by block: each block sees its inputs as the quantized blocks before it make them."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptq_fn._config import QuantConfig
from gptq_fn._hessian import Hessian, add_rows, empty
from gptq_fn._linears import quantize_linears
from gptq_fn._quantized import dequantize
from gptq_fn._report import LinearReport, Report
from gptq_fn.model.block import BlockParams, State, advance, enter
from gptq_fn.model.decoder import Params, embed
from gptq_fn.spec import TAPS, BlockSpec, ModelSpec, Tap

TOKENS_PER_CALL = {"cpu": 512}
"""Calibration tokens that pass through a block at once, by JAX backend; 4096 elsewhere. On CPUs those of few stay in cache."""

Batches = Sequence[Float[Array, "batch time width"]]


class Quantized(NamedTuple):
    """A quantized model: `params` has QuantizedLinear leaves where linears were quantized."""

    params: Params
    spec: ModelSpec
    report: Report


def quantize(params: Params, spec: ModelSpec, calib: Int[Array, "samples time"], config: QuantConfig | None = None) -> Quantized:
    """GPTQ on a whole model in memory.

    `params` is {"top": {role: {"weight", "bias"}}, "blocks": [{role: {"weight", "bias"}}]} with weights [out, in];
    `calib` holds token ids, without padding. Computation runs in the dtype of the embedding. Raises ValueError where
    weights or activations are not finite.
    """
    config = config or QuantConfig()
    done = list(quantize_blocks(spec, params["blocks"], embed_batches(spec, params["top"], calib), config))
    report = Report(config, tuple(r for _, reports in done for r in reports))
    return Quantized({"top": params["top"], "blocks": [p for p, _ in done]}, spec, report)


def embed_batches(spec: ModelSpec, top: Mapping[str, Any], calib: Int[Array, "samples time"]) -> Batches:
    """What enters the first block, in batches of one shape and at least one sample."""
    samples, length = calib.shape
    limit = max(1, min(samples, TOKENS_PER_CALL.get(jax.default_backend(), 4096) // length))
    size = next(size for size in range(limit, 0, -1) if samples % size == 0)
    return [embed(spec, top, jnp.asarray(calib[i : i + size])) for i in range(0, samples, size)]


def quantize_blocks(
    spec: ModelSpec, blocks: Iterable[BlockParams], xs: Batches, config: QuantConfig
) -> Iterator[tuple[BlockParams, tuple[LinearReport, ...]]]:
    """Each block of `blocks` quantized, with reports, in order; one block at a time is asked for.

    `xs` is what enters the first block. Raises ValueError as `quantize` does, naming the linear and the sample.
    """
    for i, (block_spec, p) in enumerate(zip(spec.blocks, blocks, strict=True)):
        names = {linear.role: spec.name_of(i, linear) for linear in block_spec.linears}
        chosen = {linear.role: config.resolve(names[linear.role]) for linear in block_spec.linears if linear.quantize}
        plan = {role: found for role, found in chosen.items() if found is not None}
        quantized, reports, xs = quantize_block(block_spec, p, xs, plan, names, sequential=config.sequential)
        yield quantized, reports


def quantize_block(
    spec: BlockSpec,
    p: BlockParams,
    xs: Batches,
    plan: Mapping[str, QuantConfig],
    names: Mapping[str, str],
    *,
    sequential: bool = True,
) -> tuple[BlockParams, tuple[LinearReport, ...], Batches]:
    """The block with the roles of `plan` quantized, their reports, and what leaves the quantized block.

    Where `sequential`, the linears at a tap are solved before the next tap is computed; else all taps are computed from
    the float block first.
    """
    running, result, reports = dict(p), dict(p), []
    states = [_enter(spec, p, x) for x in xs]
    passes: list[tuple[Tap, ...]] = [(tap,) for tap in TAPS] if sequential else [TAPS]
    for taps in passes:
        gathered: dict[Tap, tuple[list[str], Hessian]] = {}
        ahead = list(states)
        for k, tap in enumerate(taps):
            if k:
                _advance_all(spec, running, ahead, taps[k - 1])
            if roles := [x.role for x in spec.linears if x.tap == tap and x.role in plan]:
                gathered[tap] = roles, _gather(ahead, names[roles[0]])
        del ahead
        for roles, h in gathered.values():
            role_of = {names[role]: role for role in roles}
            chosen = {names[role]: plan[role] for role in roles}
            for name, q, report in quantize_linears({names[role]: running[role] for role in roles}, h, chosen):
                role = role_of[name]
                result[role] = q
                running[role] = {"weight": dequantize(q)} if q.bias is None else {"weight": dequantize(q), "bias": q.bias}
                reports.append(report)
        for tap in taps:
            _advance_all(spec, running, states, tap)
    return result, tuple(reports), [state.x for state in states]


@partial(jax.jit, static_argnames="spec")
def _enter(spec: BlockSpec, p: BlockParams, x: Array) -> State:
    return enter(spec, p, x)


@partial(jax.jit, static_argnames=("spec", "tap"))
def _advance(spec: BlockSpec, p: BlockParams, state: State, tap: Tap) -> State:
    return advance(spec, p, state, tap)[0]


def _advance_all(spec: BlockSpec, p: BlockParams, states: list[State], tap: Tap) -> None:
    """Move every state on from `tap`, in place: only one state exists twice at a time."""
    for i, state in enumerate(states):
        states[i] = _advance(spec, p, state, tap)


@partial(jax.jit, donate_argnums=0)
def _add(h: Hessian, x: Float[Array, "samples time features"]) -> tuple[Hessian, Bool[Array, " samples"]]:
    return add_rows(h, x), jnp.isfinite(x).all((1, 2))


def _gather(states: Sequence[State], name: str) -> Hessian:
    """The Hessian of what enters the linear `name`. Raises ValueError naming the first sample that is not finite."""
    h, finite = empty(states[0].tap.shape[-1]), []
    for state in states:
        h, fine = _add(h, state.tap)
        finite.append(fine)
    fine = np.concatenate([np.asarray(f) for f in finite])
    if not fine.all():
        raise ValueError(
            f"{name}: calibration sample {int(fine.argmin())} makes its input infinite or NaN. "
            "Check the sample and the model's weights; a float16 model may need bfloat16 or float32."
        )
    return h
