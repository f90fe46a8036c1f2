"""Quantizing a float model when it is loaded, as its GPTQConfig asks."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from gptq_fn_kernels.words import pack, unpack
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptq_fn import ModelSpec, QuantConfig, Rule
from gptq_fn_interop.experts import is_fused
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.request import Request, read, samples
from gptq_fn_interop.stream import Progress


def quantize(model: Any, config: Any) -> None:
    """Quantize a float model in place, as this GPTQConfig asks. Raises ValueError in a sentence where that cannot be."""
    from gptq_fn_interop.in_memory import described, quantize_model, together  # which knows the quantizer, which knows this
    from gptq_fn_interop.trace import trace
    from gptq_fn_interop.traced import quantize_traced

    request, spec = read(config), described(model)
    solver = _for_model(request, model, spec)
    calib = samples(request, model)
    with _shown() as progress:
        if request.blocks is None or (spec is not None and spec.prefix == f"{request.blocks}.{{i}}."):
            quantize_model(model, calib, solver, progress=progress)
        else:
            with together(model):
                traced = trace(model, [max(calib, key=len)[:2048]], blocks=request.blocks)
                quantize_traced(model, calib, solver, traced=traced, progress=progress)
    _describe(model, request)


def _for_model(request: Request, model: Any, spec: ModelSpec | None) -> QuantConfig:
    """The solver's configuration with rules for the linears that the request leaves out, and for the head."""
    config = request.config
    rules = [*_left_out(model, request.layers), *config.rules]
    if not request.head:
        return replace(config, rules=tuple(rules))
    head = None if spec is None else dict(spec.tensors).get("head")
    if head is None:
        raise ValueError(
            f"lm_head=True quantizes the heads of models in the table, which {model.config.model_type!r} is not; leave it out."
        )
    return replace(config, rules=(*rules, Rule(f"{re.escape(head)}$", replace(config, rules=()))), untie=True)


def _left_out(model: Any, layers: Sequence[str] | None) -> Iterator[Rule]:
    """A rule that leaves out the linears of the blocks that are not among these: by their names, as engines will read it."""
    if layers is None:
        return
    inside: dict[str, bool] = {}  # names after the block's number; whether experts are meant, whose names on disk are others
    for name, module in model.named_modules():
        if (found := re.match(r".*?\.\d+\.(.+)", name)) and (isinstance(module, nn.Linear | Conv1D) or is_fused(module)):
            inside[found[1]] = is_fused(module)
    named = {name: [n for n in layers if n == name or (fused and n.startswith(f"{name}."))] for name, fused in inside.items()}
    if absent := [name for name in layers if not any(name in wanted for wanted in named.values())]:
        raise ValueError(f"modules_in_block_to_quantize names {absent[0]!r}, but the linears of a block are {', '.join(sorted(inside))}.")
    if left := [r"experts[.].*" if inside[name] else f"{re.escape(name)}$" for name, wanted in named.items() if not wanted]:
        yield Rule(f".*[.](?:{'|'.join(left)})")


def _describe(model: Any, request: Request) -> None:
    """Make the quantized model say and hold what the request wants of it, beyond its codes."""
    told = model.config.quantization_config.described
    told["meta"] = {**request.meta, **told["meta"]}
    newer = request.version == "gptq_v2" and told["checkpoint_format"] == "gptq"
    if newer:
        told["checkpoint_format"] = model.config.quantization_config.format = "gptq_v2"
    for linear in (module for module in model.modules() if isinstance(module, QuantLinear)):
        linear.backend = None if request.backend == "auto" else request.backend
        if newer:
            linear.scheme["checkpoint_format"] = "gptq_v2"
            linear.qzeros = _version_2(linear)


def _version_2(linear: QuantLinear) -> torch.Tensor:
    """The zero points as version 2 stores them, from those of version 1."""
    zeros = unpack(linear.qzeros.T, linear.bits, linear.out_features, torch) + 1
    return pack(zeros, linear.bits, torch).T.contiguous()


@contextmanager
def _shown() -> Iterator[Progress | None]:
    """Progress as the command shows it, where somebody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from gptq_fn_interop.console import progress

    with progress("Quantizing blocks") as advance:
        yield advance
