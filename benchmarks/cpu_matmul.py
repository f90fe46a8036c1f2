"""A quantized matmul on a CPU beside dense layers and beside dequantizing the weight in each call, in turns.

    python benchmarks/cpu_matmul.py --shapes 576x1536 4096x4096 --bits 4 3 --rows 1 64 --dtypes float32 bfloat16

Claim: the backend that is chosen multiplies one row at least 2 times faster than a dense float32 layer, and many rows at least
as fast as dequantizing the whole weight by the same loops, then multiplying. Each line has the backend's time and how many
times longer the others took, both as medians over rounds: `nn.functional.linear` with a float32 weight and with one of
the activations' dtype, "whole" (the weight dequantized at once, then multiplied) and the reference backend.

Every call takes another copy of the weight, as in a model whose dense layers together exceed the caches (--mib of them).
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from gptq_fn_kernels import Packed, Problem, choose, dequantize, multiply, prepare
from gptq_fn_kernels.words import words_of

Call = Callable[[int], object]


def random_weight(k: int, n: int, bits: int, group: int) -> Packed:
    """Random codes and zero points."""
    groups = -(-k // group)
    qweight, qzeros = (
        torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
        for shape in ((words_of(k, bits), n), (groups, words_of(n, bits)))
    )
    scales = (torch.rand(groups, n) + 0.5).half() / (2**bits * k**0.5)
    return Packed(qweight, qzeros, scales, (torch.arange(k) // group).int(), bits, 0)


def contestants(weights: list[Packed], x: torch.Tensor, backend: str) -> dict[str, Call]:
    """By name: what multiplies x with the i-th weight."""
    k, n = weights[0].k, weights[0].n
    prepared = [prepare(weight, x.dtype, backend) for weight in weights]
    slow = prepare(weights[0], x.dtype, "reference")
    exact = [dequantize(weight).contiguous() for weight in weights]
    dense = exact if x.dtype == torch.float32 else [weight.to(x.dtype) for weight in exact]
    exact_x = x.float()
    made: dict[str, Call] = {
        backend: lambda i: multiply(x, prepared[i]),
        "float32": lambda i: F.linear(exact_x, exact[i]),
        str(x.dtype).removeprefix("torch."): lambda i: F.linear(x, dense[i]),
        "reference": lambda i: multiply(x, slow),
    }
    if backend == "cpu_vectors" and x.dtype != torch.float16:
        from gptq_fn_kernels.cpu import loops, vectors

        def whole(i: int) -> torch.Tensor:
            form = prepared[i].form
            panel = torch.empty(k + 1, len(form.words) * loops.BLOCK, dtype=x.dtype)
            to = (panel if x.dtype == torch.float32 else panel.view(torch.uint16)).numpy()
            write = partial(loops.dequantize, *form.arrays, (0,) * form.bits, to, 0)
            vectors.in_threads(write, 0, len(form.words), len(form.inputs))
            return torch.mm(x, panel[:-1, :n])

        made["whole"] = whole
    return made


def measured(calls: dict[str, Call], copies: int, rounds: int, span: float = 0.02) -> dict[str, list[float]]:
    """Seconds of each one's fastest call in each round. A round gives everyone a turn of about `span` seconds.

    The fastest, and the seconds of the processor where one thread does all: where other programs run, too, calls wait for a core.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    found = {name: [] for name in calls}
    for call in calls.values():
        call(0)
    for _ in range(rounds):
        for name, call in calls.items():
            turn = []
            while sum(turn) < span and len(turn) < copies:
                began = clock()
                call(len(turn))
                turn.append(clock() - began)
            found[name].append(min(turn))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["576x576", "576x1536", "4096x4096", "4096x14336"], help="inputs x outputs")
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--mib", type=int, default=256, help="of dense float32 weights to go through")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{torch.get_num_threads()} threads, load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, groups of {args.group}")
    for shape in args.shapes:
        k, n = map(int, shape.split("x"))
        for bits in args.bits:
            copies = 1 + args.mib * 2**20 // (4 * k * n)
            weights = [random_weight(k, n, bits, args.group) for _ in range(copies)]
            for dtype in (getattr(torch, name) for name in args.dtypes):
                backend = choose(Problem(bits, k, n, args.group, False, dtype, "cpu")).name
                for rows in args.rows:
                    torch.manual_seed(rows)
                    found = measured(contestants(weights, torch.randn(rows, k).to(dtype), backend), copies, args.rounds)
                    mine = found.pop(backend)
                    ratios = {name: statistics.median(a / b for a, b in zip(times, mine, strict=True)) for name, times in found.items()}
                    told = "   ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
                    what = f"{shape:>11} {bits} bits {str(dtype).removeprefix('torch.'):>8} M={rows:<5}"
                    print(f"{what} {backend} {1e6 * statistics.median(mine):8.0f} us   times: {told}", flush=True)
    print(f"load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
