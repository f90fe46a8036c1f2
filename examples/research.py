"""Research in plain JAX: calibrate once, then solve every linear at many bits, also with a grid and a rounding of your own.

    python examples/research.py --bits 2 3 4 --blocks 2

Everything is a function of arrays: one calibration gives weights and Hessians, and any function (weight, Hessian, config) ->
QuantizedLinear can be compared with GPTQ on them. Two things are written here. `normal_grid` is a search of yours: whatever maps a
group of weights to a `Grid` may be the `grid` of a configuration, and so take part wherever one is given. `sparing` is a rounding of
yours, which leaves GPTQ to make good what it does: weights within 0.8 of a step around 0 become 0, so that codes can be compressed
further. Both also quantize whole models: what is told last.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import gptq_fn_interop.stream as files
import jax
import jax.numpy as jnp
import tyro
from gptq_fn_interop.calib import tokens
from jaxtyping import Array, Float, UInt8
from models import float_model
from rich.console import Console
from rich.table import Table

import gptq_fn
from gptq_fn import Grid, Hessian, QuantConfig, QuantizedLinear, Runtime

CLIP = {2: 1.71, 3: 2.15, 4: 2.55, 8: 3.92}
"""So many standard deviations of normal weights are best covered by 2^bits levels (Banner et al. 2018, arXiv 1810.05723)."""


def normal_grid(w: Float[Array, "out group"], weight: Float[Array, " group"], config: QuantConfig) -> Grid:
    """The symmetric grid that suits normal weights of the rows' standard deviations."""
    deviation = jnp.sqrt((w**2).mean(1, where=(weight > 0)[None]))  # other columns fill up a narrower last group
    return Grid(2 * CLIP[config.bits] * deviation / config.max_code, jnp.full(len(w), 2.0 ** (config.bits - 1)))


def sparing(
    w: Float[Array, "columns out"], upper: Float[Array, "columns columns"], grid: Grid, bits: int
) -> tuple[UInt8[Array, "columns out"], Float[Array, "columns out"]]:
    """The loop of GPTQ with a rounding of your own: what a `Runtime` takes as its round_block."""

    def column(w: Array, p: Array) -> tuple[Array, tuple[Array, Array]]:
        scale, zero = (jnp.take(a, p % len(a), axis=0) for a in grid)  # one grid for all columns, or one for each
        steps = jnp.where(jnp.abs(w[p] / scale) < 0.8, 0.0, w[p] / scale)
        code = jnp.clip(jnp.round(steps) + zero, 0, 2**bits - 1)
        error = (w[p] - scale * (code - zero)) / upper[p, p]
        return w - upper[p][:, None] * error[None], (code.astype(jnp.uint8), error)

    return jax.lax.scan(column, w, jnp.arange(len(w)))[1]


def gptq(w: Float[Array, "out in"], h: Hessian, config: QuantConfig, **own: Any) -> QuantizedLinear:
    return gptq_fn.solve(w, gptq_fn.factor(h, config), config, **own)[0]


def on_normal_grid(w: Float[Array, "out in"], h: Hessian, config: QuantConfig) -> QuantizedLinear:
    return gptq(w, h, replace(config, grid=normal_grid))


WAYS: dict[str, Callable[..., QuantizedLinear]] = {
    "round to nearest": lambda w, h, config: gptq_fn.round_to_nearest(w, config),
    "GPTQ": gptq,
    "GPTQ on a normal grid": on_normal_grid,
    "GPTQ, sparing": partial(gptq, round_block=sparing),
}


def calibrated(params: Any, spec: gptq_fn.ModelSpec, calib: Any) -> Iterator[tuple[Float[Array, "out in"], Hessian]]:
    """The linears that read one input of the float model, as rows of one matrix, and the Hessian of that input; experts aside."""
    run = jax.jit(gptq_fn.block, static_argnames="spec")
    xs = [batch.x for batch in gptq_fn.embed_batches(spec, params["top"], calib)]
    for block, p in zip(spec.blocks, params["blocks"], strict=True):
        xs, taps, _ = zip(*(run(block, p, x) for x in xs), strict=True)
        for tap, roles in block.stages:
            w = jnp.concatenate([jnp.asarray(p[role]["weight"], jnp.float32) for role in roles])
            yield w, reduce(gptq_fn.add_rows, (found[tap] for found in taps), gptq_fn.empty(w.shape[1]))


@jax.jit
def measured(w: Float[Array, "out in"], h: Hessian, q: QuantizedLinear) -> Float[Array, "3"]:
    """||(W - Q) X||^2, ||W X||^2 over the calibration inputs X, and the entropy of all codes in bits."""
    lost = w - gptq_fn.dequantize(q)
    share = jnp.bincount(q.codes.reshape(-1), length=2**q.bits) / q.codes.size
    return jnp.stack([((a @ h.xx) * a).sum() for a in (lost, w)] + [-jax.scipy.special.xlogy(share, share).sum() / jnp.log(2.0)])


def main(model: str | None = None, bits: tuple[int, ...] = (3, 4), blocks: int = 1, samples: int = 8, length: int = 512) -> None:
    """Compare ways to quantize on the first blocks of a model.

    Args:
        model: A directory or a model on the hub; SmolLM2-135M-Instruct by default.
        bits: Bits of a code.
        blocks: How many blocks.
        samples: How many calibration samples.
        length: Tokens of a calibration sample.
    """
    source = float_model(model)
    params, spec = files.load_gptq(source)
    spec, params = replace(spec, blocks=spec.blocks[:blocks]), {**params, "blocks": params["blocks"][:blocks]}
    calib = tokens("pydoc", source, samples=samples, length=length)
    linears = [*calibrated(params, spec, calib)]

    table = Table("", *(f"{b} bits" for b in bits), title=f"{source.name}: ||(W - Q) X|| / ||W X||, and the entropy of a code in bits")
    for name, way in WAYS.items():
        cells = []
        for b in bits:
            config = QuantConfig(bits=b, group_size=64, grid="minmax")  # type: ignore[arg-type]
            lost, whole, entropy = jnp.stack([measured(w, h, way(w, h, config)) for w, h in linears]).sum(0)
            cells.append(f"{jnp.sqrt(lost / whole):.4f}, {entropy / len(linears):.2f}")
        table.add_row(name, *cells)
    Console().print(table)

    # The blocks as a model, each linear with the errors of those before it in its inputs.
    config = QuantConfig(bits=bits[0], group_size=64, grid=normal_grid)  # type: ignore[arg-type]
    for name, runtime in {"a normal grid": Runtime(), "a normal grid, sparing": Runtime(round_block=sparing)}.items():
        report = gptq_fn.quantize(params, spec, calib, config, runtime=runtime).report
        print(f"{blocks} blocks at {bits[0]} bits on {name}: error {report.error:.4f}, the largest {report.worst(1)[0].error:.4f}")


if __name__ == "__main__":
    tyro.cli(main)
