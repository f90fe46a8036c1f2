"""The door to torch, transformers and files. Importing it makes transformers load GPTQ checkpoints by itself."""

from importlib import import_module
from typing import TYPE_CHECKING

from gptq_fn_interop.activations import on_disk
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.engines import refusals
from gptq_fn_interop.evaluation import Evaluation, evaluate
from gptq_fn_interop.hf import from_hf, to_hf
from gptq_fn_interop.in_memory import quantize_model
from gptq_fn_interop.inspection import inspect
from gptq_fn_interop.kept import KeptHessians, keep_hessians
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_interop.quantizer import register
from gptq_fn_interop.stream import load_gptq, quantize_checkpoint, save_gptq
from gptq_fn_interop.sweep import sweep
from gptq_fn_interop.tensors import to_jax, to_torch
from gptq_fn_interop.trace import Trace, TracedBlock, trace
from gptq_fn_interop.traced import TracedReport, quantize_traced

if TYPE_CHECKING:
    from gptq_fn_interop.flax import from_flax, to_flax

__all__ = [
    "Evaluation",
    "KeptHessians",
    "QuantLinear",
    "Trace",
    "TracedBlock",
    "TracedReport",
    "evaluate",
    "from_flax",
    "from_hf",
    "inspect",
    "keep_hessians",
    "load_gptq",
    "on_disk",
    "quantize_checkpoint",
    "quantize_model",
    "quantize_traced",
    "refusals",
    "save_gptq",
    "sweep",
    "to_flax",
    "to_hf",
    "to_jax",
    "to_torch",
    "tokens",
    "trace",
]

register()


def __getattr__(name: str) -> object:
    """What needs Flax, which is optional, is imported when it is asked for. Raises ImportError in a sentence without it."""
    if name in ("from_flax", "to_flax"):
        return getattr(import_module("gptq_fn_interop.flax"), name)
    raise AttributeError(f"gptq_fn.interop has no {name}.")
