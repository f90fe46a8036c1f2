"""Calibration samples of any lengths, as batches of few shapes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int

from gptq_fn._mesh import PARTS, WHOLE, placed, size, split
from gptq_fn._programs import program
from gptq_fn._runtime import Runtime
from gptq_fn._target import ALONE, shares
from gptq_fn.check import check_tokens
from gptq_fn.model.decoder import embed, learned_positions
from gptq_fn.spec import ModelSpec

Samples = Int[Array, "samples time"] | Int[np.ndarray, "samples time"] | Sequence[Any]
"""Token ids: an array of samples of one length, or a sequence of one-dimensional arrays of any lengths."""


_EMBEDDING = ("embed", "project_in", "positions", "embed_norm")
"""The roles that `embed` reads."""


class Batch(NamedTuple):
    """What enters a block, of some samples. Padding comes after a sample, where no token that counts attends to it."""

    x: Any
    """[batch, time, width], as the runtime's store keeps it."""
    keep: Bool[Array, "batch time"]
    """Which tokens count; the others are padding."""
    samples: tuple[int, ...]
    """The numbers of the samples; rows beyond them are padding."""
    share: tuple[int, ...]
    """The share of each of them, as `gptq_fn._target.shares` tells it; without a float stream, all go alone."""
    exact: Any = None
    """What enters the block of the float model, kept like `x`: the float stream, unless all of these samples go alone."""


def embed_batches(
    spec: ModelSpec,
    top: Mapping[str, Any],
    calib: Samples,
    runtime: Runtime | None = None,
    dtype: jnp.dtype | None = None,
    *,
    beside: bool = False,
) -> list[Batch]:
    """What enters the first block, in batches of about `runtime.tokens` tokens for each device and at least one sample.

    Samples of one length are not padded. Others are, to the next power of two, so that a block compiles for few shapes.
    Computation runs in `dtype`, by default that of the embedding. With a mesh, each device holds as many samples of a batch.
    `beside` begins the float stream, too, with as many samples as it needs: both streams are the same at the first block.
    Raises ValueError for samples that are not token ids of the model, or longer than the positions that it has learned.
    """
    tokens = [np.asarray(sample) for sample in calib]
    check_tokens(tokens, top["embed"]["weight"].shape[0])
    runtime = runtime or Runtime()
    shell, devices = replace(spec, blocks=()), size(runtime.mesh)
    top = placed({role: leaf for role, leaf in top.items() if role in _EMBEDDING}, runtime.mesh, WHOLE)
    lengths = {len(sample) for sample in tokens}
    longest = max(lengths)
    if longest > (learned := learned_positions(spec, top)):
        raise ValueError(f"A calibration sample has {longest} tokens, but the model has learned {learned} positions; cut it.")
    alike: dict[int, list[int]] = defaultdict(list)
    for n, sample in enumerate(tokens):
        alike[longest if len(lengths) == 1 else min(longest, 1 << (len(sample) - 1).bit_length())].append(n)
    embedded = partial(_embed, shell, dtype=dtype, mesh=runtime.mesh)
    features = top["project_in"]["weight"].shape[0] if "project_in" in top else top["embed"]["weight"].shape[1]
    share = shares([len(sample) for sample in tokens], features) if beside else (ALONE,) * len(tokens)
    batches = []
    for width, numbers in sorted(alike.items()):
        numbers.sort(key=lambda n: (share[n] == ALONE, -share[n], n))  # those of one share together
        calls = -(-len(numbers) // (devices * max(1, runtime.tokens // width)))
        together = -(-len(numbers) // (calls * devices)) * devices
        for i in range(0, len(numbers), together):
            mine = tuple(numbers[i : i + together])
            ids, keep = np.zeros((together, width), np.int32), np.zeros((together, width), bool)
            for row, n in enumerate(mine):
                ids[row, : len(tokens[n])], keep[row, : len(tokens[n])] = tokens[n], True
            ids, keep = placed((ids, keep), runtime.mesh, PARTS)
            x = runtime.store.put(embedded(top, jnp.asarray(ids)))
            of_mine = tuple(share[n] for n in mine)
            batches.append(Batch(x, jnp.asarray(keep), mine, of_mine, None if min(of_mine) == ALONE else x))
    return batches


@partial(program, static_argnames=("spec", "dtype", "mesh"))
def _embed(spec: ModelSpec, top: Mapping[str, Any], ids: Array, dtype: jnp.dtype | None, mesh: Mesh | None) -> Array:
    def run(top: Mapping[str, Any], ids: Array) -> Array:
        x = embed(spec, top, ids)
        return x if dtype is None else x.astype(dtype)

    return split(run, mesh, (WHOLE, PARTS), PARTS)(top, ids)
