"""What a quantized checkpoint holds, told from its headers, configs and zero points; or what one would hold."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptq_fn import ModelSpec, QuantConfig
from gptq_fn_interop.checkpoint import INDEX, SINGLE, Checkpoint
from gptq_fn_interop.gptq_format import (
    TENSORS,
    Zeros,
    described_by,
    regular_groups,
    require_groups,
    require_linear,
    scheme_of,
    zero_points,
    zeros_of,
    zeros_version,
)
from gptq_fn_interop.params import dense_shapes


@dataclass(frozen=True)
class LinearInfo:
    """One quantized linear as its tensors tell it, whatever the config says of it."""

    name: str
    bits: int
    inputs: int
    out: int
    groups: int
    group_size: int
    """Inputs of a whole group; -1 for one group a row."""
    sym: bool
    """All zero points are the middle code."""
    desc_act: bool
    """Its groups are not consecutive inputs."""
    has_g_idx: bool
    scale_dtype: str
    zeros: Zeros
    zero_at_0: bool = False
    """Some zero point is 0, which readers of files that store it less one get from a field that wrapped around."""
    negative: bool = False
    """Some scale is negative."""

    @property
    def bytes(self) -> int:
        """Bytes of the codes, zero points and 16-bit scales."""
        return (self.inputs * self.out + self.groups * self.out) * self.bits // 8 + 2 * self.groups * self.out


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: its quantization config, its config.json, its quantized linears, and what else matters to a reader."""

    described: dict[str, Any]
    model: dict[str, Any]
    linears: tuple[LinearInfo, ...]
    left: tuple[str, ...]
    """Linears of blocks that are not quantized."""
    other_bytes: int = 0
    file: str = SINGLE
    """The index, or the one file."""

    def schemes(self) -> Counter[str]:
        """How many linears share each scheme, in words."""
        return Counter(
            f"{x.bits} bits, {'one group a row' if x.groups == 1 else f'groups of {x.group_size}'}, "
            f"{'symmetric' if x.sym else 'asymmetric'}{', act-order' if x.desc_act else ''}, {x.scale_dtype} scales"
            for x in self.linears
        )


def inspect(directory: str | Path) -> Inspection:
    """The inspection of a quantized checkpoint. Raises ValueError for a float one, OSError where there is none."""
    checkpoint = Checkpoint(directory)
    described = checkpoint.quantization
    names = [name.removesuffix(".qweight") for name in checkpoint if name.endswith(".qweight")]
    if described is None or not names:
        raise ValueError(f"{directory} holds a float checkpoint; quantize it with: gptq-fn quantize {directory} DESTINATION")
    linears = tuple(_linear(checkpoint, name, described) for name in names)
    other_bytes = sum(path.stat().st_size for path in checkpoint.files) - sum(x.bytes for x in linears)
    file = INDEX if (checkpoint.directory / INDEX).exists() else checkpoint.files[0].name
    return Inspection(described, checkpoint.config, linears, tuple(_left(checkpoint)), other_bytes, file)


def foresee(checkpoint: Checkpoint, spec: ModelSpec, config: QuantConfig) -> Inspection:
    """What quantizing a float checkpoint of `spec` with `config` will write."""
    shapes = dense_shapes(checkpoint.shapes, spec)
    zeros, linears, left = zeros_version(config), [], []
    in_blocks = ((i, linear) for i, block in enumerate(spec.blocks) for linear in block.linears)
    usual = {name: linear for i, linear in in_blocks for name in spec.names_of(i, linear)}
    head = dict(spec.tensors).get("head")
    for name in (*usual, *([head] if head else ())):
        linear = usual.get(name)
        found = config.resolve(name, usual=linear is not None and linear.quantize)
        if found is not None:
            out, inputs = shapes.get(f"{name}.weight") or shapes[spec.embedding]
            if linear is not None and linear.stored == "in_out":
                out, inputs = inputs, out
            groups = -(-inputs // (found.group_size or inputs))
            irregular = found.order == "act" and not found.static_groups and groups > 1
            size = -1 if groups == 1 or found.group_size is None else found.group_size
            linears.append(LinearInfo(name, found.bits, inputs, out, groups, size, found.sym, irregular, True, "float16", zeros))
        elif linear is not None and linear.quantize:
            left.append(name)
    described = described_by(config, head=any(x.name == head for x in linears))
    return Inspection(described, {**checkpoint.config, "quantization_config": described}, tuple(linears), tuple(left))


def _linear(checkpoint: Checkpoint, name: str, described: dict[str, Any]) -> LinearInfo:
    scheme = scheme_of(name, described) or described
    mine = {leaf: f"{name}.{leaf}" for leaf in TENSORS if f"{name}.{leaf}" in checkpoint}
    shapes = {leaf: checkpoint.shapes[full] for leaf, full in mine.items()}
    dtypes = {leaf: checkpoint.dtypes[full] for leaf, full in mine.items()}
    bits, inputs = require_linear(name, shapes, scheme, dtypes)
    groups, out = shapes["scales"]
    g_idx = checkpoint[mine["g_idx"]] if "g_idx" in mine else regular_groups(name, inputs, groups, scheme)
    require_groups(name, g_idx, groups)
    size = int(np.bincount(g_idx).max())
    irregular = bool((g_idx != np.arange(inputs) // size).any())
    qzeros = checkpoint[mine["qzeros"]]
    zeros = zeros_of(qzeros, bits, out, scheme)
    points = zero_points(qzeros, bits, out, zeros)
    sym, at_0 = bool((points == 2 ** (bits - 1)).all()), bool((points == 0).any())
    size = -1 if groups == 1 else size
    negative = bool((checkpoint[mine["scales"]] < 0).any())
    return LinearInfo(name, bits, inputs, out, groups, size, sym, irregular, "g_idx" in mine, dtypes["scales"], zeros, at_0, negative)


ROUTERS = ("gate", "router", "shared_expert_gate", "wg")
"""What the linears that choose experts are called; no engine expects them to be quantized."""


def _left(checkpoint: Checkpoint) -> Iterator[str]:
    for name, shape in checkpoint.shapes.items():
        *path, leaf = name.removesuffix(".weight").split(".")
        if any(part.isdigit() for part in path) and leaf not in ROUTERS:
            if len(shape) == 2 and name.endswith(".weight"):
                yield name.removesuffix(".weight")
            elif len(shape) == 3 and "experts" in path:
                yield name
