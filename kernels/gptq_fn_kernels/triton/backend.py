"""The Triton tier as a backend: its reasons, and its launches on the current stream."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F

from gptq_fn_kernels.problem import Problem
from gptq_fn_kernels.triton.layout import chunk_of
from gptq_fn_kernels.triton.plan import DENSE_OUTPUTS, Gpu, Plan, constants_of, plan_of
from gptq_fn_kernels.triton.weight import Parts, TritonWeight

_BLOCK = 1024
"""Elements that a program of the small kernels writes."""

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
    call = _multiply_op if torch.compiler.is_compiling() else _multiply
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = call(rows, weight.parts, weight.bits, weight.group, weight.k)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.n)


def gradient(grad: torch.Tensor, weight: TritonWeight) -> torch.Tensor:
    """grad [..., n] of a product -> grad @ weight [..., k] of its activations, in grad's dtype."""
    call = _gradient_op if torch.compiler.is_compiling() else _gradient
    rows = grad.reshape(-1, grad.shape[-1])
    return call(rows, weight.parts, weight.bits, weight.group, weight.k).reshape(*grad.shape[:-1], weight.k)


def _multiply(x: torch.Tensor, parts: Parts, bits: int, group: int, k: int) -> torch.Tensor:
    (m, found), (chunks, n, _) = x.shape, parts[0].shape
    if found != k:
        raise ValueError(f"The activations have {found} features but the weight has {k} inputs.")
    y = x.new_empty((m, n))
    if m == 0:
        return y
    if x.stride(1) != 1:
        x = x.contiguous()
    *weight, gather = parts
    constants = constants_of(bits, group, x.dtype == torch.bfloat16)
    plan = plan_of(m, n, k, bits=bits, itemsize=x.element_size(), gpu=_gpu(x.device))
    with _on(x.device):
        if gather is not None and (plan is None or plan.kernel == "many_rows"):
            x, k = _gathered(x, gather, k), len(gather)
        if plan is None:
            return F.linear(x.contiguous(), _dequantized(x, parts, constants)[:, :k])
        sizes = (m, n, k, chunks, x.stride(0))
        precision = "tf32x3" if x.dtype == torch.float32 and _gpu(x.device).tensor_float else "ieee"
        constants |= {"BM": plan.rows, "BN": plan.outputs, "SPLIT": plan.split, "STAGES": plan.stages, "PRECISION": precision}
        constants["num_warps"] = plan.warps
        if plan.kernel == "few_rows":
            overlap = _overlap(plan.overlap and _gpu(x.device).overlap)
            around = (None, None, None)  # nothing is done on the way
            _kernels().few_rows[(-(-n // plan.outputs),)](x, gather, *weight, *around, y, *sizes, **constants, **overlap, ONE=m == 1)
        else:
            _split(plan, x, weight, y, sizes, constants)
    return y


def _split(
    plan: Plan, x: torch.Tensor, weight: list[torch.Tensor | None], y: torch.Tensor, sizes: tuple[int, ...], constants: dict[str, Any]
) -> None:
    """Launch many_rows, and what adds its parts where the inputs are split."""
    m, n, *_ = sizes
    grid, early = (-(-m // plan.rows), -(-n // plan.outputs), plan.split), plan.split > 1 and _gpu(x.device).overlap
    sums = y if plan.split == 1 else torch.empty((plan.split, m, n), dtype=torch.float32, device=y.device)
    _kernels().many_rows[grid](x, *weight, sums, *sizes, **constants, OVERLAP=early)
    if plan.split > 1:
        _kernels().add_parts[(-(-m * n // _BLOCK),)](sums, y, m * n, SPLIT=plan.split, BLOCK=_BLOCK, **_overlap(early))


def _overlap(early: bool) -> dict[str, bool]:
    """Arguments of a kernel that is launched before the one before it has ended; older GPUs' drivers must not be asked."""
    return {"OVERLAP": True, "launch_pdl": True} if early else {"OVERLAP": False}


def _gradient(grad: torch.Tensor, parts: Parts, bits: int, group: int, k: int) -> torch.Tensor:
    with _on(grad.device):
        weight = _dequantized(grad, parts, constants_of(bits, group, grad.dtype == torch.bfloat16))
    if parts[-1] is None:
        return grad @ weight[:, :k]
    # Slots without an input go to a column more, which is dropped.
    return grad.new_empty((len(grad), k + 1)).index_copy_(1, parts[-1].long(), grad @ weight)[:, :k].contiguous()


def _dequantized(like: torch.Tensor, parts: Parts, constants: dict[str, Any]) -> torch.Tensor:
    """The weight [n, width], of the dtype and on the device of `like`."""
    (chunks, n, _), width = parts[0].shape, parts[0].shape[0] * chunk_of(constants["BITS"])
    weight = like.new_empty((n, width))
    _kernels().dequantized[(chunks, -(-n // DENSE_OUTPUTS))](*parts[:-1], weight, n, width, **constants, BN=DENSE_OUTPUTS)
    return weight


def _gathered(x: torch.Tensor, gather: torch.Tensor, k: int) -> torch.Tensor:
    """x [m, slots], 0 in slots without an input."""
    m, width = len(x), len(gather)
    y = x.new_empty((m, width))
    _kernels().gathered[(m, -(-width // _BLOCK))](x, gather, y, m, k, width, x.stride(0), BLOCK=_BLOCK)
    return y


_LIBRARY = torch.library.Library("gptq_fn", "FRAGMENT")


def _operator(name: str, launch: Callable[..., torch.Tensor], width: Callable[[Parts, int], int]) -> Any:
    """The operator that compilers see in place of `launch`; called eagerly it would cost some microseconds more."""
    _LIBRARY.define(f"{name}(Tensor x, Tensor?[] parts, int bits, int group, int k) -> Tensor")
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")

    def fake(x: torch.Tensor, parts: Parts, bits: int, group: int, k: int) -> torch.Tensor:
        return x.new_empty((x.shape[0], width(parts, k)))

    torch.library.register_fake(f"gptq_fn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gptq_fn, name).default


_multiply_op = _operator("triton_multiply", _multiply, lambda parts, k: parts[0].shape[1])
_gradient_op = _operator("triton_gradient", _gradient, lambda parts, k: k)


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
    shared = getattr(found, "shared_memory_per_block_optin", 2**16)  # which AMD's have not
    return Gpu(found.multi_processor_count, shared, tensor_float=version >= 8, overlap=version >= 9)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device, which may be another."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()
