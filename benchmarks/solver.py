"""The solver alone on this machine. On CPUs against the column loop of the authors' code written in torch, in turns.

Claim: one compiled program beats a Python loop over columns at every size. Prints medians of whole solutions (factor and
columns) and the median of the ratios of neighbouring runs, which noise from other processes hurts least.

On GPUs, claims: a 4096 x 4096 weight takes 2 to 4 ms and a 4096 x 14336 one 7 to 15, behind a factor of 5 and 60; the kernel
loses at most 0.1 % more than the plain loops. Prints medians in milliseconds with the seconds of the first call, which
compiles, and the kernel alone on one block of 128 columns for several numbers of rows a program.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
from gptq_fn_kernels.jax import columns

from gptq_fn import Factor, Hessian, QuantConfig, add_rows, empty, factor, solve
from gptq_fn._linears import solve_together
from gptq_fn._solve import RoundBlock, round_in_loops
from gptq_fn.kernels import round_block


def reference(w: torch.Tensor, h: torch.Tensor, *, bits: int = 4, group: int = 128, damp: float = 0.01, panel: int = 128) -> torch.Tensor:
    """Algorithm 1 of the GPTQ paper as its authors wrote it: three factorizations, lazy updates in blocks of `panel`."""
    w, h, out = w.clone(), h.clone(), torch.zeros_like(w)
    n, top, scale = w.shape[1], 2**bits - 1, w[:, 0]
    h.diagonal().add_(damp * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, n, panel):
        end = min(start + panel, n)
        block, errors = w[:, start:end].clone(), torch.zeros(len(w), end - start)
        square = upper[start:end, start:end]
        for j in range(end - start):
            if (start + j) % group == 0:
                scale = 2 * w[:, start + j : start + j + group].abs().amax(1) / top
            x = block[:, j]
            q = scale * (torch.clamp(torch.round(x / scale) + 2 ** (bits - 1), 0, top) - 2 ** (bits - 1))
            error = (x - q) / square[j, j]
            block[:, j:] -= error[:, None] * square[j, j:][None]
            out[:, start + j], errors[:, j] = q, error
        w[:, end:] -= errors @ upper[start:end, end:]
    return out


def run_ours(w: jax.Array, h: Hessian, config: QuantConfig) -> object:
    return jax.block_until_ready(solve(w, factor(h, config), config))


def timed(f: Callable[[], object]) -> float:
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def line(name: str, runs: int, f: Callable[[], object]) -> None:
    """Print the median of `f`'s time, or why there is none: what fails in one line leaves the others alone."""
    try:
        first = timed(lambda: jax.block_until_ready(f()))
        median = statistics.median(timed(lambda: jax.block_until_ready(f())) for _ in range(runs))
        print(f"{name:50} {1e3 * median:9.2f} ms   first {first:5.1f} s", flush=True)
    except Exception as error:
        print(f"{name:50} failed: {type(error).__name__}: {str(error)[:200]!r}", flush=True)


def gpu(shapes: list[str], runs: int) -> None:
    """The parts of the solver on this GPU, the column loop plain and with its kernel."""
    print(f"{jax.devices()[0]}, jax {jax.__version__}; 4 bits, group 128, symmetric", flush=True)
    rounds, configs = round_block(), (QuantConfig(grid="minmax"), QuantConfig(grid="mse"))
    usual = columns.FEW_ROWS, columns.ROWS
    for rows in (2, 8, 16, 32):
        for out in (4096, 28672):
            columns.FEW_ROWS = columns.ROWS = rows
            line(f"100 blocks, 128 x {out}, {rows} rows a program", 5 * runs, partial(_many_blocks(out), jnp.zeros(100)))
    columns.FEW_ROWS, columns.ROWS = usual
    for shape in shapes:
        out, n = map(int, shape.split("x"))
        try:
            x = jax.random.normal(jax.random.key(0), (2 * n, n)) @ (jnp.eye(n) + jax.random.normal(jax.random.key(1), (n, n)) / n**0.5)
            h = jax.jit(add_rows)(empty(n), x)
            del x
            w = jax.random.normal(jax.random.key(2), (out, n))
            f, static = factor(h, configs[0]), replace(configs[0], static_groups=True, order="act")
            line(f"{shape} factor", runs, partial(factor, h, configs[0]))
            for config in configs:
                for name, way in (("kernel", rounds), ("plain loops", round_in_loops)):
                    line(f"{shape} columns, {config.grid}, {name}", runs, partial(solve, w, f, config, way))
                losses = [float(solve(w, f, config, way)[1].sum()) for way in (rounds, round_in_loops)]
                print(f"{shape} {config.grid}: the kernel loses {losses[0] / losses[1]:.6f} times what the plain loops lose", flush=True)
            line(f"{shape} columns, with what is reported", runs, partial(_solved, w, f, h, configs[0], rounds))
            line(f"{shape} columns, static groups, kernel", runs, partial(solve, w, factor(h, static), static, rounds))
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
            print(f"{shape}: peak of memory so far {peak / 2**30:.2f} GiB", flush=True)
        except Exception as error:
            print(f"{shape} failed: {type(error).__name__}: {str(error)[:200]!r}", flush=True)


_REPORTED = jax.jit(solve_together, static_argnames=("config", "round_block"))


def _solved(w: jax.Array, f: Factor, h: Hessian, config: QuantConfig, rounds: RoundBlock) -> object:
    """What `quantize_linears` computes behind the factor."""
    return _REPORTED([w], f, h, config, rounds)


def _many_blocks(out: int) -> Callable[[jax.Array], jax.Array]:
    """One block rounded as often as there are numbers, zeros, so that launches do not wait for Python."""
    w, upper = jax.random.normal(jax.random.key(0), (128, out)), jnp.eye(128) + jnp.triu(jnp.full((128, 128), 0.01), 1)
    scale, zero = jnp.full((1, out), 0.5), jnp.full((1, out), 8.0)

    @jax.jit
    def many(numbers: jax.Array) -> jax.Array:
        def again(w: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            return w + number * columns.round_columns(w, upper, scale, zero, 4)[1], None

        return jax.lax.scan(again, w, numbers)[0]

    return many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", help="out x in")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--torch", action="store_true", help="compare with torch on a GPU machine, too, on its CPU")
    args = parser.parse_args()
    if jax.default_backend() == "gpu":
        gpu(args.shapes or ["4096x4096", "28672x4096", "6144x4096", "4096x14336"], args.runs)
        if not args.torch:
            return
    args.shapes = args.shapes or ["576x1536", "1536x576", "4096x4096"]
    config = QuantConfig(order="natural", grid="minmax")
    print(f"{torch.get_num_threads()} torch threads, {jax.devices()[0]}; 4 bits, group 128, symmetric")
    for shape in args.shapes:
        out, n = map(int, shape.split("x"))
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2 * n, n), np.float32) @ (np.eye(n, dtype=np.float32) + rng.standard_normal((n, n), np.float32) / n**0.5)
        w, xx = rng.standard_normal((out, n), np.float32), x.T @ x
        ours = partial(run_ours, jnp.asarray(w), Hessian(jnp.asarray(xx), jnp.asarray(2 * n)), config)
        theirs = partial(reference, torch.from_numpy(w), torch.from_numpy(xx))
        first = timed(ours)
        pairs = [(timed(theirs), timed(ours)) for _ in range(args.runs)]
        torch_s, ours_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{shape:>10}  torch {torch_s:7.3f} s   gptq_fn {ours_s:7.3f} s (first {first:.1f} s)   {ratio:5.1f} times", flush=True)


if __name__ == "__main__":
    main()
