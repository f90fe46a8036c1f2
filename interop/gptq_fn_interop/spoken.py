"""Text that a model itself speaks: of all registers that it knows, and there without any data."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Int

from gptq_fn import ModelSpec, generate
from gptq_fn_interop.stream import compute_dtype, load_gptq


def spoken(
    source: str | Path,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    spec: ModelSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int[np.ndarray, "samples length"]:
    """Token ids that the model in `source` draws one after the other at temperature 1, behind a first one drawn from all there are.

    So Liu et al., "LLM-QAT" (arXiv 2305.17888), make their data: the first token decides what a text is about, and likeliest
    tokens alone would say little and repeat it. All of the model is in memory. `progress` is called as `generate` does. Raises
    ValueError or OSError as `load_gptq` does.
    """
    params, spec = load_gptq(source, spec=spec)
    embedding = params["top"]["embed"]["weight"]
    params = jax.tree.map(lambda a: a.astype(compute_dtype(embedding.dtype)), params)
    first, others = jax.random.split(jax.random.key(seed))
    begun = jax.random.randint(first, (samples, 1), 0, len(embedding))
    return np.asarray(generate(spec, params, begun, length - 1, temperature=1.0, key=others, progress=progress), np.int32)
