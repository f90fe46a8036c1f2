"""GPTQ quantization of large language models as mathematics: arrays and frozen descriptions in, arrays out."""

from gptq_fn._config import QuantConfig, Rule
from gptq_fn._grid import Grid, decode, encode, find_grid
from gptq_fn._hessian import Hessian, add_rows, empty, merge
from gptq_fn._linears import quantize_linears
from gptq_fn._quantize import Quantized, embed_batches, quantize, quantize_block, quantize_blocks
from gptq_fn._quantized import QuantizedLinear, dequantize
from gptq_fn._report import LinearReport, Report
from gptq_fn._solve import Factor, factor, round_to_nearest, solve
from gptq_fn.check import check
from gptq_fn.families import FAMILIES, spec_from_config
from gptq_fn.model.block import block
from gptq_fn.model.decoder import forward, generate
from gptq_fn.spec import AttentionSpec, BlockSpec, LinearSpec, MlpSpec, ModelSpec, NormSpec, RopeScaling, RopeSpec

__all__ = [
    "FAMILIES",
    "AttentionSpec",
    "BlockSpec",
    "Factor",
    "Grid",
    "Hessian",
    "LinearReport",
    "LinearSpec",
    "MlpSpec",
    "ModelSpec",
    "NormSpec",
    "QuantConfig",
    "Quantized",
    "QuantizedLinear",
    "Report",
    "RopeScaling",
    "RopeSpec",
    "Rule",
    "add_rows",
    "block",
    "check",
    "decode",
    "dequantize",
    "embed_batches",
    "empty",
    "encode",
    "factor",
    "find_grid",
    "forward",
    "generate",
    "merge",
    "quantize",
    "quantize_block",
    "quantize_blocks",
    "quantize_linears",
    "round_to_nearest",
    "solve",
    "spec_from_config",
]
