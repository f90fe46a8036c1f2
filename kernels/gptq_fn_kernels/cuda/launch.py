"""Launches of compiled kernels through CUDA's driver, on any stream, from a few microseconds of Python.

What does not change from one launch to the next is laid out in the driver's own structures once; a launch writes its arguments
into them and makes one foreign call. It may be captured in a CUDA graph.
"""

import ctypes
import struct
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_uint, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from gptq_fn_kernels.cuda.compile import Variant, cubin_of

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_CLUSTER, _OVERLAP = 4, 6  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED
_NOT_CURRENT = (201, 400)  # CUDA_ERROR_INVALID_CONTEXT, CUDA_ERROR_INVALID_HANDLE


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: 64 bytes of value behind its kind, aligned to 8."""

    _fields_ = (("kind", c_uint32), ("pad", c_uint32), ("value", c_uint32 * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", c_uint * 3),
        ("block", c_uint * 3),
        ("shared", c_uint),
        ("stream", c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", c_uint),
    )


@dataclass(frozen=True, eq=False)
class Kernel:
    """A kernel that is loaded on one device."""

    name: str
    function: c_void_p
    """Its CUfunction."""
    shared: int
    """Bytes of dynamic shared memory that it may use."""
    context: c_void_p
    """The device's primary context, which is torch's."""


@cache
def load(variant: Variant, arch: str, device: int, shared: int) -> Kernel:
    """The variant's kernel on the device of this index, allowed `shared` bytes of dynamic shared memory; compiled first if need be.

    Allowed while a CUDA graph is captured. Raises as `cubin_of` does, and RuntimeError with CUDA's reason.
    """
    return load_cubin(cubin_of(variant, arch), variant.entry, device, shared)


def load_cubin(cubin: bytes, entry: str, device: int, shared: int) -> Kernel:
    """The kernel of this name in the cubin, on the device of this index. Raises RuntimeError with CUDA's reason."""
    cuda, handle, context, module, function = driver(), c_int(), c_void_p(), c_void_p(), c_void_p()
    _check(cuda.cuDeviceGet(byref(handle), device), f"there is no device {device}")
    _check(cuda.cuDevicePrimaryCtxRetain(byref(context), handle), f"device {device} cannot be used")
    with _current(context), _uncaptured():
        _check(cuda.cuModuleLoadData(byref(module), cubin), f"{entry} cannot be loaded on device {device}")
        _check(cuda.cuModuleGetFunction(byref(function), module, entry.encode()), f"there is no kernel {entry}")
        _check(cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared), f"{entry} cannot have {shared} bytes of shared memory")
    return Kernel(entry, function, shared, context)


class Launch:
    """A kernel with its grid, ready to be called with a stream and arguments.

    Arguments are whole numbers: pointers, or integers of at most 64 bits, of which a kernel's parameter takes the low bytes. Where
    `maps` has a tensor map, the argument is its tensor's address. One object may be called from several threads.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: int,
        *,
        cluster: Sequence[int] | None = None,
        overlap: bool = False,
        maps: "dict[int, TensorMap] | None" = None,
    ) -> None:
        """Of so many arguments. `overlap`: it may start before the kernel before it on the stream has ended (PDL)."""
        attributes = (_Attribute * 2)()
        count = 0
        if cluster is not None:
            attributes[count].kind = _CLUSTER
            attributes[count].value[:3] = _three(cluster)
            count += 1
        if overlap:
            attributes[count].kind = _OVERLAP
            attributes[count].value[0] = 1
            count += 1
        self.kernel = kernel
        self._config = _Config(_three(grid), _three(block), kernel.shared, None, attributes, count)
        self._values = (c_uint64 * max(arguments, 1))()
        self._maps = tuple(sorted((maps or {}).items()))
        places = [ctypes.addressof(self._values) + 8 * i for i in range(arguments)]
        self._parameters = (c_void_p * max(arguments, 1))(*places)
        self._pack = struct.Struct(f"{arguments}q").pack_into
        self._call = driver().cuLaunchKernelEx
        self._arguments = (byref(self._config), kernel.function, self._parameters, None)
        self._lock = threading.Lock()

    def __call__(self, stream: int, *arguments: int) -> None:
        """Launch on the stream with this handle. Raises RuntimeError with CUDA's reason."""
        with self._lock:
            for i, tensor_map in self._maps:
                self._parameters[i] = tensor_map.place_of(arguments[i])
            self._pack(self._values, 0, *arguments)
            self._config.stream = stream
            if status := self._call(*self._arguments):
                if status in _NOT_CURRENT:  # a thread that has not used this device yet
                    with _current(self.kernel.context):
                        status = self._call(*self._arguments)
                _check(status, f"{self.kernel.name} cannot be launched")


class TensorMap:
    """Where tensors of one shape lie, for the copies of Hopper's TMA: 128 bytes that a kernel takes by value.

    One belongs to one `Launch`. Those of the last addresses are kept: steps of a model find their tensors where the allocator put
    those of the steps before.
    """

    def __init__(self, dtype: torch.dtype, shape: Sequence[int], strides: Sequence[int], box: Sequence[int], swizzle: int = 0) -> None:
        """Of this shape, copied by boxes; `strides` are the bytes from one index to the next of all axes but the last (multiples of 16).

        What reaches over the edge is read as 0 and not written. `swizzle` is 0, 32, 64 or 128 bytes.
        """
        axes = len(shape)
        self._made: dict[int, tuple[int, object]] = {}
        self._sizes = (
            (c_uint64 * axes)(*reversed(shape)),
            (c_uint64 * (axes - 1))(*reversed(strides)),
            (c_uint32 * axes)(*reversed(box)),
            (c_uint32 * axes)(*[1] * axes),
        )
        self._kinds = (_KINDS[dtype], axes, _SWIZZLES[swizzle])

    def place_of(self, address: int) -> int:
        """Where the map of a tensor at this address (a multiple of 16) is, a multiple of 64. Raises RuntimeError where CUDA refuses."""
        return (self._made.get(address) or self._make(address))[0]

    def _make(self, address: int) -> tuple[int, object]:
        room = ctypes.create_string_buffer(128 + 64)
        place = -(-ctypes.addressof(room) // 64) * 64
        kind, axes, swizzle = self._kinds
        plain, promotion, zeros = 0, 2, 0  # CU_TENSOR_MAP_INTERLEAVE_NONE, ..._L2_PROMOTION_L2_128B, ..._FLOAT_OOB_FILL_NONE
        at = c_void_p(address)
        status = driver().cuTensorMapEncodeTiled(c_void_p(place), kind, axes, at, *self._sizes, plain, swizzle, promotion, zeros)
        _check(status, "a tensor map cannot be made")
        if len(self._made) == _MAPS:
            del self._made[next(iter(self._made))]
        self._made[address] = place, room
        return self._made[address]


_MAPS = 32
"""Maps that are kept, the oldest of which makes room for another."""

_KINDS = {torch.uint8: 0, torch.int32: 3, torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""CU_TENSOR_MAP_DATA_TYPE_..."""
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""CU_TENSOR_MAP_SWIZZLE_..."""


def capture_of(stream: int) -> int:
    """Which capture of a CUDA graph is under way on the stream with this handle: a number of its own, or 0."""
    status, number = c_int(), c_uint64()
    _check(
        driver().cuStreamGetCaptureInfo_v2(c_void_p(stream), byref(status), byref(number), None, None, None),
        "the stream does not tell whether it is captured",
    )
    return number.value if status.value else 0


@cache
def driver() -> Any:
    """CUDA's driver, through ctypes, ready for use. Raises RuntimeError where there is none."""
    failures = []
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            found = ctypes.CDLL(name)
        except OSError as error:
            failures.append(str(error))
        else:
            found.cuInit(0)  # once more where torch has; what it fails with, the next call tells
            return found
    raise RuntimeError(f"NVIDIA's driver is not installed: {'; '.join(failures)}.")


@contextmanager
def _current(context: c_void_p) -> Iterator[None]:
    """Makes the context the calling thread's for a while."""
    _check(driver().cuCtxPushCurrent_v2(context), "the device cannot be made the current one")
    try:
        yield
    finally:
        driver().cuCtxPopCurrent_v2(byref(c_void_p()))


@contextmanager
def _uncaptured() -> Iterator[None]:
    """Allows what a captured stream forbids other calls of its thread, such as loading."""
    mode = c_int(_RELAXED)
    _check(driver().cuThreadExchangeStreamCaptureMode(byref(mode)), "the capture of a graph cannot be left aside")
    try:
        yield
    finally:
        driver().cuThreadExchangeStreamCaptureMode(byref(mode))


def _check(status: int, failed: str) -> None:
    if status:
        name = c_char_p()
        driver().cuGetErrorName(status, byref(name))
        raise RuntimeError(f"CUDA: {failed}: {(name.value or b'unknown error').decode()} ({status}).")


def _three(sizes: Sequence[int]) -> Any:
    return (c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))
