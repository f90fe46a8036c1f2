"""Between checkpoint names and the pytrees of the core."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptq_fn import ON_HOST, BlockSpec, LinearSpec, ModelSpec, QuantizedLinear
from gptq_fn.check import numbered
from gptq_fn.model.linear import Joined, Product
from gptq_fn_interop import fused
from gptq_fn_interop.gptq_format import FLOATS, TENSORS, Zeros, from_tensors, on_host, require_linear, scheme_of, to_tensors, words

Tensors = Mapping[str, np.ndarray]


def read_params(
    spec: ModelSpec,
    tensors: Tensors,
    described: Mapping[str, Any] | None = None,
    form: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """The whole model, quantized linears as QuantizedLinear. `described` is the quantization config, if there is one.

    The parameters of each block, and those outside, go through `form` as soon as they are read.
    """
    blocks = [form(read_block(spec, i, tensors, described)) for i in range(len(spec.blocks))]
    return {"top": form(read_top(spec, tensors, described)), "blocks": blocks}


def read_top(spec: ModelSpec, tensors: Tensors, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What lies outside the blocks: {role: {"weight", "bias"}}. A tied head is not read: the embedding serves."""
    found = {role: name for role, name in spec.tensors if not (role == "head" and spec.tied)}
    return {role: {} if name is None else _linear(tensors, name, described) for role, name in found.items()}


def read_block(spec: ModelSpec, i: int, tensors: Tensors, described: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Block `i`: {role: {"weight", "bias"} or QuantizedLinear}; weights become [out, in], experts get a leading axis."""
    block, prefix = spec.blocks[i], spec.prefix.format(i=i)
    p: dict[str, Any] = {role: jnp.asarray(_floating(tensors, prefix + name)) for role, name in block.arrays}
    for slot, name in block.norms:
        each = [] if name is None else [_read(tensors, full) for full in numbered(prefix + name, block.copies(slot))]
        p[slot] = {} if name is None else each[0] if block.copies(slot) is None else _stacked(each)
    for whole in block.fused:
        if prefix + whole.name in tensors:
            for role, part in fused.split(whole, _floating(tensors, prefix + whole.name)).items():
                p.setdefault(role, {})[whole.leaf] = jnp.asarray(part)
    for linear in block.linears:
        if linear.role not in p:
            each = [_linear(tensors, full, described, linear) for full in spec.names_of(i, linear)]
            p[linear.role] = each[0] if block.copies(linear.role) is None else _stacked(each)
    return p


def write_params(spec: ModelSpec, params: Mapping[str, Any], zeros: Zeros) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of the whole model under their names on disk. Raises ValueError for packed parameters."""
    require_unpacked(params)
    yield from write_top(spec, params["top"], zeros)
    for i, p in enumerate(params["blocks"]):
        yield from write_block(spec, i, p, zeros)


def require_unpacked(params: Mapping[str, Any]) -> None:
    """Raise ValueError for parameters in a form that only products take."""
    if any(isinstance(leaf, Product | Joined) for leaf in jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Product | Joined))):
        raise ValueError(
            "These parameters are packed for products (gptq_fn.kernels.pack, load_gptq(packed=True)), but files and Flax modules are made "
            "of codes and scales: use the parameters as they were before packing."
        )


def write_top(spec: ModelSpec, top: Mapping[str, Any], zeros: Zeros) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors outside the blocks."""
    for role, name in spec.tensors:
        if role in top and name is not None:
            yield from _write(top[role], name, zeros)


def write_block(spec: ModelSpec, i: int, p: Mapping[str, Any], zeros: Zeros) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of block `i`, quantized linears as the five tensors of the format."""
    block, prefix = spec.blocks[i], spec.prefix.format(i=i)
    yield from ((prefix + name, np.asarray(p[role])) for role, name in block.arrays)
    for slot, name in block.norms:
        if name is not None:
            yield from _write(p[slot], prefix + name, zeros, block.copies(slot))
    together = {role for whole in _still_fused(block, p) for role in whole.roles}
    for whole in _still_fused(block, p):
        yield prefix + whole.name, fused.join(whole, {role: p[role][whole.leaf] for role in whole.roles})
    for linear in block.linears:
        if linear.role not in together:
            copies, transposed = block.copies(linear.role), linear.stored == "in_out"
            yield from _write(p[linear.role], prefix + linear.name, zeros, copies, transposed=transposed)


def under_way(p: Mapping[str, Any], zeros: Zeros) -> dict[str, Any]:
    """A block for `write_block`, to be called before a device has other work: what it holds becomes words there and is sent off.

    Whoever writes then does not wait until the device comes to it between two pieces of that work, and finds arrays that the
    device wrote to the host's memory itself: fetching others holds Python's lock, so that no thread gives a device work meanwhile.
    """
    away = {role: leaf for role, leaf in p.items() if isinstance(leaf, QuantizedLinear) and not on_host(leaf)}
    return {**p, **ON_HOST.put(words(away, zeros))}


def dense_shapes(
    shapes: Mapping[str, tuple[int, ...]], spec: ModelSpec, described: Mapping[str, Any] | None = None
) -> dict[str, tuple[int, ...]]:
    """The shapes as they were before quantizing and fusing: a weight for each qweight and its companions, and each expert.

    Where there is no g_idx to tell the number of inputs, `described`, the quantization config, tells the bits.
    """
    heads = {name: False for role, name in spec.tensors if role == "head" and name is not None}
    blocks = ((i, linear) for i, block in enumerate(spec.blocks) for linear in block.linears)
    linears = heads | {name: linear.stored == "in_out" for i, linear in blocks for name in spec.names_of(i, linear)}
    found = dict(shapes)
    for name, transposed in linears.items():
        if f"{name}.qweight" in shapes:
            mine = {leaf: shapes[f"{name}.{leaf}"] for leaf in TENSORS if f"{name}.{leaf}" in shapes}
            for leaf in ("qweight", "qzeros", "scales", "g_idx"):
                found.pop(f"{name}.{leaf}", None)
            _, inputs = require_linear(name, mine, scheme_of(name, described or {}) or {})
            out = mine["qweight"][1]
            found[f"{name}.weight"] = (inputs, out) if transposed else (out, inputs)
    for i, block in enumerate(spec.blocks):
        for whole in block.fused:
            shape = found.pop(spec.prefix.format(i=i) + whole.name, ())
            for role in whole.roles if shape else ():
                # a tensor of another number of experts is told by those that are missing or unread
                for name in numbered(spec.name_of(i, block.linear(role)), shape[0]):
                    found[f"{name}.{whole.leaf}"] = fused.part_shape(whole, shape)
    return found


def _linear(tensors: Tensors, name: str, described: Mapping[str, Any] | None, linear: LinearSpec | None = None) -> Any:
    if f"{name}.qweight" in tensors:
        mine = {leaf: tensors[f"{name}.{leaf}"] for leaf in TENSORS if f"{name}.{leaf}" in tensors}
        return from_tensors(mine, name, described or {})
    return _read(tensors, name, transposed=linear is not None and linear.stored == "in_out")


def _read(tensors: Tensors, name: str, *, transposed: bool = False) -> dict[str, Any]:
    weight = _floating(tensors, f"{name}.weight")
    leaf = {"weight": jnp.asarray(weight.T if transposed else weight)}
    return {**leaf, "bias": jnp.asarray(_floating(tensors, f"{name}.bias"))} if f"{name}.bias" in tensors else leaf


def _floating(tensors: Tensors, name: str) -> np.ndarray:
    """A tensor of numbers. Raises ValueError for one of integers, whose scales would be lost: another format, or damage."""
    array = tensors[name]
    if str(array.dtype) not in FLOATS:
        raise ValueError(f"{name} holds {array.dtype}, but {' or '.join(FLOATS)} is expected: another format, or a damaged file.")
    return array


def _stacked(each: list[Any]) -> Any:
    """The leaves with a leading axis. Raises ValueError where experts are quantized in different ways."""
    if len({jax.tree.structure(leaf) for leaf in each}) > 1:
        raise ValueError("The experts of a block are not all quantized, or not to the same bits; one program computes them all.")
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)


def _each(name: str, tensors: Mapping[str, np.ndarray], copies: int | None) -> Iterator[tuple[str, Mapping[str, np.ndarray]]]:
    """Each copy under its name; the tensors themselves where there is one."""
    for n, full in enumerate(numbered(name, copies)):
        yield full, tensors if copies is None else {key: array[n] for key, array in tensors.items()}


def _still_fused(block: BlockSpec, p: Mapping[str, Any]) -> list[Any]:
    """The fused tensors of which no part was quantized."""

    def dense(leaf: Any, key: str) -> bool:
        return isinstance(leaf, Mapping) and key in leaf

    return [whole for whole in block.fused if all(dense(p[role], whole.leaf) for role in whole.roles)]


def _write(leaf: Any, name: str, zeros: Zeros, copies: int | None = None, *, transposed: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    for full, tensors in _each(name, _tensors(leaf, zeros), copies):
        for key, array in tensors.items():
            yield f"{full}.{key}", np.ascontiguousarray(array.T) if transposed and key == "weight" else array


def _tensors(leaf: Any, zeros: Zeros) -> dict[str, np.ndarray]:
    """The tensors of a linear or a norm on the host, with a leading axis where the leaf has one."""
    if isinstance(leaf, QuantizedLinear):
        return to_tensors(leaf, zeros)
    return {key: np.asarray(value) for key, value in leaf.items()}
