"""Calibration samples of any lengths, as batches of few shapes."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from gptq_fn.model.decoder import embed
from gptq_fn.spec import ModelSpec

TOKENS_PER_CALL = {"cpu": 512}
"""Calibration tokens that pass through a block at once, by JAX backend; 4096 elsewhere. On CPUs those of few stay in cache."""

Samples = Int[Array, "samples time"] | Int[np.ndarray, "samples time"] | Sequence[Any]
"""Token ids: an array of samples of one length, or a sequence of one-dimensional arrays of any lengths."""


class Batch(NamedTuple):
    """What enters a block, of some samples. Padding comes after a sample, where no token that counts attends to it."""

    x: Float[Array, "batch time width"]
    keep: Bool[Array, "batch time"]
    """Which tokens count; the others are padding."""
    samples: tuple[int, ...]
    """The numbers of the samples; rows beyond them are padding."""


def embed_batches(spec: ModelSpec, top: Mapping[str, Any], calib: Samples) -> list[Batch]:
    """What enters the first block, in batches of about TOKENS_PER_CALL tokens and at least one sample.

    Samples of one length are not padded. Others are, to the next power of two, so that a block compiles for few shapes.
    """
    tokens = [np.asarray(sample) for sample in calib]
    lengths = {len(sample) for sample in tokens}
    longest = max(lengths)
    alike: dict[int, list[int]] = defaultdict(list)
    for n, sample in enumerate(tokens):
        alike[longest if len(lengths) == 1 else min(longest, 1 << (len(sample) - 1).bit_length())].append(n)
    batches = []
    for width, numbers in sorted(alike.items()):
        calls = -(-len(numbers) // max(1, TOKENS_PER_CALL.get(jax.default_backend(), 4096) // width))
        size = -(-len(numbers) // calls)
        for i in range(0, len(numbers), size):
            mine = tuple(numbers[i : i + size])
            ids, keep = np.zeros((size, width), np.int32), np.zeros((size, width), bool)
            for row, n in enumerate(mine):
                ids[row, : len(tokens[n])], keep[row, : len(tokens[n])] = tokens[n], True
            batches.append(Batch(embed(spec, top, jnp.asarray(ids)), jnp.asarray(keep), mine))
    return batches
