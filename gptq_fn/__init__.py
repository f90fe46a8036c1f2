"""GPTQ quantization of large language models as mathematics: arrays and frozen descriptions in, arrays out."""

from gptq_fn._allocate import allocate
from gptq_fn._batches import Batch, Samples, embed_batches
from gptq_fn._config import PRESETS, FindGrid, Preset, QuantConfig, Refinement, Rule, Search, preset
from gptq_fn._factor import Factor, factor
from gptq_fn._grid import Grid, decode, encode, find_grid
from gptq_fn._hessian import Hessian, add_rows, empty, merge
from gptq_fn._linears import quantize_linears
from gptq_fn._mesh import data_mesh
from gptq_fn._quantize import Quantized, head_plan, quantize, quantize_block, quantize_blocks, quantize_head, run_block
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._refine import descend, refit
from gptq_fn._report import LinearReport, Report, stored_bits
from gptq_fn._runtime import ON_DEVICE, ON_HOST, Runtime, Store
from gptq_fn._solve import round_to_nearest, solve
from gptq_fn.check import check
from gptq_fn.families import FAMILIES, spec_from_config
from gptq_fn.model.block import block
from gptq_fn.model.decoder import forward
from gptq_fn.model.generate import generate
from gptq_fn.spec import (
    AlibiSpec,
    AttentionSpec,
    BlockSpec,
    DynamicScaling,
    FusedSpec,
    LatentAttentionSpec,
    LinearScaling,
    LinearSpec,
    Llama3Scaling,
    LongScaling,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    ProportionalScaling,
    QkNormSpec,
    RopeScaling,
    RopeSpec,
    YarnScaling,
)

__version__ = "0.1.0"
"""The one place of the version: the package, its checkpoints and its documents take it from here."""

__all__ = [
    "FAMILIES",
    "ON_DEVICE",
    "ON_HOST",
    "PRESETS",
    "AlibiSpec",
    "AttentionSpec",
    "Batch",
    "BlockSpec",
    "DynamicScaling",
    "Factor",
    "FindGrid",
    "FusedSpec",
    "Grid",
    "Hessian",
    "LatentAttentionSpec",
    "LinearReport",
    "LinearScaling",
    "LinearSpec",
    "Llama3Scaling",
    "LongScaling",
    "MlpSpec",
    "ModelSpec",
    "MoeSpec",
    "NormSpec",
    "Preset",
    "ProportionalScaling",
    "QkNormSpec",
    "QuantConfig",
    "Quantized",
    "QuantizedLinear",
    "Refinement",
    "Report",
    "RopeScaling",
    "RopeSpec",
    "Rule",
    "Runtime",
    "Samples",
    "Search",
    "Store",
    "YarnScaling",
    "add_rows",
    "allocate",
    "block",
    "check",
    "data_mesh",
    "decode",
    "dequantize",
    "descend",
    "embed_batches",
    "empty",
    "encode",
    "factor",
    "find_grid",
    "forward",
    "generate",
    "head_plan",
    "merge",
    "preset",
    "quantize",
    "quantize_block",
    "quantize_blocks",
    "quantize_head",
    "quantize_linears",
    "refit",
    "round_to_nearest",
    "run_block",
    "solve",
    "spec_from_config",
    "stored_bits",
]
