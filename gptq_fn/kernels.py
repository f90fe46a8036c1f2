"""The door to the kernels: matmuls of torch with quantized weights, packed parameters for `forward` and `generate`, and the
column loop of the solver."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from gptq_fn._grid import Grid
from gptq_fn._quantized import QuantizedLinear
from gptq_fn._solve import RoundBlock, Rounded, round_in_loops
from gptq_fn.model.attention import Asked, Attend, Attended, Cache
from gptq_fn.model.linear import Joined, Linear
from gptq_fn.model.position import turns_of

if TYPE_CHECKING:
    from gptq_fn_kernels import BACKENDS, Backend, Packed, Prepared, Problem, choose, dequantize, explain, matmul, multiply, prepare

__all__ = [
    "BACKENDS",
    "Backend",
    "Packed",
    "Prepared",
    "Problem",
    "choose",
    "dequantize",
    "explain",
    "matmul",
    "multiply",
    "pack",
    "pack_roles",
    "prepare",
    "round_block",
]

JOINED = (("q", "k", "v"), ("gate", "up"))
"""Roles whose linears read one input and can be one product."""

PREFIXES = ("", "shared.", "experts.")
"""What stands before roles of MLPs that are part of a mixture."""


def pack(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with each QuantizedLinear packed to about its bits a weight, ready to be multiplied as it is.

    `forward` and `generate` take them; nothing is dequantized ahead of a product then. On GPUs, where Triton is
    installed, products are Triton kernels, and so is a step's attention, of float models, too; elsewhere they are plain JAX.
    Linears that read one input (q, k and v; gate and up) become one where their grids agree. Checkpoints and Flax modules
    are made of the parameters before packing.
    """
    return {"top": pack_roles(params["top"]), "blocks": [pack_roles(p) for p in params["blocks"]]}


def pack_roles(p: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a block, or those outside the blocks, packed as by `pack`."""
    left, packed = dict(p), {}
    for roles in (tuple(prefix + role for role in roles) for prefix in PREFIXES for roles in JOINED):
        parts = [left.get(role) for role in roles]
        if _agree(parts):
            whole = _packed(_stacked(parts))
            if whole is not None:
                prefix = roles[0][: roles[0].rfind(".") + 1]
                name = prefix + "+".join(role.removeprefix(prefix) for role in roles)
                packed[name] = Joined(whole, tuple(part.codes.shape[-2] for part in parts))
                left = {role: leaf for role, leaf in left.items() if role not in roles}
    forms = {role: _packed(leaf) if isinstance(leaf, QuantizedLinear) else leaf for role, leaf in left.items()}
    return {**{role: left[role] if form is None else form for role, form in forms.items()}, **packed, **_attention(p)}


def _attention(p: Mapping[str, Any]) -> dict[str, Attend]:
    """The kernel for a step's attention, for a block on a GPU that kernels can be launched on."""
    from gptq_fn_kernels import jax as packing

    leaf = next(iter(jax.tree.leaves(p.get("o"))), None)
    return {"attend": AttendByKernel()} if isinstance(leaf, jax.Array) and packing.serves(leaf) else {}


@jax.tree_util.register_static
@dataclass(frozen=True)
class AttendByKernel:
    """One token's attention in one launch of a Triton kernel, on NVIDIA's GPUs."""

    def __call__(self, asked: Asked, plain: Callable[[Asked], Attended]) -> Attended:
        """What `plain` makes of `asked`."""
        return jax.lax.platform_dependent(asked, cuda=_attend, default=plain)


def _attend(asked: Asked) -> Attended:
    from gptq_fn_kernels.jax import attend

    rope, cache = asked.rope, asked.cache
    assert cache is not None
    # XLA sees that these follow each other in one product, and copies nothing.
    qkv = jnp.concatenate([heads.reshape(*heads.shape[:2], -1) for heads in (asked.q, asked.k, asked.v)], -1)[:, 0]
    cos, sin = (None, None) if rope is None else (turn[:, 0] for turn in turns_of(rope, asked.positions))
    options = {"scale": asked.scale, "window": asked.window, "softcap": asked.softcap, "bias": asked.bias, "sinks": asked.sinks}
    mixed, k, v = attend(
        qkv,
        cache.k,
        cache.v,
        cache.used,
        None if cos is None or sin is None else (cos, sin),
        heads=asked.q.shape[2],
        interleaved=rope is not None and rope.interleaved,
        **options,
    )
    return mixed[:, None], Cache(k, v, cache.used + 1)


def _agree(parts: list[Any]) -> TypeGuard[list[QuantizedLinear]]:
    """Whether these leaves are QuantizedLinears with the same bits and groups."""
    first, *others = parts
    return all(isinstance(part, QuantizedLinear) for part in parts) and all(
        part.bits == first.bits
        and part.codes.shape[-1] == first.codes.shape[-1]
        and part.scale.dtype == first.scale.dtype
        and np.array_equal(part.group_of, first.group_of)
        for part in others
    )


def _stacked(parts: list[QuantizedLinear]) -> QuantizedLinear:
    """The linears as one, their outputs behind each other; where one has a bias, those without have zeros."""
    codes, scale, zero = (jnp.concatenate([getattr(part, leaf) for part in parts], -2) for leaf in ("codes", "scale", "zero"))
    biases = [part.bias for part in parts]
    dtype = next((bias.dtype for bias in biases if bias is not None), None)
    shapes = [part.codes.shape[:-1] for part in parts]
    bias = None
    if dtype is not None:
        each = [jnp.zeros(shape, dtype) if b is None else b.astype(dtype) for b, shape in zip(biases, shapes, strict=True)]
        bias = jnp.concatenate(each, -1)
    return QuantizedLinear(codes, scale, zero, parts[0].group_of, parts[0].bits, bias)


def _packed(q: QuantizedLinear) -> Linear | None:
    """The linear packed; None for experts that would not be alike."""
    from gptq_fn_kernels import jax as packing

    if q.codes.ndim == 2:
        return packing.pack(q.codes, q.scale, q.zero, q.group_of, q.bits, q.bias)
    each = [_packed(jax.tree.map(lambda a: a[n], q)) for n in range(len(q.codes))]  # noqa: B023 - called at once
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *each) if len({jax.tree.structure(one) for one in each}) == 1 else None


def round_block() -> RoundBlock:
    """What rounds a block of columns fastest on JAX's default device: a Triton kernel on NVIDIA GPUs, plain loops elsewhere."""
    if jax.default_backend() != "gpu":
        return round_in_loops
    from gptq_fn_kernels.jax import missing

    return _round_by_kernel if missing() is None else round_in_loops


def _round_by_kernel(w: jax.Array, upper: jax.Array, grid: Grid, bits: int) -> Rounded:
    """`round_in_loops` by one launch, where the block fits the registers of a program and the device is NVIDIA's."""
    from gptq_fn_kernels.jax import SMALLEST, WIDEST, round_columns

    if not SMALLEST <= len(w) <= WIDEST:
        return round_in_loops(w, upper, grid, bits)

    def by_kernel(w: jax.Array, upper: jax.Array, scale: jax.Array, zero: jax.Array) -> Rounded:
        return round_columns(w, upper, scale, zero, bits)

    def in_loops(w: jax.Array, upper: jax.Array, scale: jax.Array, zero: jax.Array) -> Rounded:
        return round_in_loops(w, upper, Grid(scale, zero), bits)

    return jax.lax.platform_dependent(w, upper, *grid, cuda=by_kernel, default=in_loops)


def __getattr__(name: str) -> Any:
    """What needs torch is imported when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"gptq_fn.kernels has no {name}.")
    return getattr(import_module("gptq_fn_kernels"), name)
