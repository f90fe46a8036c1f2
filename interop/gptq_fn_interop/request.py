"""What a GPTQConfig asks for when a model is quantized while it is loaded: field by field, and the text that it names."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import transformers

from gptq_fn import QuantConfig, Rule
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.gptq_config import FORMATS

SOLVER: Mapping[str, str] = MappingProxyType(
    {
        "bits": "2, 3, 4 or 8",
        "group_size": "inputs that share a scale; -1 for one group a row",
        "sym": "symmetric grids, or a zero point for each group",
        "damp_percent": "QuantConfig.damp: 0.1 unless given, as in transformers; None lets the number of rows decide",
        "desc_act": "columns by importance: order 'act'",
        "act_group_aware": "unless desc_act: order 'group', or 'natural' where False",
        "static_groups": "scales from the original weights, by stored position",
        "true_sequential": "linears see the rounding errors of those before them in their block",
        "grid": "QuantConfig.grid, which transformers has no word for",
        "negative_scales": "QuantConfig.negative_scales, likewise",
        "alpha": "QuantConfig.alpha, likewise, as a number",
        "experts": "QuantConfig.experts, likewise",
        "min_rows": "QuantConfig.min_rows, likewise",
    }
)
"""Fields that say how a linear is quantized. They may differ between linears, by `dynamic`."""

FIELDS: Mapping[str, str] = MappingProxyType(
    {
        **SOLVER,
        "dynamic": "rules by name: '-:regex' leaves linears alone, '+:regex' or 'regex' changes fields above; the first match wins",
        "modules_in_block_to_quantize": "only these linears of each block; their order and grouping are those of the forward",
        "block_name_to_quantize": "the module whose children are the blocks, where they are not found or others are meant",
        "lm_head": "True quantizes the head, too, and gives a tied model a head of its own",
        "dataset": "texts, a sample each as long as it is; or c4, wikitext2, pydoc, a text file or a hub dataset",
        "tokenizer": "a tokenizer or its name; the model's own unless given",
        "model_seqlen": "tokens of a sample, at most: 4028 or what the model has positions for unless given",
        "nsamples": "samples of a dataset that goes by name: 128 unless given",
        "format": "gptq or gptq_v2; asymmetric models are always gptq_v2, since the older has no room for a zero point of 0",
        "checkpoint_format": "another name of format",
        "meta": "saved with the model, beside what is written there by itself",
        "backend": "the kernel of the loaded model by its name in gptq_fn_kernels.BACKENDS; the first that serves unless given",
        "use_exllama": "a kernel of another package: the first kernel that serves is taken, on or off",
        "disable_exllama": "likewise",
        "exllama_config": "likewise, for either version",
        "use_cuda_fp16": "likewise",
        "max_input_length": "no effect: the size of a buffer of exllama",
        "batch_size": "no effect: as many tokens run at once as the device likes",
        "pad_token_id": "no effect: samples are not padded",
        "cache_block_outputs": "no effect: they are kept, and computed once",
        "module_name_preceding_first_block": "no effect: what comes before the blocks is known, or found by running the model",
        "quant_method": "gptq",
        "pack_dtype": "int32",
    }
)
"""Every field of a GPTQConfig and what it means here. Any other is refused by name."""

NSAMPLES, LONGEST = 128, 4028
"""What transformers takes of a dataset, by way of optimum."""

_NAMES = {"c4-new": "c4"}
_POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")


@dataclass(frozen=True)
class Request:
    """What a GPTQConfig asks for."""

    config: QuantConfig
    dataset: str | tuple[str, ...]
    tokenizer: Any
    length: int | None
    nsamples: int
    layers: tuple[str, ...] | None
    blocks: str | None
    head: bool
    version: str
    meta: dict[str, Any]
    backend: str


def read(config: Any) -> Request:
    """The request, from transformers' GPTQConfig or ours. Raises ValueError for what cannot be done, in a sentence."""
    fields, usual = vars(config), vars(type(config)(bits=config.bits))
    # a field of some later transformers is no matter while it has its default
    if unknown := [key for key in fields if key not in FIELDS and key != "described" and fields[key] != usual.get(key, KeyError)]:
        raise ValueError(f"GPTQConfig has {unknown[0]}={fields[unknown[0]]!r}, which means nothing here; there are {', '.join(FIELDS)}.")
    if fields["format"] not in FORMATS:
        raise ValueError(f"Quantized models are saved in format {' or '.join(FORMATS)}, not {fields['format']!r}.")
    if fields.get("pack_dtype") not in (None, "int32"):
        raise ValueError(f"Codes are packed into words of int32, not of {fields['pack_dtype']}; leave pack_dtype out.")
    layers = fields["modules_in_block_to_quantize"]
    base = _solver(fields)
    return Request(
        config=replace(base, rules=tuple(_rule(p, changes, fields) for p, changes in (fields.get("dynamic") or {}).items())),
        dataset=_dataset(fields["dataset"]),
        tokenizer=fields["tokenizer"],
        length=fields["model_seqlen"],
        nsamples=fields.get("nsamples") or NSAMPLES,
        layers=None if layers is None else tuple(name for item in layers for name in ([item] if isinstance(item, str) else item)),
        blocks=fields["block_name_to_quantize"],
        head=bool(fields.get("lm_head")),
        version=fields["format"],
        meta=dict(fields["meta"] or {}),
        backend=fields["backend"],
    )


def _solver(fields: Mapping[str, Any]) -> QuantConfig:
    more = {key: fields[key] for key in ("grid", "negative_scales", "alpha", "experts", "min_rows") if fields.get(key) is not None}
    return QuantConfig(
        bits=fields["bits"],
        group_size=None if fields["group_size"] == -1 else fields["group_size"],
        sym=fields["sym"],
        damp=fields["damp_percent"],
        order="act" if fields["desc_act"] else "group" if fields["act_group_aware"] else "natural",
        static_groups=bool(fields.get("static_groups")),
        sequential=fields["true_sequential"],
        **more,
    )


def _rule(pattern: str, changes: Mapping[str, Any] | None, fields: Mapping[str, Any]) -> Rule:
    if unknown := sorted((changes or {}).keys() - SOLVER.keys()):
        raise ValueError(f"The dynamic rule {pattern!r} sets {unknown[0]!r}; a rule may set {', '.join(SOLVER)}.")
    if pattern.startswith("-:"):
        return Rule(pattern.removeprefix("-:"))
    return Rule(pattern.removeprefix("+:"), _solver({**fields, **(changes or {})}))


def _dataset(dataset: Any) -> str | tuple[str, ...]:
    if isinstance(dataset, str):
        return _NAMES.get(dataset, dataset)
    if isinstance(dataset, list | tuple) and dataset and all(isinstance(text, str) for text in dataset):
        return tuple(dataset)
    raise ValueError(
        f"Quantizing a model while it is loaded needs calibration text, but dataset is {'missing' if dataset is None else 'no text'}; "
        "pass GPTQConfig(bits=4, dataset=...) with a list of texts, or a name: 'c4', 'wikitext2', 'pydoc'."
    )


def samples(request: Request, model: Any) -> np.ndarray | list[np.ndarray]:
    """The token ids to calibrate with: int32 [samples, length] of a dataset that goes by name, or int32 [time] of each text.

    Texts are encoded as the tokenizer does it by default, with its special tokens. Raises ValueError for a text without any.
    """
    tokenizer = model.name_or_path if request.tokenizer is None else request.tokenizer
    positions = (getattr(model.config.get_text_config(), key, None) for key in _POSITIONS)
    length = request.length or min(LONGEST, next(filter(None, positions), 2048))
    if isinstance(request.dataset, str):
        return tokens(request.dataset, tokenizer, samples=request.nsamples, length=length)
    if isinstance(tokenizer, str):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer)
    found = [np.asarray(tokenizer(text)["input_ids"][:length], np.int32) for text in request.dataset]
    if empty := [i for i, ids in enumerate(found) if not ids.size]:
        raise ValueError(f"Text {empty[0]} of the dataset, {request.dataset[empty[0]]!r}, has no tokens; leave it out.")
    return found
