"""Quantizing any torch model through its own forward, along a trace of it: to a checkpoint, or in place."""

import re
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptq_fn import Hessian, LinearReport, QuantConfig, QuantizedLinear, Report, add_rows, dequantize, empty, preset, quantize_linears
from gptq_fn_interop.capture import evaluating, hollow, input_of, is_linear, run_block, weight_of
from gptq_fn_interop.gptq_format import unpackable
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.report.run import Origin, describe_run
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.shards import SHARD_BYTES
from gptq_fn_interop.staging import require_vacant, staged
from gptq_fn_interop.stored import stored_names
from gptq_fn_interop.stream import Progress
from gptq_fn_interop.tensors import to_jax, to_torch
from gptq_fn_interop.torch_checkpoint import ModelWriter, install, layer, with_exceptions
from gptq_fn_interop.trace import Trace, as_tokens, trace

TOKENS_PER_CALL = {"cpu": 512}
"""Calibration tokens that pass through a block at once, by torch device; 4096 elsewhere."""


@dataclass(frozen=True)
class TracedReport(Report):
    """A report that also tells what of the blocks stayed as it was."""

    left: tuple[tuple[str, str], ...] = ()
    """Linears and fused parameters, each with the reason."""


class QuantizedStep(NamedTuple):
    """One block: its quantized linears by name, their reports, and what else was left, with the reason."""

    linears: dict[str, QuantizedLinear]
    reports: tuple[LinearReport, ...]
    left: dict[str, str]


def quantize_traced(
    model: nn.Module,
    calib: Any,
    config: QuantConfig | None = None,
    destination: str | Path | None = None,
    *,
    traced: Trace | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    origin: Origin | None = None,
) -> TracedReport:
    """GPTQ on a torch model whose architecture nothing but its own forward describes.

    With a `destination`, a checkpoint in the GPTQ format appears there, complete or not at all, and the model is left as
    it was. Without one, the linears of the model become QuantLinears, in place and after all of them are computed.

    `calib` holds token ids [samples, time], or samples of any lengths; `traced` is by default the `trace` of some of the
    longest, up to 2,048 tokens. The model runs in its own dtype on its own device, weights are solved in float32. Rules go
    by the names of modules. A linear that cannot be quantized stays float, and `left` of the report says why; so do
    routers, unless a rule matches them. `origin` is told in report.json, `progress` called with the blocks done and their number.
    Raises ValueError or FileExistsError in a sentence where the model, the tokens, the trace or the destination are at fault.
    """
    began = time.perf_counter()
    config = (config or preset("default")).alone(f"{type(model).__name__} is to run through its own forward")
    if destination is not None:
        require_vacant(Path(destination))
    tokens = as_tokens(model, calib)
    longest = max(tokens, key=lambda some: some.shape[1])
    traced = traced or trace(model, longest[: max(1, 2048 // longest.shape[1])])
    linears = _linears(model, traced)
    stored = stored_names(model, [*linears, *(name for name, _ in traced.left)])
    plan, left = _plan(linears, stored, config)
    left = {**dict(traced.left), **left}
    reports: list[LinearReport] = []
    layers: dict[str, QuantLinear] = {}
    with ExitStack() as stack:
        steps = stack.enter_context(closing(quantized_steps(model, traced, tokens, plan, config)))
        writer = None if destination is None else ModelWriter(model, stack.enter_context(staged(destination)), shard_bytes)
        for i, (block, step) in enumerate(zip(traced.blocks, steps, strict=True)):
            left |= step.left
            reports.extend(step.reports)
            if writer is None:
                layers |= {name: layer(q, config, weight_of(linears[name]).device) for name, q in step.linears.items()}
            else:
                writer.add(block.name, step.linears, stored, config)
            if progress:
                progress(i + 1, len(traced.blocks))
        if not reports:
            raise ValueError(f"Nothing was quantized: {'; '.join(f'{name}: {why}' for name, why in [*left.items()][:3]) or 'no linears'}.")
        report = TracedReport(config, tuple(reports), tuple(left.items()))
        exact = with_exceptions(report, [stored[name] or name for name in left if name in stored])
        if writer is not None:
            samples, seconds = [sample for some in tokens for sample in some], time.perf_counter() - began
            run = describe_run(origin, calib=samples, seconds=seconds, libraries=("torch", "transformers"))
            writer.close(report, exact, run)
    if writer is None:
        install(model, layers, exact)
    return report


def quantized_steps(
    model: nn.Module, traced: Trace, tokens: Sequence[torch.Tensor], plan: Mapping[str, QuantConfig], config: QuantConfig
) -> Generator[QuantizedStep]:
    """Each block of the trace quantized, in order; the next one sees its inputs as the quantized blocks make them.

    `tokens` are int64 [samples, time], of one length in each. Only the linears in `plan` are quantized. Close the generator
    to give the model its own weights back before the end.
    """
    blocks = [model.get_submodule(block.name) for block in traced.blocks]
    limit = TOKENS_PER_CALL.get(tokens[0].device.type, 4096)
    batches = [batch for some in tokens for batch in some.split(max(1, limit // some.shape[1]))]
    kept: list[list[Any]] = [[] for _ in batches]

    def run(j: int, b: int) -> Any:
        return run_block(model, blocks, j, batches[b], dict(enumerate(kept[b])))

    with evaluating(model), ExitStack() as whole:
        for j, block in enumerate(traced.blocks):
            with ExitStack() as here:
                swaps = whole if traced.carry == "none" else here
                step = QuantizedStep({}, (), {})
                stages = [stage for names in block.stages if (stage := tuple(name for name in names if name in plan))]
                for some in [[stage] for stage in stages] if config.sequential else [stages]:
                    for names, h in zip(some, _gather(model, some, partial(run, j), len(batches)), strict=True):
                        step = _quantize_stage(model, names, h, plan, step, swaps)
                if traced.carry != "none":
                    for b, before in enumerate(kept):
                        before.append(run(j, b))
                        if traced.carry == "last" and j:
                            before[j - 1] = hollow(before[j - 1])
            yield step


def _quantize_stage(
    model: nn.Module, names: Sequence[str], h: Hessian | None, plan: Mapping[str, QuantConfig], step: QuantizedStep, swaps: ExitStack
) -> QuantizedStep:
    """The step with these linears added. Until `swaps` ends they compute with the weights that their codes stand for."""
    if h is None:
        return step._replace(left={**step.left, **dict.fromkeys(names, "no calibration token passed through it")})
    floats = {}
    for name in names:
        linear = model.get_submodule(name)
        bias = linear._parameters["bias"]
        floats[name] = {"weight": to_jax(weight_of(linear).float())} | ({} if bias is None else {"bias": to_jax(bias)})
    linears, reports = dict(step.linears), list(step.reports)
    with threadpool_limits(1, "blas"):  # as in `quantize_checkpoint`
        for name, q, report in quantize_linears(floats, h, {name: plan[name] for name in names}, runtime=default_runtime()):
            linears[name] = q
            reports.append(report)
            _swap(model.get_submodule(name), to_torch(dequantize(q)), swaps)
    return step._replace(linears=linears, reports=tuple(reports))


def _swap(linear: nn.Module, weight: torch.Tensor, swaps: ExitStack) -> None:
    """Another parameter in the place of the weight, not other values in it: the original is what is given back."""
    original = linear.get_parameter("weight")
    swaps.callback(linear._parameters.__setitem__, "weight", original)
    weight = (weight.T.contiguous() if isinstance(linear, Conv1D) else weight).to(original)
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=False)


def _gather(model: nn.Module, stages: Sequence[Sequence[str]], run: Any, batches: int) -> list[Hessian | None]:
    """The Hessian of what enters each stage, over all batches and calls; None where nothing does."""
    found: list[Hessian | None] = [None] * len(stages)
    at = [0]

    def read(k: int, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs).reshape(-1, input_of(args, kwargs).shape[-1]).float()
            if not bool(torch.isfinite(x).all()):
                raise ValueError(
                    f"{name}: calibration batch {at[0] + 1} of {batches} makes its input infinite or NaN. "
                    "Check its samples and the model's weights; a float16 model may need bfloat16 or float32."
                )
            if len(x):
                # Experts see any number of rows: a power of two compiles few programs.
                padded = nn.functional.pad(x, (0, 0, 0, (1 << (len(x) - 1).bit_length()) - len(x)))
                h = found[k]
                found[k] = _add(empty(x.shape[-1]) if h is None else h, to_jax(padded), jnp.asarray(len(x)))

        return hook

    with ExitStack() as stack:
        for k, names in enumerate(stages):
            handle = model.get_submodule(names[0]).register_forward_pre_hook(read(k, names[0]), with_kwargs=True)
            stack.callback(handle.remove)
        for b in range(batches):
            at[0] = b
            run(b)
    return found


@partial(jax.jit, donate_argnums=0)
def _add(h: Hessian, x: Float[Array, "padded in"], rows: Int[Array, ""]) -> Hessian:
    return add_rows(h, x, jnp.arange(len(x)) < rows)


def _linears(model: nn.Module, traced: Trace) -> dict[str, nn.Module]:
    """The linears of the trace by name. Raises ValueError where the model has no such blocks or linears."""
    modules = dict(model.named_modules())
    names = [name for block in traced.blocks for stage in block.stages for name in stage]
    for name in (*(block.name for block in traced.blocks), *names):
        if name not in modules:
            raise ValueError(f"The trace names {name}, but {type(model).__name__} has no such module; it is of another model.")
    for name in names:
        if not is_linear(modules[name]):
            raise ValueError(f"The trace names {name}, but that {type(modules[name]).__name__} is no linear layer with a float weight.")
    return {name: modules[name] for name in names}


def _plan(
    linears: Mapping[str, nn.Module], stored: Mapping[str, str | None], config: QuantConfig
) -> tuple[dict[str, QuantConfig], dict[str, str]]:
    """How each linear is quantized, and why the others are not."""
    plan: dict[str, QuantConfig] = {}
    left: dict[str, str] = {}
    for name, linear in linears.items():
        out, inputs = weight_of(linear).shape
        router = _routes(name, out, inputs)
        chosen = config.resolve(name, usual=not router)
        if chosen is None:
            left[name] = (
                "it routes tokens, which is cheap and sensitive; a rule that names it would quantize it" if router else "a rule says so"
            )
        elif reason := unpackable((out, inputs), chosen.bits):
            left[name] = reason
        elif stored[name] is None:
            left[name] = "transformers stores its weight in another form, which a packed one cannot take"
        else:
            plan[name] = chosen
    return plan, left


def _routes(name: str, out: int, inputs: int) -> bool:
    return out * 4 <= inputs and re.search(r"(^|\.)(gate|\w*router|\w*expert_gate)(\.|$)", name) is not None
