"""The CUDA tier as a backend: its reasons, and its launches on the current stream."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from gptq_fn_kernels.cuda.launch import Launch, TensorMap, capture_of, load
from gptq_fn_kernels.cuda.machine import arch_of, unavailable
from gptq_fn_kernels.cuda.plan import Multistage, Plan, Stream, plan_of, plans_of
from gptq_fn_kernels.cuda.variants import BITS, DTYPES, GATHER, dense, kind_of, product
from gptq_fn_kernels.cuda.weight import CudaWeight, Parts
from gptq_fn_kernels.problem import Problem
from gptq_fn_kernels.triton.layout import chunk_of

Signature = tuple[Any, ...]
"""What a plan depends on: rows, slots and stride of the activations, shape and dtype of the grid, their own dtype, bits, the device."""

_DENSE_OUTPUTS, _DENSE_CHUNKS, _GATHER_SLOTS = 16, 4, 2048
"""Of a block of dense.cu and gather.cu."""


def on_hopper(problem: Problem) -> str | None:
    """None, or why the kernels for Hopper GPUs cannot multiply this."""
    if (reason := _unsupported(problem)) or not torch.cuda.is_available():
        return reason
    arch = arch_of(torch.device("cuda"))
    return None if arch == "sm_90a" else f"is written for Hopper's instructions (sm_90a), found {arch}"


def elsewhere(problem: Problem) -> str | None:
    """None, or why the kernel that other GPUs can run cannot multiply this."""
    if (reason := _unsupported(problem)) or not torch.cuda.is_available():
        return reason
    arch = arch_of(torch.device("cuda"))
    if arch == "sm_90a":
        return "serves other GPUs than Hopper's, for which there are faster kernels"
    return None if plans_of(arch) else f"needs a GPU of compute capability 8.0 or later, found {arch}"


def _unsupported(problem: Problem) -> str | None:
    if problem.device != "cuda":
        return f"runs on an NVIDIA GPU, not on {problem.device}"
    if reason := unavailable():
        return reason
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
    return _product_by(plan, *_signature(x, parts, bits))(x, parts)


@dataclass(frozen=True, eq=False)
class Product:
    """A plan for activations and weights of one shape, ready to be launched."""

    launch: Launch
    sizes: tuple[int, ...]
    """The kernel's last arguments."""
    outputs: int
    sums: tuple[int, int, int] | None
    """Blocks, and rows and outputs of each, that leave their sums to one another."""

    def __call__(self, x: torch.Tensor, parts: Parts) -> torch.Tensor:
        """x [m, slots] -> [m, n], on the current stream."""
        y = x.new_empty((len(x), self.outputs))
        device = x.get_device()
        stream = torch._C._cuda_getCurrentRawStream(device)
        pointers = (x.data_ptr(), parts[0].data_ptr(), parts[1].data_ptr(), y.data_ptr())
        if self.sums is None:
            self.launch(stream, *pointers, *self.sizes)
        else:
            sums = x.new_empty(self.sums, dtype=torch.float32)
            self.launch(stream, *pointers, sums.data_ptr(), _flags(device, stream).data_ptr(), *self.sizes)
        return y


def _flags(device: int, stream: int) -> torch.Tensor:
    """Which blocks have left their sums: zeros, which a kernel leaves as it finds them."""
    # A graph that is captured has zeros of its own, written at the start of each replay: it may run beside what the stream does then.
    capture = capture_of(stream)
    home = _CAPTURED if capture else _FLAGS
    key = (device, stream, capture)
    if key not in home:
        _CAPTURED.clear()  # a finished capture's zeros stay in the graph's own memory
        most = _processors(device) * max(plan.tile.blocks * plan.tile.abreast for plan in plans_of(_arch(device)))
        home[key] = torch.zeros(most, dtype=torch.int32, device=f"cuda:{device}")
    return home[key]


_FLAGS: dict[tuple[int, int, int], torch.Tensor] = {}
"""For each device and stream, on which one kernel runs after the other."""

_CAPTURED: dict[tuple[int, int, int], torch.Tensor] = {}
"""The same within the capture that is under way."""


def _multiply(x: torch.Tensor, parts: Parts, bits: int, k: int) -> torch.Tensor:
    (m, found), n = x.shape, parts[0].shape[1]
    if found != k:
        raise ValueError(f"The activations have {found} features but the weight has {k} inputs.")
    if m == 0:
        return x.new_empty((m, n))
    if x.get_device() != torch._C._cuda_getDevice():  # launches go to the current device
        with torch.cuda.device(x.device):
            return _multiply(x, parts, bits, k)
    if parts[2] is not None:
        x = _gathered(x if x.stride(1) == 1 else x.contiguous(), parts[2])
    elif x.stride(1) != 1 or x.stride(0) % 8 or x.stride(0) < k or x.data_ptr() % 16:
        x = x.clone(memory_format=torch.contiguous_format)
    product = _product(*_signature(x, parts, bits))
    return F.linear(x, _dequantized(x, parts, bits)[:, : x.shape[1]]) if product is None else product(x, parts)


def _gradient(grad: torch.Tensor, parts: Parts, bits: int, k: int) -> torch.Tensor:
    with torch.cuda.device(grad.device):
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
    kernel = load(dense(kind), _arch(like.device.index), like.device.index, 0)
    launch = Launch(kernel, (-(-chunks // _DENSE_CHUNKS), -(-n // _DENSE_OUTPUTS)), (256,), 5, overlap=_overlaps(like.device.index))
    launch(torch._C._cuda_getCurrentRawStream(like.get_device()), words.data_ptr(), grid.data_ptr(), weight.data_ptr(), n, chunks)
    return weight


def _gathered(x: torch.Tensor, gather: torch.Tensor) -> torch.Tensor:
    """x [m, slots], 0 in slots without an input."""
    (m, k), width = x.shape, len(gather)
    y = x.new_empty((m, width))
    kernel = load(GATHER, _arch(x.device.index), x.device.index, 0)
    launch = Launch(kernel, (-(-width // _GATHER_SLOTS), m), (256,), 6, overlap=_overlaps(x.device.index))
    launch(torch._C._cuda_getCurrentRawStream(x.get_device()), x.data_ptr(), gather.data_ptr(), y.data_ptr(), width, k, x.stride(0))
    return y


def _signature(x: torch.Tensor, parts: Parts, bits: int) -> Signature:
    return (*x.shape, x.stride(0), parts[1].shape, parts[1].dtype, x.dtype, bits, x.get_device())


@lru_cache(maxsize=4096)
def _product(*signature: Any) -> Product | None:
    """The product by the plan for these sizes, or None: dequantize once and multiply densely."""
    m, _, _, (chunks, n, *_), *_, device = signature
    plan = plan_of(m, n, chunks, _processors(device), _arch(device))
    return None if plan is None else _product_by(plan, *signature)


def _product_by(plan: Plan, *signature: Any) -> Product:
    m, k, stride, (chunks, n, groups, of_group), scales, dtype, bits, device = signature
    tile, kind = plan.tile, kind_of(bits, chunk_of(bits) // groups, of_group == 2, scales, dtype)
    kernel = load(product(kind, plan), _arch(device), device, tile.shared(bits, groups * of_group))
    if isinstance(plan, Multistage):
        blocks = plan.blocks(m, n, chunks, _processors(device))
        launch = Launch(kernel, (blocks,), (tile.threads,), 11, overlap=_overlaps(device))
        return Product(launch, (m, n, chunks, k, stride), n, (blocks, tile.rows, tile.outputs))
    maps = {0: TensorMap(dtype, (m, k), (2 * stride,), (tile.rows, 64), swizzle=128)}
    high, wide = -(-m // tile.rows), -(-n // tile.outputs)
    if isinstance(plan, Stream):
        blocks, shared = plan.blocks(m, n, chunks, _processors(device)), plan.shared(m, n, _processors(device))
        maps[3] = TensorMap(dtype, (m, n), (2 * n,), (tile.rows, 64), swizzle=128)
        launch = Launch(kernel, (blocks,), (tile.threads,), 10, overlap=True, maps=maps)
        if not shared:  # nobody leaves anything to others
            return Product(launch, (0, 0, m, n, chunks, 0), n, None)
        return Product(launch, (m, n, chunks, shared), n, (blocks, tile.rows, tile.outputs))
    launch = Launch(kernel, (high, wide, plan.parts), (tile.threads,), 7, cluster=(1, 1, plan.parts), overlap=True, maps=maps)
    return Product(launch, (m, n, chunks), n, None)


@lru_cache
def _arch(device: int) -> str:
    return arch_of(torch.device("cuda", device))


@lru_cache
def _overlaps(device: int) -> bool:
    """Whether a kernel can start before the one before it has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


@lru_cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


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
