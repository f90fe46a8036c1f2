"""The door to the matmuls with quantized weights."""

from gptq_fn_kernels import BACKENDS, Backend, Packed, Prepared, Problem, choose, dequantize, explain, matmul, multiply, prepare

__all__ = ["BACKENDS", "Backend", "Packed", "Prepared", "Problem", "choose", "dequantize", "explain", "matmul", "multiply", "prepare"]
