"""Which kernel multiplies how many rows, and its block sizes: a table, measured on an H100 (kernels/NOTES.md).

Knows no framework: torch and JAX launch the same kernels by it.
"""

from dataclasses import dataclass, replace
from typing import Literal

from gptq_fn_kernels.triton.layout import chunk_of, fields_of


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on."""

    processors: int
    """Streaming multiprocessors, or compute units."""
    shared: int
    """Bytes of shared memory that a program can have."""
    tensor_float: bool
    """Whether its matrix units take float32 cut into three parts (NVIDIA from sm_80 on)."""
    overlap: bool
    """Whether a kernel can be launched while the one before still runs (NVIDIA from sm_90 on)."""


@dataclass(frozen=True)
class Plan:
    """One way to launch a product."""

    kernel: Literal["few_rows", "many_rows"]
    rows: int
    """Rows of activations in a block."""
    outputs: int
    """Outputs in a block."""
    split: int
    """Parts into which the inputs are split: over a program's warps (few_rows), or over programs (many_rows)."""
    warps: int
    stages: int
    """Chunks of inputs under way at a time."""
    overlap: bool = True
    """Whether to launch it before the kernel before it has ended, on GPUs that can: that spares a launch, but costs room while both run."""


_TABLE: tuple[tuple[int, int, Plan], ...] = (
    (1, 16384, Plan("few_rows", rows=8, outputs=32, split=2, warps=2, stages=3, overlap=False)),
    (1, 8192, Plan("few_rows", rows=8, outputs=16, split=2, warps=2, stages=4)),
    (1, 0, Plan("few_rows", rows=8, outputs=16, split=4, warps=4, stages=6)),
    (8, 16384, Plan("few_rows", rows=8, outputs=32, split=2, warps=2, stages=3, overlap=False)),
    (8, 8192, Plan("few_rows", rows=8, outputs=32, split=4, warps=4, stages=3)),
    (8, 0, Plan("few_rows", rows=8, outputs=16, split=4, warps=4, stages=3)),
    (16, 0, Plan("many_rows", rows=16, outputs=64, split=8, warps=4, stages=4)),
    (32, 0, Plan("many_rows", rows=32, outputs=64, split=8, warps=4, stages=4)),
    (64, 16384, Plan("many_rows", rows=64, outputs=128, split=8, warps=8, stages=3)),
    (64, 0, Plan("many_rows", rows=64, outputs=64, split=8, warps=4, stages=4)),
    (128, 12288, Plan("many_rows", rows=128, outputs=128, split=8, warps=8, stages=3)),
    (128, 2048, Plan("many_rows", rows=128, outputs=64, split=8, warps=4, stages=3)),
    (128, 0, Plan("many_rows", rows=32, outputs=64, split=8, warps=4, stages=4)),
    (192, 12288, Plan("many_rows", rows=64, outputs=128, split=8, warps=4, stages=3)),
    (192, 0, Plan("many_rows", rows=64, outputs=64, split=8, warps=4, stages=3)),
    (256, 12288, Plan("many_rows", rows=256, outputs=128, split=8, warps=8, stages=3)),
    (256, 2048, Plan("many_rows", rows=128, outputs=64, split=8, warps=4, stages=3)),
    (384, 6144, Plan("many_rows", rows=64, outputs=128, split=8, warps=4, stages=3)),
    (384, 0, Plan("many_rows", rows=64, outputs=64, split=8, warps=4, stages=3)),
)
"""(at most so many rows, at least so many outputs, plan); the first that fits. many_rows splits into at most so many parts."""

DENSE_OUTPUTS = 64
"""Outputs that a program of the dequantizing kernel writes."""

_WAVES = 1.25
"""Programs for each processor from which on splitting the inputs further gains nothing."""

_AHEAD, _AHEAD_OF_ONE = 512, 768
"""Inputs under way at a time that more stages are not worth, of several rows and of one: chunks of 2 and 3 bits are of 256."""

_TURNS = 3
"""Turns that a stage more than three is worth having for: filling the stages takes time, too."""


def plan_of(m: int, n: int, k: int, *, bits: int, itemsize: int, gpu: Gpu) -> Plan | None:
    """How to multiply m rows of k inputs of `itemsize` bytes with n outputs, or None: dequantize once and multiply densely."""
    if itemsize == 4 and m > 16:  # float32 takes three products of the matrix units
        return None
    fitting = [(plan, gpu.shared // _stage(plan, bits, itemsize)) for rows, outputs, plan in _TABLE if m <= rows and n >= outputs]
    # A single stage waits for each chunk: the last resort of GPUs with little shared memory.
    found = next(((plan, room) for least in (2, 1) for plan, room in fitting if room >= least), None)
    if found is None:
        return None
    plan, room = found
    split, chunk = plan.split if plan.kernel == "few_rows" else _split(plan, m, n, k, bits, gpu), chunk_of(bits)
    turns = -(-k // (chunk * split))
    ahead = min(_AHEAD_OF_ONE // chunk, max(turns // _TURNS, 3)) if m == 1 else _AHEAD // chunk
    return replace(plan, split=split, stages=min(plan.stages, ahead, room))


def _split(plan: Plan, m: int, n: int, k: int, bits: int, gpu: Gpu) -> int:
    """The smallest power of two that gives every processor work, within the plan's and the number of chunks."""
    blocks, split = -(-n // plan.outputs) * -(-m // plan.rows), 1
    while 2 * split <= min(plan.split, -(-k // chunk_of(bits))) and blocks * split < _WAVES * gpu.processors:
        split *= 2
    return split


def constants_of(bits: int, group: int, brain: bool) -> dict[str, int]:
    """Arguments that every kernel takes; `brain` for activations of bfloat16."""
    return {"magic": 0x43004300 if brain and bits < 8 else 0x64006400, "BITS": bits, "FIELDS": fields_of(bits), "GROUP": group}


def _stage(plan: Plan, bits: int, itemsize: int) -> int:
    """Bytes of a stage: activations, words, and highest bits of 3; scales and zero points are few."""
    parts = plan.split if plan.kernel == "few_rows" else 1
    words = plan.outputs * 16 * (6 if bits == 3 else 4)
    return parts * (words + plan.outputs * 16 + chunk_of(bits) * plan.rows * itemsize)
