"""The Triton tier as a backend: its reasons, and its launches on the current stream."""

from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from gptq_fn_kernels.problem import Problem
from gptq_fn_kernels.triton.layout import chunk_of
from gptq_fn_kernels.triton.plan import Gpu, Plan, constants_of, plan_of
from gptq_fn_kernels.triton.weight import TritonWeight

_DENSE_OUTPUTS = 64
_BLOCK = 1024
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def unsupported(problem: Problem) -> str | None:
    """None, or why the kernels cannot multiply this."""
    if find_spec("triton") is None:
        return "needs Triton, which is not installed: pip install triton"
    if problem.device != "cuda" and not _interpreted():
        return f"runs on a GPU, not on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"multiplies activations of torch.float16, torch.bfloat16 and torch.float32, not {problem.dtype}"
    if problem.n * problem.k * problem.bits >= 2**36:
        return f"counts words in 32 bits, which {problem.n} outputs of {problem.k} inputs of {problem.bits} bits exceed"
    return _too_old(problem.dtype) if torch.cuda.is_available() and torch.version.hip is None else None


def _too_old(dtype: torch.dtype) -> str | None:
    found, needed = torch.cuda.get_device_capability(), (8, 0) if dtype == torch.bfloat16 else (7, 5)
    return None if found >= needed else f"needs a GPU of compute capability {needed} for {dtype}, found {found}"


def matmul(x: torch.Tensor, weight: TritonWeight) -> torch.Tensor:
    """x [..., k] -> [..., n]. Any strides; the same input gives the same bits."""
    call = _op if torch.compiler.is_compiling() else _multiply
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    w = weight
    y = call(rows, w.words, w.high, w.zeros, w.scales, w.gather, w.bits, w.group, w.k)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], w.n)


def _multiply(
    x: torch.Tensor,
    words: torch.Tensor,
    high: torch.Tensor | None,
    zeros: torch.Tensor | None,
    scales: torch.Tensor,
    gather: torch.Tensor | None,
    bits: int,
    group: int,
    k: int,
) -> torch.Tensor:
    m, n, width = x.shape[0], words.shape[1], words.shape[0] * chunk_of(bits)
    if x.shape[1] != k:
        raise ValueError(f"The activations have {x.shape[1]} features but the weight has {k} inputs.")
    y = x.new_empty((m, n))
    if m == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    constants = constants_of(bits, group, x.dtype == torch.bfloat16)
    plan = plan_of(m, n, k, bits=bits, itemsize=x.element_size(), gpu=_gpu(x.device))
    with _on(x.device):
        if gather is not None and (plan is None or plan.kernel == "many_rows"):
            x, k = _gathered(x, gather, k), width
        if plan is None:
            weight = x.new_empty((n, width))
            grid = (width // chunk_of(bits), -(-n // _DENSE_OUTPUTS))
            _kernels().dequantized[grid](words, high, zeros, scales, weight, n, width, **constants, BN=_DENSE_OUTPUTS)
            return F.linear(x.contiguous(), weight[:, :k])
        _launch(plan, x, gather, words, high, zeros, scales, y, m, n, k, constants)
    return y


def _launch(
    plan: Plan,
    x: torch.Tensor,
    gather: torch.Tensor | None,
    words: torch.Tensor,
    high: torch.Tensor | None,
    zeros: torch.Tensor | None,
    scales: torch.Tensor,
    y: torch.Tensor,
    m: int,
    n: int,
    k: int,
    constants: dict[str, int],
) -> None:
    blocks: dict[str, Any] = {"BM": plan.rows, "BN": plan.outputs, "SPLIT": plan.split, "STAGES": plan.stages, "num_warps": plan.warps}
    blocks["PRECISION"] = "tf32x3" if x.dtype == torch.float32 and _gpu(x.device).tensor_float else "ieee"
    sizes = (m, n, k, words.shape[0], x.stride(0))
    if plan.kernel == "few_rows":
        grid = (-(-n // plan.outputs),)
        _kernels().few_rows[grid](x, gather, words, high, zeros, scales, y, *sizes, **constants, **blocks)
        return
    parts = y if plan.split == 1 else torch.empty((plan.split, m, n), dtype=torch.float32, device=y.device)
    overlap = plan.split > 1 and _gpu(x.device).overlap
    grid = (-(-m // plan.rows), -(-n // plan.outputs), plan.split)
    _kernels().many_rows[grid](x, words, high, zeros, scales, parts, *sizes, **constants, **blocks, OVERLAP=overlap)
    if plan.split > 1:
        launch = {"launch_pdl": True} if overlap else {}
        _kernels().add_parts[(-(-m * n // _BLOCK),)](parts, y, m * n, SPLIT=plan.split, BLOCK=_BLOCK, OVERLAP=overlap, **launch)


def _gathered(x: torch.Tensor, gather: torch.Tensor, k: int) -> torch.Tensor:
    m, width = len(x), len(gather)
    y = x.new_empty((m, width))
    _kernels().gathered[(m, -(-width // _BLOCK))](x, gather, y, m, k, width, x.stride(0), BLOCK=_BLOCK)
    return y


def _fake(x: torch.Tensor, words: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty((x.shape[0], words.shape[1]))


_LIBRARY = torch.library.Library("gptq_fn", "FRAGMENT")
_LIBRARY.define(
    "triton_multiply(Tensor x, Tensor words, Tensor? high, Tensor? zeros, Tensor scales, Tensor? gather, "
    "int bits, int group, int k) -> Tensor"
)
_LIBRARY.impl("triton_multiply", _multiply, "CompositeExplicitAutograd")
torch.library.register_fake("gptq_fn::triton_multiply", _fake, lib=_LIBRARY)
_op = torch.ops.gptq_fn.triton_multiply.default


@cache
def _kernels() -> ModuleType:
    from gptq_fn_kernels.triton import kernels  # needs Triton

    return kernels


def _interpreted() -> bool:
    from triton import knobs

    return knobs.runtime.interpret


@cache
def _gpu(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return Gpu(processors=132, shared=2**17, tensor_float=True, overlap=False)  # Triton's interpreter
    found = torch.cuda.get_device_properties(device)
    version = found.major if torch.version.hip is None else 0
    return Gpu(found.multi_processor_count, found.shared_memory_per_block_optin, tensor_float=version >= 8, overlap=version >= 9)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which may be another."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
