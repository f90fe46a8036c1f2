"""The GPTQ checkpoint format: a quantized linear as five tensors, and the object that describes them all.

qweight int32 [in * bits / 32, out] and qzeros int32 [groups, out * bits / 32] hold codes in the bit stream of
`gptq_fn_kernels.words`; scales [groups, out]; g_idx int32 [in]; bias [out]. Version 1 files ("gptq") store zero - 1, an
early packing slip that every reader undoes; version 2 ("gptq_v2") stores the zero point.
"""

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from gptq_fn_kernels.words import chunk_of, pack, unpack, words_of

from gptq_fn import QuantConfig, QuantizedLinear, Report

Zeros = Literal["v1", "v2", "v1_carry"]
"""How zero points are stored: less one, as they are, or as words from each of which a one was taken for every field."""

HEADS = ("lm_head", "embed_out")
"""What heads are called; engines have to be told if they are quantized."""

TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def quantization_config(report: Report) -> dict[str, Any]:
    """The object that config.json and quantize_config.json hold, with the keys that engines need. Rules keep their order."""
    config = report.config
    described = {
        **_scheme(config),
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if zeros_version(config) == "v1" else "gptq_v2",
        "damp_percent": 0.01 if config.damp is None else config.damp,
        "static_groups": config.static_groups,
        "true_sequential": config.sequential,
        "lm_head": any(x.name in HEADS for x in report.linears),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"gptq_fn:{version('gptq-fn')}"], "act_group_aware": config.order == "group", "grid": config.grid},
    }
    if config.rules:
        rules = ((rule.pattern, rule.config) for rule in config.rules)
        described["dynamic"] = {f"{'-:' if c is None else '+:'}{pattern}": {} if c is None else _scheme(c) for pattern, c in rules}
    return described


def _scheme(config: QuantConfig) -> dict[str, Any]:
    group_size = -1 if config.group_size is None else config.group_size
    desc_act = config.order == "act" and not config.static_groups  # with static groups g_idx is trivial
    return {"bits": config.bits, "group_size": group_size, "desc_act": desc_act, "sym": config.sym}


def scheme_of(name: str, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `described` says of the linear called `name`, with its first matching rule; None where it is not quantized."""
    for pattern, override in (described.get("dynamic") or {}).items():
        if re.match(pattern.removeprefix("+:").removeprefix("-:"), name):
            return None if pattern.startswith("-:") else {**described, **override}
    return dict(described)


def zeros_version(config: QuantConfig) -> Zeros:
    """v1 where everything is symmetric, the older and wider read of the two; v2 else, since v1 has no room for a zero point of 0."""
    symmetric = config.sym and all(rule.config is None or rule.config.sym for rule in config.rules)
    return "v1" if symmetric else "v2"


def unpackable(shape: tuple[int, int], bits: int) -> str | None:
    """Why a linear of this (out, in) cannot be stored, in a sentence; None if it can be."""
    if bits == 3 and any(n % 32 for n in shape):
        return f"3-bit codes are stored in chunks of 32, but the weight is {list(shape)}; use 2, 4 or 8 bits or a rule that leaves it out."
    return None


def to_tensors(q: QuantizedLinear, zeros: Zeros) -> dict[str, np.ndarray]:
    """The five tensors of a linear; no bias where it has none. Raises ValueError for what the format cannot hold."""
    codes, zero = np.asarray(q.codes).astype(np.int32), np.asarray(q.zero).astype(np.int32)
    if reason := unpackable(q.shape, q.bits):
        raise ValueError(reason)
    if zeros == "v1":
        if not zero.all():
            raise ValueError("A zero point of 0 cannot be stored in a version 1 checkpoint; write gptq_v2.")
        zero = zero - 1
    tensors = {
        "qweight": np.ascontiguousarray(pack(_whole_chunks(codes.T, q.bits), q.bits, np.stack)),
        "qzeros": np.ascontiguousarray(pack(_whole_chunks(zero, q.bits), q.bits, np.stack).T),
        "scales": np.ascontiguousarray(np.asarray(q.scale).T),
        "g_idx": np.asarray(q.group_of).astype(np.int32),
    }
    return tensors if q.bias is None else {**tensors, "bias": np.asarray(q.bias)}


def _whole_chunks(codes: np.ndarray, bits: int) -> np.ndarray:
    return np.pad(codes, ((0, -len(codes) % chunk_of(bits)[0]), (0, 0)))


def from_tensors(tensors: Mapping[str, np.ndarray], name: str, described: Mapping[str, Any]) -> QuantizedLinear:
    """The linear `name` of a checkpoint that `described` (its quantization config) tells of.

    Bits come from `described`, or from the shapes where these say otherwise: rules may name linears in other ways. Raises
    ValueError for tensors that do not belong together.
    """
    scheme = scheme_of(name, described) or {}
    qweight, scales = tensors["qweight"], tensors["scales"]
    g_idx = tensors.get("g_idx")
    bits, inputs = bits_and_inputs(name, len(qweight), None if g_idx is None else len(g_idx), scheme)
    groups, out = scales.shape
    if g_idx is None:
        g_idx = regular_groups(name, inputs, groups, scheme)
    zero = zero_points(tensors["qzeros"], bits, out, zeros_of(tensors["qzeros"], bits, out, scheme))
    q = QuantizedLinear(
        codes=jnp.asarray(unpack(qweight, bits, inputs, np.stack).T.astype(np.uint8)),
        scale=jnp.asarray(np.ascontiguousarray(scales.T)),
        zero=jnp.asarray(zero.T.astype(np.uint8)),
        group_of=jnp.asarray(g_idx.astype(np.int32)),
        bits=bits,
        bias=jnp.asarray(tensors["bias"]) if "bias" in tensors else None,
    )
    if problems := q.problems():
        raise ValueError(f"{name}: {' '.join(problems)} The checkpoint is damaged or its quantization config belongs to another.")
    return q


def bits_and_inputs(name: str, words: int, inputs: int | None, scheme: Mapping[str, Any]) -> tuple[int, int]:
    """The bits and inputs of a qweight with this many rows; `inputs` is None where there is no g_idx to tell them.

    Raises ValueError where neither g_idx nor the scheme tells.
    """
    bits = int(scheme.get("bits", 0))
    if inputs is None:
        if not bits:
            raise ValueError(
                f"{name} has no g_idx and its quantization config names no bits: one of them has to tell how many inputs it has."
            )
        return bits, words * 32 // bits
    fits = bits and words_of(inputs, bits) == words  # of a narrow layer, the shapes leave several possibilities
    return bits if fits else words * 32 // inputs, inputs


def regular_groups(name: str, inputs: int, groups: int, scheme: Mapping[str, Any]) -> np.ndarray:
    """The g_idx [inputs] that a checkpoint left out: consecutive inputs share a group. Raises ValueError if it is not clear."""
    described = scheme.get("group_size", -1)
    for size in (inputs if described == -1 else described, inputs // groups):
        if -(-inputs // size) == groups:
            return np.arange(inputs, dtype=np.int32) // size
    raise ValueError(f"{name} has no g_idx, and {groups} groups of {inputs} inputs do not tell how large a group is.")


def zeros_of(qzeros: np.ndarray, bits: int, out: int, described: Mapping[str, Any]) -> Zeros:
    """How these zero points are stored.

    Symmetric files are told by their content, since some that call themselves version 1 store version 2. For asymmetric
    ones of GPTQModel in version 1, the one was subtracted from whole words, with borrows from field to field.
    """
    middle = 2 ** (bits - 1)
    if described.get("sym", True):
        stored = unpack(qzeros.T, bits, out, np.stack)
        if (stored == middle).all():
            return "v2"
        if (stored == middle - 1).all():
            return "v1"
    if described.get("checkpoint_format", described.get("format", "gptq")) == "gptq_v2":
        return "v2"
    writers = str((described.get("meta") or {}).get("quantizer", ""))
    return "v1_carry" if "gptqmodel" in writers and bits != 3 and not described.get("sym", True) else "v1"


def zero_points(qzeros: np.ndarray, bits: int, out: int, zeros: Zeros) -> np.ndarray:
    """The zero points [groups, out] as int32.

    A field of version 1 that reads 2^bits - 1 can only be a 0 that wrapped around: the true value is never 2^bits.
    """
    if zeros == "v1_carry":
        ones = sum(1 << shift for shift in range(0, 32, bits))
        qzeros = (qzeros.view(np.uint32) + np.uint32(ones)).view(np.int32)
    stored = unpack(qzeros.T, bits, out, np.stack).T
    return (stored + 1) & (2**bits - 1) if zeros == "v1" else stored
