"""The GPTQ checkpoint format: a quantized linear as five tensors, and the object that describes them all.

qweight int32 [in * bits / 32, out] and qzeros int32 [groups, out * bits / 32] hold codes in the bit stream of
`gptq_fn_kernels.words`; scales [groups, out], of either sign; g_idx int32 [in]; bias [out]. Version 1 files ("gptq") store zero - 1, an
early packing slip that every reader undoes; version 2 ("gptq_v2") stores the zero point.
"""

import re
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from gptq_fn_kernels.words import pack, unpack, words_of

from gptq_fn import QuantConfig, QuantizedLinear, Report

Zeros = Literal["v1", "v2", "v1_carry"]
"""How zero points are stored: less one, as they are, or as words from each of which a one was taken for every field."""

HEADS = ("lm_head", "embed_out")
"""What heads are called; engines have to be told if they are quantized."""

BITS = (2, 3, 4, 8)

FORMATS = ("gptq", "gptq_v2")

FLOATS = ("float16", "bfloat16", "float32", "float64")

HELD = {"qweight": ("int32",), "qzeros": ("int32",), "g_idx": ("int32", "int64")}
"""The dtypes of the tensors of a linear; the others hold floating numbers."""

TENSORS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def quantization_config(report: Report) -> dict[str, Any]:
    """The object that config.json and quantize_config.json hold, with the keys that engines need. Rules keep their order."""
    return described_by(report.config, head=any(x.name in HEADS for x in report.linears))


def described_by(config: QuantConfig, *, head: bool) -> dict[str, Any]:
    """The object that describes what `config` makes of a model, whose head is quantized too or not."""
    described = {
        **_scheme(config),
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if zeros_version(config) == "v1" else "gptq_v2",
        "damp_percent": 0.01 if config.damp is None else config.damp,
        "static_groups": config.static_groups,
        "true_sequential": config.sequential,
        "lm_head": head,
        "pack_dtype": "int32",
        "meta": {
            "quantizer": [f"gptq_fn:{version('gptq-fn')}"],
            "act_group_aware": config.order == "group",
            "grid": config.grid_name,
            "negative_scales": config.either_sign,
        },
    }
    if config.rules:
        rules = ((rule.pattern, rule.config) for rule in config.rules)
        described["dynamic"] = {f"{'-:' if c is None else '+:'}{pattern}": {} if c is None else _scheme(c) for pattern, c in rules}
    return described


def _scheme(config: QuantConfig) -> dict[str, Any]:
    group_size = -1 if config.group_size is None else config.group_size
    desc_act = config.order == "act" and not config.static_groups  # with static groups g_idx is trivial
    return {"bits": config.bits, "group_size": group_size, "desc_act": desc_act, "sym": config.sym}


def require_readable(described: Any, where: str) -> None:
    """Raise ValueError, in a sentence, unless `described` can be the quantization config of a GPTQ checkpoint."""
    if not isinstance(described, dict):
        raise ValueError(f"The quantization config in {where} is a {type(described).__name__}, not an object.")
    method, written = described.get("quant_method", "gptq"), format_of(described)
    if method != "gptq":
        raise ValueError(f"{where} describes a checkpoint quantized with {method!r}; those quantized with 'gptq' can be read.")
    if written not in FORMATS:
        raise ValueError(f"{where} says format {written!r}, which is packed for a particular kernel; {' and '.join(FORMATS)} can be read.")
    rules = described.get("dynamic") or {}
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) for rule in rules.values()):
        raise ValueError(f"The rules ('dynamic') in {where} are not an object of objects.")
    for scheme, whose in ((described, ""), *((rule, f" of the rule {pattern!r}") for pattern, rule in rules.items())):
        bits, size, sym = scheme.get("bits", 4), scheme.get("group_size", -1), scheme.get("sym", True)
        if bits not in BITS or isinstance(bits, bool):
            raise ValueError(f"{where} says bits = {bits!r}{whose}; codes of {', '.join(map(str, BITS))} bits can be read.")
        if not isinstance(size, int) or isinstance(size, bool) or (size < 1 and size != -1):
            raise ValueError(f"{where} says group_size = {size!r}{whose}; it is a number of inputs, or -1 for one group a row.")
        if not isinstance(sym, bool):
            raise ValueError(f"{where} says sym = {sym!r}{whose}; it is true or false.")
    for pattern in rules:
        try:
            re.compile(_regex(pattern))
        except re.error as error:
            raise ValueError(f"The rule {pattern!r} in {where} is not a regular expression: {error}.") from None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which of the keys that decide how codes are read these quantization configs differ, of those that both have."""
    keys = [key for key in ("bits", "group_size", "sym", "dynamic") if key in one and key in other and one[key] != other[key]]
    return keys + ["checkpoint_format"] * (format_of(one) != format_of(other))


def format_of(described: Mapping[str, Any]) -> Any:
    """The checkpoint format that a quantization config names, under either of its keys."""
    return described.get("checkpoint_format") or described.get("format") or "gptq"


def _regex(pattern: str) -> str:
    return pattern.removeprefix("+:").removeprefix("-:")


def scheme_of(name: str, described: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `described` says of the linear called `name`, with its first matching rule; None where it is not quantized."""
    for pattern, override in (described.get("dynamic") or {}).items():
        if re.match(_regex(pattern), name):
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
    """The five tensors of a linear, with a leading axis where `q` has one of experts; no bias where it has none.

    Codes that lie on an accelerator become words there. Raises ValueError for what the format cannot hold.
    """
    if zeros == "v1" and not bool(q.zero.all()):
        raise ValueError("A zero point of 0 cannot be stored in a version 1 checkpoint; write gptq_v2.")
    return {key: np.ascontiguousarray(array) for key, array in words({"": q}, zeros)[""].items()}


def words(linears: Mapping[str, QuantizedLinear], zeros: Zeros) -> dict[str, dict[str, Any]]:
    """`to_tensors` of each linear without the look at zero points, where the codes are: an accelerator runs one program for all of
    them, and is not waited for."""
    for q in linears.values():
        if reason := unpackable((q.codes.shape[-2], q.codes.shape[-1]), q.bits):
            raise ValueError(reason)
    on_device = {name: q for name, q in linears.items() if not on_host(q)}
    there = tensors_on_device(on_device, zeros) if on_device else {}
    return {name: there[name] if name in there else _tensors(q, _words_on_host(q, zeros), np) for name, q in linears.items()}


def tensors_on_device(linears: Mapping[str, QuantizedLinear], zeros: Zeros) -> dict[str, dict[str, jax.Array]]:
    """The tensors of linears whose codes lie on a device, where one program computes them."""
    found = _tensors_on_device(linears, zeros)
    return {name: {key: found[name][key] for key in TENSORS if key in found[name]} for name in linears}  # which JAX sorts


def on_host(q: QuantizedLinear) -> bool:
    """Whether the codes lie in the host's memory."""
    return all(device.platform == "cpu" for device in jnp.asarray(q.codes).devices())


def _tensors(q: QuantizedLinear, words: tuple[Any, Any], xp: Any) -> dict[str, Any]:
    """The tensors with these qweight and qzeros, in the arrays of `xp`: NumPy or jax.numpy."""
    qweight, qzeros = words
    tensors = {"qweight": qweight, "qzeros": qzeros, "scales": xp.swapaxes(q.scale, -1, -2), "g_idx": xp.asarray(q.group_of, np.int32)}
    return tensors if q.bias is None else {**tensors, "bias": xp.asarray(q.bias)}


def _words_on_host(q: QuantizedLinear, zeros: Zeros) -> tuple[np.ndarray, np.ndarray]:
    codes, zero = np.asarray(q.codes), np.asarray(q.zero)
    if codes.ndim == 2:
        return _words(codes, zero, q.bits, zeros, np)
    of_experts = [_words(c, z, q.bits, zeros, np) for c, z in zip(codes, zero, strict=True)]
    return np.stack([qweight for qweight, _ in of_experts]), np.stack([qzeros for _, qzeros in of_experts])


@partial(jax.jit, static_argnames="zeros")
def _tensors_on_device(linears: Mapping[str, QuantizedLinear], zeros: Zeros) -> dict[str, dict[str, jax.Array]]:
    def one(q: QuantizedLinear) -> tuple[jax.Array, jax.Array]:
        of_one = lambda codes, zero: _words(codes, zero, q.bits, zeros, jnp)  # noqa: E731
        return (of_one if q.codes.ndim == 2 else jax.vmap(of_one))(q.codes, q.zero)

    return {name: _tensors(q, one(q), jnp) for name, q in linears.items()}


def _words(codes: Any, zero: Any, bits: int, zeros: Zeros, xp: Any) -> tuple[Any, Any]:
    """qweight and qzeros of codes [out, in] and zero points [out, groups], in the arrays of `xp`: NumPy or jax.numpy."""
    stored = zero.astype(np.int32) - 1 if zeros == "v1" else zero.astype(np.int32)
    return pack(codes.T.astype(np.int32), bits, xp), pack(stored, bits, xp).T


def from_tensors(tensors: Mapping[str, np.ndarray], name: str, described: Mapping[str, Any]) -> QuantizedLinear:
    """The linear `name` of a checkpoint that `described` (its quantization config) tells of.

    Bits come from `described`, or from the shapes where these say otherwise: rules may name linears in other ways. Raises
    ValueError for tensors that do not belong together.
    """
    scheme = scheme_of(name, described) or {}
    shapes = {leaf: tensor.shape for leaf, tensor in tensors.items()}
    bits, inputs = require_linear(name, shapes, scheme, {leaf: str(tensor.dtype) for leaf, tensor in tensors.items()})
    qweight, scales = tensors["qweight"], tensors["scales"]
    groups, out = scales.shape
    g_idx = tensors["g_idx"] if "g_idx" in tensors else regular_groups(name, inputs, groups, scheme)
    require_groups(name, g_idx, groups)
    zero = zero_points(tensors["qzeros"], bits, out, zeros_of(tensors["qzeros"], bits, out, scheme))
    q = QuantizedLinear(
        codes=jnp.asarray(unpack(qweight, bits, inputs, np).T.astype(np.uint8)),
        scale=jnp.asarray(np.ascontiguousarray(scales.T)),
        zero=jnp.asarray(zero.T.astype(np.uint8)),
        group_of=jnp.asarray(g_idx.astype(np.int32)),
        bits=bits,
        bias=jnp.asarray(tensors["bias"]) if "bias" in tensors else None,
    )
    if problems := q.problems():
        raise ValueError(f"{name}: {' '.join(problems)} The checkpoint is damaged or its quantization config belongs to another.")
    return q


def require_linear(
    name: str, shapes: Mapping[str, tuple[int, ...]], scheme: Mapping[str, Any], dtypes: Mapping[str, str] | None = None
) -> tuple[int, int]:
    """The bits and inputs of the linear whose tensors have these shapes and dtypes.

    The number of inputs is that of g_idx; where there is none, `scheme` has to tell the bits. Raises ValueError in a
    sentence for tensors that are missing, do not belong together, or hold what this format does not.
    """
    if absent := [leaf for leaf in ("qweight", "qzeros", "scales") if leaf not in shapes]:
        raise ValueError(f"{name} has no {' and no '.join(absent)}; the checkpoint is incomplete.")
    for leaf, dtype in (dtypes or {}).items():
        if dtype not in (allowed := HELD.get(leaf, FLOATS)):
            raise ValueError(f"{name}.{leaf} holds {dtype}, but {' or '.join(allowed)} is expected; the checkpoint is damaged.")
    for leaf, shape in shapes.items():
        if len(shape) != (rank := 1 if leaf in ("g_idx", "bias") else 2) or 0 in shape:
            raise ValueError(f"{name}.{leaf} has shape {list(shape)}, but it has {rank} dimensions that are not empty.")
    (words, out), groups = shapes["qweight"], shapes["scales"][0]
    told = shapes["g_idx"][0] if "g_idx" in shapes else None
    bits, inputs = bits_and_inputs(name, words, told, scheme)
    expected = {"qweight": (words_of(inputs, bits), out), "qzeros": (groups, words_of(out, bits)), "scales": (groups, out), "bias": (out,)}
    for leaf, shape in expected.items():
        if shapes.get(leaf, shape) != shape:
            raise ValueError(
                f"{name}.{leaf} has shape {list(shapes[leaf])}, but {bits} bits, {inputs} inputs, {out} outputs and {groups} groups ask "
                f"for {list(shape)}. The checkpoint is damaged or its quantization config belongs to another."
            )
    if reason := unpackable((out, inputs), bits):
        raise ValueError(f"{name}: {reason}")
    return bits, inputs


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
    for found in (bits, *BITS):  # of a narrow layer, the shapes leave several possibilities
        if found and words_of(inputs, found) == words:
            return found, inputs
    raise ValueError(f"{name}: a qweight of {words} rows does not hold {inputs} inputs at {', '.join(map(str, BITS))} bits.")


def require_groups(name: str, g_idx: np.ndarray, groups: int) -> None:
    """Raise ValueError unless each input's group is one of these."""
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise ValueError(f"{name}.g_idx reaches from {g_idx.min()} to {g_idx.max()}, but there are {groups} groups; it is damaged.")


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
        stored = unpack(qzeros.T, bits, out, np)
        if (stored == middle).all():
            return "v2"
        if (stored == middle - 1).all():
            return "v1"
    if format_of(described) == "gptq_v2":
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
    stored = unpack(qzeros.T, bits, out, np).T
    return (stored + 1) & (2**bits - 1) if zeros == "v1" else stored
