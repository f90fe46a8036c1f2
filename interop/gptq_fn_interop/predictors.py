"""The model in a directory as functions of token ids, through JAX or through transformers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from gptq_fn import FAMILIES, forward, generate
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.evaluation import Predict, dense
from gptq_fn_interop.stream import load_gptq

Way = Literal["auto", "jax", "torch"]
"""Which forward: this project's in JAX, transformers' in torch, or the first where a row of the table describes the model."""

Extend = Callable[[Sequence[int], int, Sequence[int]], list[int]]
"""Up to n likeliest tokens behind the given ones, until one of the end tokens, which is the last then: (tokens, n, ends)."""


@dataclass(frozen=True)
class Predictor:
    """A model as functions: logits for tokens [batch, time], and the likeliest continuation of one text."""

    predict: Predict
    extend: Extend


def load_predictor(directory: Path, way: Way = "auto") -> Predictor:
    """The float or quantized model in this directory. Raises ValueError, in a sentence, where this way does not serve it.

    In JAX, quantized weights are dequantized once, to float32. In torch they stay packed, on the GPU if there is one; float
    weights keep the checkpoint's dtype there and are float32 on CPUs.
    """
    kind = Checkpoint(directory).config.get("model_type")
    if way == "jax" and kind not in FAMILIES:
        raise ValueError(f"No row of the table describes model_type {kind!r}, so JAX cannot run it; use --forward torch.")
    return _torch(directory, kind) if way == "torch" or kind not in FAMILIES else _jax(directory)


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest text that a model was made for, as config.json tells; None where it does not."""
    keys = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
    return next((config[key] for key in keys if config.get(key)), None)


def bucket(length: int, longest: int) -> int:
    """The least of 16, 24, 32, 48, 64, 96, ... that is not less, or `longest`: texts padded to few lengths compile few programs."""
    power = 1 << max(4, (length - 1).bit_length())
    return min(longest, power * 3 // 4 if length <= power * 3 // 4 and power > 16 else power)


def _jax(directory: Path) -> Predictor:
    params, spec = load_gptq(directory)
    params = dense(params)
    longest = positions(Checkpoint(directory).config) or 1 << 31

    def extend(tokens: Sequence[int], n: int, ends: Sequence[int]) -> list[int]:
        room = max(len(tokens), bucket(len(tokens), longest - n))
        padded = jnp.asarray([0] * (room - len(tokens)) + list(tokens), jnp.int32)
        # generate cuts off padding that all texts share: one of full length keeps it, and so the programs few
        both, keep = jnp.stack([padded, padded]), jnp.stack([jnp.arange(room) >= room - len(tokens), jnp.ones(room, bool)])
        return _until(np.asarray(generate(spec, params, both, n, keep=keep, end=ends)[0, room:]).tolist(), ends)

    return Predictor(partial(forward, spec, params), extend)


def _torch(directory: Path, kind: str | None) -> Predictor:
    import torch
    import transformers

    import gptq_fn.interop  # noqa: F401 - transformers then loads quantized checkpoints
    from gptq_fn_interop.hf import whole_model
    from gptq_fn_interop.tensors import to_jax

    if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"transformers has no causal language model of model_type {kind!r}, and code that comes with a checkpoint is never run."
        )
    gpu = torch.cuda.is_available()
    model: Any = whole_model(directory, "auto" if gpu else "float32")
    model = model.to("cuda") if gpu else model

    @torch.no_grad()
    def predict(tokens: Int[Array, "batch time"]) -> Array:
        ids = torch.tensor(np.asarray(tokens), dtype=torch.long, device=model.device)
        return to_jax(model(ids, use_cache=False).logits.float())

    @torch.no_grad()
    def extend(tokens: Sequence[int], n: int, ends: Sequence[int]) -> list[int]:
        ids = torch.tensor([list(tokens)], device=model.device)
        stop = {"eos_token_id": list(ends), "pad_token_id": ends[0]} if ends else {"eos_token_id": None}
        text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, num_beams=1, **stop)
        return _until(text[0, len(tokens) :].tolist(), ends)

    return Predictor(predict, extend)


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first of the end tokens, with it."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
