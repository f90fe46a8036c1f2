"""Several processes that share a run: all compute, each on its devices, and what is to be done once is done by one of them."""

import os
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh

from gptq_fn import data_mesh

T = TypeVar("T")


def join(devices: int | Literal["all"]) -> Mesh:
    """The mesh of so many devices of all processes, once this one has joined the others that the environment tells of.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID tell of them, or a cluster that `jax.distributed.initialize`
    detects. Call it before JAX computes anything. Raises ValueError where there are fewer devices, or some of a process would idle.
    """
    told: dict[str, Any] = {
        name: int(os.environ[f"JAX_{name.upper()}"]) for name in ("num_processes", "process_id") if f"JAX_{name.upper()}" in os.environ
    }
    try:
        jax.distributed.initialize(**told)
    except (ValueError, RuntimeError):  # there are no others, or JAX is at work already
        if told or "JAX_COORDINATOR_ADDRESS" in os.environ:
            raise
    found = jax.devices()
    wanted = len(found) if devices == "all" else devices
    if not 0 < wanted <= len(found):
        there = "is one device" if len(found) == 1 else f"are {len(found)} devices; ask for 1 to {len(found)} of them, or for all"
        raise ValueError(f"--mesh {devices}: there {there}.")
    mesh = data_mesh(found[:wanted])
    if len({device.process_index for device in found[:wanted]}) < jax.process_count():
        raise ValueError(f"--mesh {devices} leaves some of the {jax.process_count()} processes without a device; start fewer of them.")
    return mesh


def first() -> bool:
    """Whether this process does what is to be done once."""
    return jax.process_index() == 0


def mine(i: int) -> bool:
    """Whether this process writes block `i`."""
    return i % jax.process_count() == jax.process_index()


def meet() -> None:
    """Wait until all processes are here."""
    by_first(lambda: None)


def by_first(task: Callable[[], T]) -> T | None:
    """What `task` returns, which the first process runs while the others wait; None in those.

    All processes come here in the same order, with no computation under way in other threads. What the task raises is raised
    there, and OSError by the others.
    """
    if jax.process_count() == 1:
        return task()
    found, error = None, None
    if first():
        try:
            found = task()
        except BaseException as raised:
            error = raised
    failed = bool(broadcast_one_to_all(np.asarray(error is not None)))
    if error is not None:
        raise error
    if failed:
        raise OSError("The first process failed; it tells why.")
    return found
