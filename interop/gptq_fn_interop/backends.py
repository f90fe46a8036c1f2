"""Which backend multiplies with a weight on this machine, why others do not, and how long each takes."""

import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence

import torch
from gptq_fn_kernels import Packed, Problem, dequantize, multiply, prepare
from gptq_fn_kernels.words import pack, words_of

from gptq_fn_interop.inspection import Inspection
from gptq_fn_interop.timing import copies_of, stopwatch

DENSE = "dense"
"""What a linear layer with a float weight is called among backends."""


def problems_of(found: Inspection, dtype: torch.dtype, device: str) -> Counter[Problem]:
    """How many linears of a checkpoint pose each problem to activations of `dtype` on `device`."""
    sizes = {x.name: None if x.groups == 1 else x.group_size for x in found.linears}
    return Counter(problem(x.bits, sizes[x.name], x.sym, x.desc_act, x.inputs, x.out, dtype, device) for x in found.linears)


def problem(bits: int, group_size: int | None, sym: bool, act_order: bool, k: int, n: int, dtype: torch.dtype, device: str) -> Problem:
    """The problem that a weight of [n, k] poses. Raises ValueError for sizes that are not positive."""
    if min(k, n, k if group_size is None else group_size) < 1:
        raise ValueError(f"Inputs, outputs and the group size are positive numbers, not {k}, {n} and {group_size}.")
    size = k if group_size is None else min(group_size, k)
    return Problem(bits, k, n, None if act_order and size < k else size, sym, dtype, torch.device(device).type)


def told(problem: Problem) -> str:
    """The weight of a problem in words."""
    size = problem.group_size
    groups = "act-order" if size is None else "one group a row" if size == problem.k else f"groups of {size}"
    return f"{problem.bits} bits, {groups}, {'symmetric' if problem.symmetric else 'asymmetric'}, {problem.k} x {problem.n}"


def random_weight(problem: Problem, device: str, group_size: int = 128) -> Packed:
    """A random weight that poses this problem; `group_size` is that of groups which are not consecutive inputs."""
    bits, k, n, size = problem.bits, problem.k, problem.n, problem.group_size or group_size
    groups, middle = -(-k // size), 2 ** (bits - 1)
    shape = (n, groups)
    zeros = torch.full(shape, middle) if problem.symmetric else torch.randint(0, 2**bits, shape)
    if not problem.symmetric:
        zeros[0] = 0
    g_idx = (torch.arange(k) if problem.group_size else torch.randperm(k)) // size
    return Packed(
        qweight=torch.randint(-(2**31), 2**31, (words_of(k, bits), n), dtype=torch.int32, device=device),
        qzeros=pack(zeros.int(), bits, torch).T.contiguous().to(device),
        scales=(2 * (0.5 + torch.rand(groups, n)) / (2**bits * math.sqrt(k))).to(device, torch.float16),
        g_idx=g_idx.int().to(device),
        bits=bits,
        zero_offset=0,
    )


@torch.inference_mode()
def times(problem: Problem, rows: int, names: Sequence[str], device: str) -> dict[str, tuple[float, float]]:
    """For each of these backends, and a dense layer, microseconds of multiplying `rows` activations and the ratio to the dense layer.

    Medians of measurements in turns, 3 to 15 of them; ratios are of neighbours, which whatever else the machine does hurts least.
    """
    x = torch.randn(rows, problem.k, device=device, dtype=problem.dtype)
    weight = random_weight(problem, device)
    read = 4 * weight.qweight.numel()
    measures = {}
    for name in names:
        forms = [prepare(random_weight(problem, device), problem.dtype, name) for _ in range(copies_of(read, device))]
        measures[name] = stopwatch([lambda form=form: multiply(x, form) for form in forms], device)
    dense = [dequantize(weight, problem.dtype).contiguous() for _ in range(copies_of(problem.n * problem.k * x.itemsize, device))]
    measures[DENSE] = stopwatch([lambda w=w: torch.nn.functional.linear(x, w) for w in dense], device)
    began, found = time.perf_counter(), []
    while len(found) < 3 or (len(found) < 15 and time.perf_counter() - began < 2):
        found.append({name: measure() for name, measure in measures.items()})
    return {
        name: (statistics.median(each[name] for each in found), statistics.median(each[name] / each[DENSE] for each in found))
        for name in measures
    }
