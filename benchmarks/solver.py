"""The solver alone on this machine, against the column loop of the authors' code written in torch, in turns.

Claim: one compiled program beats a Python loop over columns at every size. Prints medians of whole solutions (factor and
columns) and the median of the ratios of neighbouring runs, which noise from other processes hurts least.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch

from gptq_fn import Hessian, QuantConfig, factor, solve


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["576x1536", "1536x576", "4096x4096"], help="out x in")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
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
