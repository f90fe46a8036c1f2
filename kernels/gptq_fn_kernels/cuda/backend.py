"""The CUDA tier as a backend: its reasons, and its launches on the current stream."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from gptq_fn_kernels.cuda.launch import Launch, TensorMap, capture_of, load
from gptq_fn_kernels.cuda.machine import arch_of, unavailable
from gptq_fn_kernels.cuda.plan import Plan, Stream, plan_of
from gptq_fn_kernels.cuda.variants import BITS, DTYPES, GATHER, dense, kind_of, product
from gptq_fn_kernels.cuda.weight import CudaWeight
from gptq_fn_kernels.problem import Problem
from gptq_fn_kernels.triton.layout import chunk_of

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""words, grid, gather"""

_DENSE_OUTPUTS, _DENSE_THREADS, _GATHER_SLOTS = 64, 256, 2048
"""Of a block of dense.cu and gather.cu."""


def unsupported(problem: Problem) -> str | None:
    """None, or why the kernels cannot multiply this."""
    if problem.device != "cuda":
        return f"runs on an NVIDIA GPU, not on {problem.device}"
    if reason := unavailable():
        return reason
    if torch.cuda.get_device_capability()[0] != 9:
        return f"is written for Hopper's instructions (sm_90), found {arch_of(torch.device('cuda'))}"
    if problem.bits not in BITS:
        return f"multiplies 4 and 8 bits, not {problem.bits}"
    if problem.dtype not in DTYPES:
        return f"multiplies activations of torch.float16 and torch.bfloat16, not {problem.dtype}"
    if problem.k % 8 or problem.n % 8:
        return f"copies 16 bytes at a time, so 8 must divide inputs and outputs, found {problem.k} and {problem.n}"
    return None


def matmul(x: torch.Tensor, weight: CudaWeight) -> torch.Tensor:
    """x [..., k] -> [..., n]. Any strides; the same input gives the same bits."""
    call = _multiply_op if torch.compiler.is_compiling() else _multiply
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = call(rows, weight.parts, weight.bits, weight.k)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], weight.n)


def gradient(grad: torch.Tensor, weight: CudaWeight) -> torch.Tensor:
    """grad [..., n] of a product -> grad @ weight [..., k] of its activations, in grad's dtype."""
    call = _gradient_op if torch.compiler.is_compiling() else _gradient
    rows = grad.reshape(-1, grad.shape[-1])
    return call(rows, weight.parts, weight.bits, weight.k).reshape(*grad.shape[:-1], weight.k)


def multiply_by(plan: Plan, x: torch.Tensor, parts: Parts, bits: int) -> torch.Tensor:
    """x [m, slots], its rows 16 bytes apart or a multiple, at an address that 16 divides, -> [m, n]."""
    words, grid, _ = parts
    chunks, n, groups, of_group = grid.shape
    m, k = x.shape
    y = x.new_empty((m, n))
    kind = (bits, chunk_of(bits) // groups, of_group == 2, grid.dtype, x.dtype)
    launch = _launch(plan, kind, groups * of_group, m, n, k, chunks, x.stride(0), x.device.index)
    stream = _stream(x)
    scratch = _scratch(plan, x.device.index, stream) if isinstance(plan, Stream) else ()
    pointers = (part.data_ptr() for part in (x, words, grid, y, *scratch))
    launch(stream, *pointers, m, n, chunks)
    return y


def _scratch(plan: Stream, device: int, stream: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where blocks leave their sums, and who has: zeros, which the kernel leaves as it finds them."""
    processors = _processors(device)
    sums = torch.empty((processors, plan.tile.rows, plan.tile.outputs), dtype=torch.float32, device=f"cuda:{device}")
    # A graph that is captured has zeros of its own, written at the start of each replay: it may run beside what the stream does then.
    capture = capture_of(stream)
    home = _CAPTURED if capture else _FLAGS
    key = (device, stream, capture)
    if key not in home:
        _CAPTURED.clear()  # a finished capture's zeros stay in the graph's own memory
        home[key] = torch.zeros(processors, dtype=torch.int32, device=f"cuda:{device}")
    return sums, home[key]


_FLAGS: dict[tuple[int, int, int], torch.Tensor] = {}
"""For each device and stream, on which one kernel runs after the other."""

_CAPTURED: dict[tuple[int, int, int], torch.Tensor] = {}
"""The same within the capture that is under way."""


def _multiply(x: torch.Tensor, parts: Parts, bits: int, k: int) -> torch.Tensor:
    (m, found), (chunks, n, *_) = x.shape, parts[1].shape
    if found != k:
        raise ValueError(f"The activations have {found} features but the weight has {k} inputs.")
    if m == 0:
        return x.new_empty((m, n))
    with _on(x.device):
        plan = plan_of(m, n, chunks, _processors(x.device.index))
        if parts[2] is not None:
            x = _gathered(x if x.stride(1) == 1 else x.contiguous(), parts[2])
        if plan is None:
            return F.linear(x, _dequantized(x, parts, bits)[:, : x.shape[1]])
        if x.stride(1) != 1 or x.stride(0) % 8 or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)
        return multiply_by(plan, x, parts, bits)


def _gradient(grad: torch.Tensor, parts: Parts, bits: int, k: int) -> torch.Tensor:
    with _on(grad.device):
        weight = _dequantized(grad, parts, bits)
    if parts[2] is None:
        return grad @ weight[:, :k]
    # Slots without an input go to a column more, which is dropped.
    return grad.new_empty((len(grad), k + 1)).index_copy_(1, parts[2].long(), grad @ weight)[:, :k].contiguous()


def _dequantized(like: torch.Tensor, parts: Parts, bits: int) -> torch.Tensor:
    """The weight [n, width], of the dtype and on the device of `like`."""
    words, grid, _ = parts
    chunks, n, groups, of_group = grid.shape
    weight = like.new_empty((n, chunks * chunk_of(bits)))
    kind = kind_of(bits, chunk_of(bits) // groups, of_group == 2, grid.dtype, like.dtype)
    kernel = load(dense(kind), arch_of(like.device), like.device.index, 0)
    launch = Launch(kernel, (chunks, -(-n // _DENSE_OUTPUTS)), (_DENSE_THREADS,), 5)
    launch(_stream(like), words.data_ptr(), grid.data_ptr(), weight.data_ptr(), n, chunks)
    return weight


def _gathered(x: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    """x [m, slots], 0 in slots without an input."""
    (m, k), width = x.shape, len(gather)
    y = x.new_empty((m, width))
    kernel = load(GATHER, arch_of(x.device), x.device.index, 0)
    launch = Launch(kernel, (-(-width // _GATHER_SLOTS), m), (256,), 6, overlap=True)
    launch(_stream(x), x.data_ptr(), gather.data_ptr(), y.data_ptr(), width, k, x.stride(0))
    return y


@lru_cache(maxsize=4096)
def _launch(plan: Plan, kind: tuple[Any, ...], grid: int, m: int, n: int, k: int, chunks: int, stride: int, device: int) -> Launch:
    tile, bits, dtype = plan.tile, kind[0], kind[-1]
    kernel = load(product(kind_of(*kind), plan), "sm_90a", device, tile.shared(bits, grid))
    maps = {0: TensorMap(dtype, (m, k), (2 * stride,), (tile.rows, 64), swizzle=128)}
    high, wide = -(-m // tile.rows), -(-n // tile.outputs)
    if isinstance(plan, Stream):
        blocks = min(_processors(device), high * wide * chunks)
        return Launch(kernel, (blocks,), (tile.threads,), 9, overlap=True, maps=maps)
    return Launch(kernel, (high, wide, plan.parts), (tile.threads,), 7, cluster=(1, 1, plan.parts), overlap=True, maps=maps)


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _stream(x: torch.Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(x.device.index)


def _on(device: torch.device) -> Any:
    """Launches go to the current device, which may be another."""
    elsewhere = device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


_LIBRARY = torch.library.Library("gptq_fn", "FRAGMENT")


def _operator(name: str, launch: Callable[..., torch.Tensor], width: Callable[[Parts, int], int]) -> Any:
    """The operator that compilers see in place of `launch`; called eagerly it would cost some microseconds more."""
    _LIBRARY.define(f"{name}(Tensor x, Tensor?[] parts, int bits, int k) -> Tensor")
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")

    def fake(x: torch.Tensor, parts: Parts, bits: int, k: int) -> torch.Tensor:
        return x.new_empty((x.shape[0], width(parts, k)))

    torch.library.register_fake(f"gptq_fn::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.gptq_fn, name).default


_multiply_op = _operator("cuda_multiply", _multiply, lambda parts, k: parts[0].shape[1])
_gradient_op = _operator("cuda_gradient", _gradient, lambda parts, k: k)
