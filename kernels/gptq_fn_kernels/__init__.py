"""Matmuls with 2, 3, 4 and 8 bit weights, straight from GPTQ checkpoints' tensors.

Names are imported when they are first used, so that `gptq_fn_kernels.words`, which needs no torch, can be imported without it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptq_fn_kernels.problem import Packed, Problem, problem_of
    from gptq_fn_kernels.reference import dequantize
    from gptq_fn_kernels.registry import BACKENDS, Backend, Prepared, choose, explain, matmul, multiply, prepare

__all__ = [
    "BACKENDS",
    "Backend",
    "Packed",
    "Prepared",
    "Problem",
    "choose",
    "dequantize",
    "explain",
    "matmul",
    "multiply",
    "prepare",
    "problem_of",
]

_HOMES = {
    "problem": ("Packed", "Problem", "problem_of"),
    "reference": ("dequantize",),
    "registry": ("BACKENDS", "Backend", "Prepared", "choose", "explain", "matmul", "multiply", "prepare"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
