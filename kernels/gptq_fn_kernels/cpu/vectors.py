"""Matmuls on CPUs with vector code that numba compiles: any bits, group size, g_idx and shape.

Few rows are multiplied with the words as they lie: each is unpacked in registers, for up to eight rows at once. For more rows,
panels of outputs that fit a cache are dequantized one after the other, and torch multiplies each. Few rows are computed in
float32 and rounded once; panels in bfloat16 where the activations are, since machines have matrix units for it.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from gptq_fn_kernels.problem import Packed, Problem
from gptq_fn_kernels.words import pack

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_BLOCK = 64
"""Outputs whose words lie together: `loops.BLOCK`, which can be imported only where numba is installed."""

_FEW = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 16}
"""The most rows for which panels are slower. Measured with 1,536 x 576 and 4,096 x 4,096; around the bound both take the same time."""

_PANEL = 2**21
"""Bytes of a panel: what a core's second cache holds. Larger ones are written to memory, smaller ones starve the matmul."""

_RUN = 32
"""Rows of words that are summed before their sum is added to the total: so rounding errors hardly grow with the inputs."""

_THREAD = 1000
"""Rows of a block's words that are worth another thread: they take about 0.1 ms, and waking a thread a third of that."""


@dataclass(frozen=True, eq=False)
class Vectors:
    """A weight's codes in words that belong to 64 neighbouring outputs, with the inputs sorted by group."""

    words: torch.Tensor
    """int32 [blocks, rows, 64]: code i of a word at its bit i * bits. No word has codes of two groups."""
    scales: torch.Tensor
    """float32 [blocks, groups, 64]."""
    zeros: torch.Tensor
    """uint8 [blocks, groups, 64]."""
    runs: torch.Tensor
    """int32 [runs, 3]: first and last + 1 of at most 32 rows of words, and their group."""
    inputs: torch.Tensor
    """int32 [rows, codes in a word]: the input of each code, or k where the group has no more."""
    n: int
    k: int
    bits: int
    arrays: tuple[np.ndarray, ...]
    """The same memory as the loops take it: inputs, words as uint32, scales, zeros, runs."""


def unsupported(problem: Problem) -> str | None:
    """None, or why these loops cannot multiply this."""
    if problem.device != "cpu":
        return f"runs on a CPU, not on {problem.device}"
    if problem.dtype not in _DTYPES:
        return f"multiplies torch.float32, torch.bfloat16 and torch.float16, not {problem.dtype}"
    if importlib.util.find_spec("numba") is None:
        return "is compiled by numba, which is not installed: pip install numba"
    return None


def prepare(packed: Packed) -> Vectors:
    """The weight in words along its outputs."""
    from gptq_fn_kernels.cpu import loops

    per, blocks = 32 // packed.bits, -(-packed.n // _BLOCK)
    order = torch.argsort(packed.g_idx, stable=True)
    sizes = torch.bincount(packed.g_idx, minlength=len(packed.scales))
    ends = (-(-sizes // per)).cumsum(0)  # a group starts in a new row of words; what is left of its last belongs to input k, which is none
    starts = ends - -(-sizes // per)
    group = packed.g_idx[order].long()
    place = per * starts[group] + torch.arange(packed.k) - (sizes.cumsum(0) - sizes)[group]
    inputs = torch.full((int(ends[-1]), per), packed.k, dtype=torch.int32)
    inputs.view(-1)[place] = order.int()
    words = torch.zeros(blocks, len(inputs), _BLOCK, dtype=torch.int32)
    loops.repack(
        packed.qweight.contiguous().view(torch.uint32).numpy(), inputs.numpy(), packed.k, packed.bits, words.view(torch.uint32).numpy()
    )
    spans = enumerate(zip(starts.tolist(), ends.tolist(), strict=True))
    runs = [(r, min(r + _RUN, end), g) for g, (start, end) in spans for r in range(start, end, _RUN)]
    scales, zeros = _blocks(packed.scales.float(), blocks), _blocks(packed.zeros.to(torch.uint8), blocks)
    table = torch.tensor(runs, dtype=torch.int32).reshape(-1, 3)
    return Vectors(words, scales, zeros, table, inputs, packed.n, packed.k, packed.bits, _arrays(inputs, words, scales, zeros, table))


def restored(form: Vectors) -> torch.Tensor:
    """The qweight that it was prepared from."""
    per = 32 // form.bits
    places = form.inputs.view(-1).argsort()[: form.k]  # those without an input come last

    def block(words: torch.Tensor) -> torch.Tensor:
        codes = torch.stack([words >> i * form.bits & 2**form.bits - 1 for i in range(per)], 1)
        return pack(codes.view(-1, _BLOCK)[places], form.bits, torch)

    return torch.cat([block(words) for words in form.words], 1)[:, : form.n].contiguous()


def matmul(x: torch.Tensor, form: Vectors) -> torch.Tensor:
    """x [..., k] -> [..., n]."""
    if torch.compiler.is_compiling():
        return torch.ops.gptq_fn.cpu_vectors(x, form.words, form.scales, form.zeros, form.runs, form.inputs, form.n, form.bits)
    return _multiply(x, form.arrays, form.n, form.bits)  # spares the operator and its tensors' conversions, 50 us


def gradient(grad: torch.Tensor, form: Vectors) -> torch.Tensor:
    """grad [m, n] of a product -> grad @ weight [m, k], with the weight dequantized panel by panel."""
    if torch.compiler.is_compiling():
        return torch.ops.gptq_fn.cpu_vectors_gradient(grad, form.words, form.scales, form.zeros, form.runs, form.inputs, form.k, form.bits)
    return _gradient(grad, form.arrays, form.k, form.bits)


def _arrays(*tensors: torch.Tensor) -> tuple[np.ndarray, ...]:
    return tuple((tensor.view(torch.uint32) if tensor.dim() == 3 and tensor.dtype == torch.int32 else tensor).numpy() for tensor in tensors)


def _multiply(x: torch.Tensor, form: tuple[np.ndarray, ...], n: int, bits: int) -> torch.Tensor:
    """`form` is (inputs, words, scales, zeros, runs)."""
    from gptq_fn_kernels.cpu import loops

    x, k, blocks, words = x.detach(), x.shape[-1], len(form[1]), len(form[0])
    rows = x.numel() // k
    if rows <= _FEW[x.dtype]:
        tile = 1 if rows == 1 else 4 if rows <= 4 else 8
        given = np.ascontiguousarray(x.to(torch.float32).numpy().reshape(rows, k))
        sums = np.empty((rows, n), np.float32)
        in_threads(partial(loops.multiply, given, *form, (0,) * bits, (0,) * tile, sums), 0, blocks, words * -(-rows // tile))
        y = torch.from_numpy(sums).to(x.dtype)
    else:
        dtype = _type_of_panels(x.dtype)
        given, sums = x.reshape(rows, k).to(dtype), torch.empty(rows, n, dtype=dtype)
        for outputs, panel in _panels(form, k, bits, dtype):
            columns = sums[:, outputs]
            torch.mm(given, panel[:, : columns.shape[1]], out=columns)
        y = sums.to(x.dtype)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], n)


def _gradient(grad: torch.Tensor, form: tuple[np.ndarray, ...], k: int, bits: int) -> torch.Tensor:
    """As `_multiply`; what panels give is added up in float32."""
    dtype = _type_of_panels(grad.dtype)
    given, sums = grad.to(dtype), torch.zeros(len(grad), k)
    for outputs, panel in _panels(form, k, bits, dtype):
        columns = given[:, outputs]
        sums += columns @ panel[:, : columns.shape[1]].T
    return sums.to(grad.dtype)


def _type_of_panels(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _panels(form: tuple[np.ndarray, ...], k: int, bits: int, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight by panels [k, outputs], each in the place of the one before, and which outputs; the last may have more than there are."""
    from gptq_fn_kernels.cpu import loops

    blocks, words = len(form[1]), len(form[0])
    step = -(-blocks // -(-blocks * _BLOCK * k * dtype.itemsize // _PANEL))
    panel = torch.empty(k + 1, step * _BLOCK, dtype=dtype)
    written = (panel if dtype == torch.float32 else panel.view(torch.uint16)).numpy()
    for first in range(0, blocks, step):
        in_threads(partial(loops.dequantize, *form, (0,) * bits, written, first), first, min(first + step, blocks), words)
        yield slice(first * _BLOCK, (first + step) * _BLOCK), panel[:-1]


def _operator(name: str, of: Callable[[torch.Tensor, tuple[np.ndarray, ...], int, int], torch.Tensor]) -> None:
    """The operator that compilers see in place of `of`. Not `torch.library.custom_op`, whose wrappers take three times as long."""

    def call(x: torch.Tensor, words: Any, scales: Any, zeros: Any, runs: Any, inputs: Any, width: int, bits: int) -> torch.Tensor:
        return of(x, _arrays(inputs, words, scales, zeros, runs), width, bits)

    def fake(x: torch.Tensor, *form: Any) -> torch.Tensor:
        *_, width, _bits = form
        return x.new_empty(*x.shape[:-1], width)

    form = "Tensor words, Tensor scales, Tensor zeros, Tensor runs, Tensor inputs"
    torch.library.define(f"gptq_fn::{name}", f"(Tensor x, {form}, int width, int bits) -> Tensor")
    torch.library.impl(f"gptq_fn::{name}", "cpu", call)
    torch.library.register_fake(f"gptq_fn::{name}", fake)


_operator("cpu_vectors", _multiply)
_operator("cpu_vectors_gradient", _gradient)


def in_threads(work: Callable[[int, int], None], first: int, last: int, cost: int) -> None:
    """work(first, last), in pieces on as many threads as torch may use, where a piece is worth a thread at this cost of a block.

    Threads of our own: torch's cannot be had from Python, and numba's would spin beside torch's on the same cores. The
    caller's thread takes the first piece and then whatever no other thread has begun.
    """
    pieces = max(min(torch.get_num_threads(), last - first, (last - first) * cost // _THREAD), 1)
    if pieces == 1:
        return work(first, last)
    cuts = [first + (last - first) * i // pieces for i in range(pieces + 1)]
    (_, mine), *rest = pairwise(cuts)
    others = [(_pool().submit(work, *piece), piece) for piece in rest]
    work(first, mine)
    for other, piece in others:
        if other.cancel():
            work(*piece)
        else:
            other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), "gptq_fn")


def _blocks(table: torch.Tensor, blocks: int) -> torch.Tensor:
    """[groups, n] -> [blocks, groups, 64], with zeros appended."""
    padded = F.pad(table, (0, blocks * _BLOCK - table.shape[1]))
    return padded.reshape(len(table), blocks, _BLOCK).transpose(0, 1).contiguous()
