"""Between checkpoint names and the pytrees of the core."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from gptq_fn import ModelSpec, QuantizedLinear
from gptq_fn_interop.gptq_format import TENSORS, Zeros, bits_and_inputs, from_tensors, scheme_of, to_tensors

Tensors = Mapping[str, np.ndarray]


def read_params(spec: ModelSpec, tensors: Tensors, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole model, quantized linears as QuantizedLinear. `described` is the quantization config, if there is one."""
    blocks = [read_block(spec, i, tensors, described) for i in range(len(spec.blocks))]
    return {"top": read_top(spec, tensors), "blocks": blocks}


def read_top(spec: ModelSpec, tensors: Tensors) -> dict[str, Any]:
    """What lies outside the blocks: {role: {"weight", "bias"}}. A tied head is not read: the embedding serves."""
    return {role: _read(tensors, name) for role, name in spec.tensors if not (role == "head" and spec.tied)}


def read_block(spec: ModelSpec, i: int, tensors: Tensors, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Block `i`: {role: {"weight", "bias"} or QuantizedLinear}; weights become [out, in]."""
    block, prefix = spec.blocks[i], spec.prefix.format(i=i)
    p: dict[str, Any] = {slot: _read(tensors, prefix + name) for slot, name in block.norms}
    for linear in block.linears:
        name = prefix + linear.name
        if f"{name}.qweight" in tensors:
            mine = {leaf: tensors[f"{name}.{leaf}"] for leaf in TENSORS if f"{name}.{leaf}" in tensors}
            p[linear.role] = from_tensors(mine, name, described or {})
        else:
            p[linear.role] = _read(tensors, name, transposed=linear.stored == "in_out")
    return p


def write_params(spec: ModelSpec, params: Mapping[str, Any], zeros: Zeros) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the whole model under their names on disk."""
    yield from write_top(spec, params["top"])
    for i, p in enumerate(params["blocks"]):
        yield from write_block(spec, i, p, zeros)


def write_top(spec: ModelSpec, top: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors outside the blocks."""
    for role, name in spec.tensors:
        if role in top:
            yield from _write(top[role], name)


def write_block(spec: ModelSpec, i: int, p: Mapping[str, Any], zeros: Zeros) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of block `i`, quantized linears as the five tensors of the format."""
    block, prefix = spec.blocks[i], spec.prefix.format(i=i)
    for slot, name in block.norms:
        yield from _write(p[slot], prefix + name)
    for linear in block.linears:
        leaf, name = p[linear.role], prefix + linear.name
        if isinstance(leaf, QuantizedLinear):
            yield from ((f"{name}.{key}", value) for key, value in to_tensors(leaf, zeros).items())
        else:
            yield from _write(leaf, name, transposed=linear.stored == "in_out")


def dense_shapes(
    shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, described: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes as they were before quantizing: a weight in place of each qweight and its companions.

    Where there is no g_idx to tell the number of inputs, `described`, the quantization config, tells the bits.
    """
    linears = {spec.name_of(i, linear): linear for i, block in enumerate(spec.blocks) for linear in block.linears}
    found = dict(shapes)
    for name, linear in linears.items():
        if f"{name}.qweight" in shapes:
            words, out = shapes[f"{name}.qweight"]
            for leaf in ("qweight", "qzeros", "scales", "g_idx"):
                found.pop(f"{name}.{leaf}", None)
            told, scheme = shapes.get(f"{name}.g_idx"), scheme_of(name, described or {}) or {}
            _, inputs = bits_and_inputs(name, words, told[0] if told else None, scheme)
            found[f"{name}.weight"] = (out, inputs) if linear.stored == "out_in" else (inputs, out)
    return found


def _read(tensors: Tensors, name: str, *, transposed: bool = False) -> dict[str, Any]:
    weight = tensors[f"{name}.weight"]
    leaf = {"weight": jnp.asarray(weight.T if transposed else weight)}
    return {**leaf, "bias": jnp.asarray(tensors[f"{name}.bias"])} if f"{name}.bias" in tensors else leaf


def _write(leaf: Mapping[str, Any], name: str, *, transposed: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in leaf.items():
        array = np.asarray(value)
        yield f"{name}.{key}", np.ascontiguousarray(array.T) if transposed and key == "weight" else array
