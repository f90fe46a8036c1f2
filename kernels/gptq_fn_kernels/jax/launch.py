"""Triton kernels inside JAX programs: compiled when a program is lowered for a GPU, and launched by jaxlib's own handler.

The handler is the one that JAX registers for its own Triton kernels, `triton_kernel_call_ffi`. XLA captures it in CUDA
graphs, which it does not do for the older target that jax-triton 0.3 calls.
"""

import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import jax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int32": "i32", "int16": "i16", "uint8": "u8"}

_TARGET = "triton_kernel_call_ffi"


def missing() -> str | None:
    """Why kernels cannot be launched on GPUs from here, or None."""
    if find_spec("triton") is None:
        return "triton is not installed"
    from jaxlib import gpu_triton

    return None if hasattr(gpu_triton, "TritonKernel") else "jaxlib has no CUDA plugin"


def launch(
    kernel: str,
    inputs: Mapping[str, jax.Array | None],
    outs: Sequence[jax.ShapeDtypeStruct],
    grid: Sequence[int],
    constants: Mapping[str, Any],
    *,
    warps: int = 4,
    inside: Mapping[str, int] = MappingProxyType({}),
) -> list[jax.Array]:
    """The outputs, on a GPU, of the kernel of this name, module and function, in `gptq_fn_kernels.triton`.

    `inputs` and `constants` are its arguments by name, the outputs aside; inputs that are None are constants. Inputs
    come in the order of its parameters, and the outputs after them. `inside`: inputs that the output of this number
    overwrites; XLA copies them before where they are still needed.
    """
    arrays = {name: a for name, a in inputs.items() if a is not None}
    absent = [(name, None) for name, a in inputs.items() if a is None]
    options = tuple(sorted([*constants.items(), *absent]))
    written = tuple((list(arrays).index(name), out) for name, out in inside.items())
    return _launch.bind(
        *arrays.values(),
        names=tuple(arrays),
        kernel=kernel,
        outs=tuple(outs),
        grid=tuple(grid),
        constants=options,
        warps=warps,
        inside=written,
    )


_launch = Primitive("gptq_fn_triton")
_launch.multiple_results = True


@_launch.def_abstract_eval
def _shapes(*_: Any, outs: Sequence[jax.ShapeDtypeStruct], **__: Any) -> Any:
    return [ShapedArray(out.shape, out.dtype) for out in outs]


def _lowered(
    ctx: Any, *arrays: Any, names: Sequence[str], kernel: str, outs: Any, grid: Sequence[int], constants: Any, warps: int, inside: Any
) -> Any:
    from jaxlib import gpu_triton

    types = tuple(_pointer(aval.dtype) for aval in ctx.avals_in)
    binary = _compiled(kernel, tuple(zip(names, types, strict=True)), tuple(_pointer(out.dtype) for out in outs), constants, warps)
    parameters = [gpu_triton.create_array_parameter(0, 16)] * (len(arrays) + len(outs))
    call = gpu_triton.TritonKernelCall(binary, *grid, *[1] * (3 - len(grid)), parameters)
    opaque = zlib.compress(call.to_proto(kernel, b""))
    return jax.ffi.ffi_lowering(_TARGET, api_version=4, operand_output_aliases=dict(inside))(ctx, *arrays, opaque=opaque)


def _pointer(dtype: Any) -> str:
    return f"*{_TYPES[str(dtype)]}"


mlir.register_lowering(_launch, _lowered, platform="cuda")


@cache
def _compiled(
    kernel: str, inputs: tuple[tuple[str, str], ...], outs: tuple[str, ...], constants: tuple[tuple[str, Any], ...], warps: int
) -> Any:
    """The kernel for these types and constants, as jaxlib launches it."""
    import triton
    from jaxlib import gpu_triton
    from triton.backends.compiler import GPUTarget

    capability = gpu_triton.get_compute_capability(0)
    source = source_of(kernel, inputs, outs, constants)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    text, shared = made.asm["ptx"], made.metadata.shared
    return gpu_triton.TritonKernel(made.metadata.name, warps, 1, shared, text, made.asm["ttir"], capability)


def source_of(kernel: str, inputs: Sequence[tuple[str, str]], outs: Sequence[str], constants: Sequence[tuple[str, Any]]) -> Any:
    """What Triton compiles: the kernel "module.function" for inputs and outputs of these types and for these constants."""
    from triton.compiler import ASTSource

    module, _, name = kernel.partition(".")
    fn, given = getattr(import_module(f"gptq_fn_kernels.triton.{module}"), name), dict(inputs)
    known = {*given, *(constant for constant, _ in constants)}
    given |= zip((argument for argument in fn.arg_names if argument not in known), outs, strict=True)
    signature = {argument: given.get(argument, "constexpr") for argument in fn.arg_names}
    # XLA aligns buffers to more than 16 bytes, which allows wide loads.
    aligned = {(i,): [["tt.divisibility", 16]] for i, argument in enumerate(fn.arg_names) if argument in given}
    return ASTSource(fn, signature, dict(constants), aligned)
