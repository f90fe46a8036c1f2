"""A model as a Flax NNX module: its state is the tensors of a checkpoint, packed; calling it is the same forward."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from gptq_fn_kernels.words import pack, unpack
from jaxtyping import Array, Float, Int

from gptq_fn import ModelSpec, Quantized, QuantizedLinear, block
from gptq_fn.model.decoder import Params, embed, unembed
from gptq_fn_interop.params import require_unpacked

try:
    from flax import nnx
except ModuleNotFoundError:
    raise ImportError("to_flax and from_flax need Flax, which is not installed: pip install 'flax>=0.12'.") from None


class Packed(nnx.Variable):
    """A tensor of a quantized linear. It is no nnx.Param, so that training leaves it alone unless it is asked for."""


class Model(nnx.Module):
    """A language model. Variables lie under "weights" by role: ["blocks"]["0"]["q"]["qweight"].

    Those of quantized linears are Packed, all others nnx.Param. `spec` and `layout`, the structure of the parameters,
    are static.
    """

    def __init__(self, params: Params, spec: ModelSpec):
        """The model with these parameters, which it shares where they are not quantized. Raises ValueError if they are packed."""
        require_unpacked(params)
        packed = jax.tree.map(lambda p: _pack(p) if isinstance(p, QuantizedLinear) else p, dict(params), is_leaf=_is_quantized)
        self.spec, self.layout, self.weights = spec, jax.tree.structure(packed), nnx.Dict()
        for path, array in _paths(packed):
            place = self.weights
            for name in path[:-1]:
                place[name] = place[name] if name in place else nnx.Dict()
                place = place[name]
            place[path[-1]] = (Packed if path[-1] in PACKED else nnx.Param)(array)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocab"]:
        """The logits of each token, as `gptq_fn.forward` computes them; one block at a time is unpacked."""
        packed, shell = self.packed(), replace(self.spec, blocks=())
        x = _embed(shell, packed["top"], tokens)
        for spec, p in zip(self.spec.blocks, packed["blocks"], strict=True):
            x = _block(spec, p, x)
        return _unembed(shell, packed["top"], x)

    def packed(self) -> dict[str, Any]:
        """The parameters as arrays, with Words where linears are quantized."""
        found = []
        for path, _ in _paths(jax.tree.unflatten(self.layout, range(self.layout.num_leaves))):
            place = self.weights
            for name in path:
                place = place[name]
            found.append(place[...])
        return jax.tree.unflatten(self.layout, found)


def to_flax(model: Quantized | tuple[Params, ModelSpec]) -> Model:
    """The model of `gptq_fn.quantize`, or of (params, spec) as `load_gptq` and `from_hf` give them."""
    params, spec, *_ = model
    return Model(params, spec)


def from_flax(model: Model) -> tuple[dict[str, Any], ModelSpec]:
    """(params, spec) of the module, with the bits that `to_flax` was given where nothing was trained."""
    return _unpacked(model.packed()), model.spec


PACKED = ("qweight", "qzeros", "scales", "g_idx")


@partial(jax.tree_util.register_dataclass, data_fields=[*PACKED, "bias"], meta_fields=["bits"])
@dataclass(frozen=True)
class Words:
    """A quantized linear as it lies in a gptq_v2 checkpoint (see gptq_format); experts have a leading axis."""

    qweight: Int[Array, "words out"]
    qzeros: Int[Array, "groups words"]
    scales: Float[Array, "groups out"]
    g_idx: Int[Array, " in"]
    bits: int
    bias: Float[Array, " out"] | None = None


@jax.jit
def _pack(q: QuantizedLinear) -> Words:
    def words(codes: Array) -> Array:
        return pack(codes.astype(jnp.int32), q.bits, jnp)

    if q.codes.ndim > 2:
        return jax.vmap(_pack)(q)
    return Words(words(q.codes.T), words(q.zero).T, q.scale.T, q.group_of, q.bits, q.bias)


@jax.jit
def _unpack(w: Words) -> QuantizedLinear:
    def codes(words: Array, count: int) -> Array:
        return unpack(words, w.bits, count, jnp).astype(jnp.uint8)

    if w.qweight.ndim > 2:
        return jax.vmap(_unpack)(w)
    (_, out), inputs = w.scales.shape, len(w.g_idx)
    return QuantizedLinear(codes(w.qweight, inputs).T, w.scales.T, codes(w.qzeros.T, out), w.g_idx, w.bits, w.bias)


def _is_quantized(p: object) -> bool:
    return isinstance(p, QuantizedLinear)


def _unpacked(packed: Mapping[str, Any]) -> Any:
    return jax.tree.map(lambda p: _unpack(p) if isinstance(p, Words) else p, packed, is_leaf=lambda p: isinstance(p, Words))


def _paths(tree: Any) -> list[tuple[list[str], Any]]:
    found = jax.tree.leaves_with_path(tree)
    return [([jax.tree_util.keystr((entry,), simple=True) for entry in path], leaf) for path, leaf in found]


@partial(jax.jit, static_argnames="spec")
def _embed(spec: ModelSpec, top: Any, tokens: Array) -> Array:
    return embed(spec, _unpacked(top), tokens)


@partial(jax.jit, static_argnames="spec")
def _block(spec: Any, p: Any, x: Array) -> Array:
    return block(spec, _unpacked(p), x)[0]


@partial(jax.jit, static_argnames="spec")
def _unembed(spec: ModelSpec, top: Any, x: Array) -> Array:
    return unembed(spec, _unpacked(top), x)
