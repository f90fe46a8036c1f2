"""The door to the matmuls with quantized weights."""

from gptq_fn_kernels import BACKENDS, Backend, Packed, Problem, choose, explain, matmul

__all__ = ["BACKENDS", "Backend", "Packed", "Problem", "choose", "explain", "matmul"]
