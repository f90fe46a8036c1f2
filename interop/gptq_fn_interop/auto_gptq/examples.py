"""AutoGPTQ's calibration examples as samples of token ids."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from gptq_fn_interop.tensors import to_numpy


def samples(examples: Iterable[Mapping[str, Any]]) -> list[np.ndarray]:
    """One int array [time] for each row of each example's input_ids, without the tokens that its attention_mask masks.

    Both may be lists, lists of lists or tensors, [time] or [rows, time]; the mask may be missing. Raises ValueError where
    an example is something else, or nothing is left of one.
    """
    found = []
    for i, example in enumerate(examples):
        if not isinstance(example, Mapping) or "input_ids" not in example:
            raise ValueError(f"Example {i} is of type {type(example).__name__}; give a list of what a tokenizer returns for each text.")
        rows = _rows(example["input_ids"])
        masks = _rows(example["attention_mask"]) if "attention_mask" in example else [np.ones_like(row) for row in rows]
        if [row.shape for row in rows] != [mask.shape for mask in masks]:
            raise ValueError(f"Example {i}: its input_ids and attention_mask differ in shape.")
        kept = [row[mask.astype(bool)] for row, mask in zip(rows, masks, strict=True)]
        if not kept or not all(map(len, kept)):
            raise ValueError(f"Example {i} has no tokens, or none that its attention_mask leaves; take it out.")
        found += kept
    if not found:
        raise ValueError("There are no examples to calibrate with; give texts like those that the model will see, 128 or more.")
    return found


def _rows(ids: Any) -> list[np.ndarray]:
    ids = to_numpy(ids) if isinstance(ids, torch.Tensor) else ids
    return [np.asarray(row) for row in (ids if len(ids) and np.ndim(ids[0]) else [ids])]
