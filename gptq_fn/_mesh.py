"""Many devices: what each of them holds, and functions that run on all of them, each on its part."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptq_fn._programs import program

AXIS = "data"
"""The one axis of a run's mesh: over it lie the samples of a batch, then the rows of a weight, then the experts of a block."""

WHOLE, PARTS = P(), P(AXIS)
"""Each device holds the whole array, or its part of the leading axis."""


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh for `Runtime(mesh=...)`: these devices, or all of all processes."""
    return Mesh(np.asarray(jax.devices() if devices is None else devices), (AXIS,), axis_types=(AxisType.Auto,))


def require_data_mesh(mesh: Mesh) -> None:
    """Raise ValueError for a mesh that is not like those of `data_mesh`."""
    if mesh.axis_names != (AXIS,) or mesh.axis_types != (AxisType.Auto,):
        raise ValueError(f"A run's mesh has one axis, {AXIS!r}, of type Auto, as gptq_fn.data_mesh() makes it; got {mesh}.")


def size(mesh: Mesh | None) -> int:
    """The number of devices."""
    return 1 if mesh is None else mesh.size


def split(f: Callable[..., Any], mesh: Mesh | None, parts_in: Any, parts_out: Any) -> Callable[..., Any]:
    """`f` run by each device on what it holds of the arguments, by specs of arguments and results; without a mesh, `f`.

    So each device runs the program that a single one runs, custom kernels included. What is WHOLE in `parts_out` has to be
    the same on all devices, as what `together` returns is.
    """
    if mesh is None:
        return f
    return jax.shard_map(f, mesh=mesh, in_specs=parts_in, out_specs=parts_out, check_vma=False)


def part(a: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Inside `split`: this device's part of the leading axis of `a`, which is filled up with zeros so that all parts are alike."""
    if mesh is None:
        return a
    mine = -(-len(a) // mesh.size)
    full = jnp.pad(a, ((0, mine * mesh.size - len(a)), *((0, 0) for _ in a.shape[1:])))
    return jax.lax.dynamic_slice_in_dim(full, jax.lax.axis_index(AXIS) * mine, mine)


def together(parts: Any, mesh: Mesh | None) -> Any:
    """Inside `split`: the whole arrays, of which each device computed its part of the leading axis."""
    return parts if mesh is None else jax.tree.map(lambda a: jax.lax.all_gather(a, AXIS, axis=0, tiled=True), parts)


def zeros(like: Callable[[], Any], mesh: Mesh | None) -> Any:
    """The zeros that `like` returns, to which each device adds on its own: with a mesh, along a leading axis of devices."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(like))
    return tree.unflatten(_zeros(tuple((a.shape, a.dtype) for a in leaves), mesh))


@partial(program, static_argnames=("kinds", "mesh"))
def _zeros(kinds: Sequence[tuple[tuple[int, ...], Any]], mesh: Mesh | None) -> list[jax.Array]:
    def here() -> list[jax.Array]:
        return [jnp.zeros(shape if mesh is None else (1, *shape), dtype) for shape, dtype in kinds]

    return split(here, mesh, (), PARTS)()


def adding(f: Callable[..., tuple[Any, Any]], mesh: Mesh | None, parts_in: tuple[P, ...]) -> Callable[..., tuple[Any, Any]]:
    """`f(sums, *arguments) -> (sums, PARTS)` run by each device on its own sums."""

    def here(sums: Any, *arguments: Any) -> tuple[Any, Any]:
        sums, more = f(jax.tree.map(lambda a: a[0], sums), *arguments)
        return jax.tree.map(lambda a: a[None], sums), more

    return f if mesh is None else split(here, mesh, (PARTS, *parts_in), PARTS)


def added(sums: Any, mesh: Mesh | None, parts: P = WHOLE) -> Any:
    """The sums of all devices: whole on each, or each with its part of the leading axis."""
    return sums if mesh is None else _added(sums, mesh, parts)


@partial(program, static_argnames=("mesh", "parts"))
def _added(sums: Any, mesh: Mesh, parts: P) -> Any:
    def one(a: jax.Array) -> jax.Array:
        return jax.lax.psum(a[0], AXIS) if parts == WHOLE else jax.lax.psum_scatter(a[0], AXIS, tiled=True)

    return split(partial(jax.tree.map, one), mesh, PARTS, parts)(sums)


def gathered(parts: Any, mesh: Mesh | None) -> Any:
    """The whole arrays, of which each device has its part of the leading axis, on all of them, where every process can read them."""
    return parts if mesh is None else _gathered(parts, mesh)


@partial(program, static_argnames="mesh")
def _gathered(parts: Any, mesh: Mesh) -> Any:
    return split(partial(together, mesh=mesh), mesh, (PARTS,), WHOLE)(parts)


def local(arrays: Any, mesh: Mesh | None) -> Any:
    """These arrays, of which each device has the whole, as this process's first device has them."""
    return arrays if mesh is None else jax.tree.map(lambda a: a.addressable_data(0), arrays)


def placed(arrays: Any, mesh: Mesh | None, parts: P) -> Any:
    """These arrays on the devices of the mesh; every process has all of them. Without a mesh, as they are."""
    if mesh is None:
        return arrays
    sharding = NamedSharding(mesh, parts)

    def place(a: Any) -> jax.Array:
        if isinstance(a, jax.Array) and a.sharding == sharding:
            return a
        mine = sharding.addressable_devices_indices_map(a.shape)
        each = [jax.device_put(a if parts == WHOLE else a[part], device) for device, part in mine.items()]
        return jax.make_array_from_single_device_arrays(a.shape, sharding, each)

    return jax.tree.map(place, arrays)
