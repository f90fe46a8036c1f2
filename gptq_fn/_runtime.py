"""With what a model is quantized: what changes the time and memory of a run and, beyond float rounding, not its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from gptq_fn._hessian import Hessian
from gptq_fn._mesh import require_data_mesh
from gptq_fn._solve import RoundBlock, round_in_loops


class Store(NamedTuple):
    """Where activations wait between the steps of a block: `get(put(arrays))` are the arrays, on the devices they came from."""

    put: Callable[[Any], Any]
    get: Callable[[Any], Any]


def _as_it_is(arrays: Any) -> Any:
    return arrays


ON_DEVICE = Store(_as_it_is, _as_it_is)
"""Activations stay where they are computed."""


def _moved(kind: str, arrays: Any) -> Any:
    return jax.device_put(arrays, jax.tree.map(lambda a: a.sharding.with_memory_kind(kind), arrays))


def _to_host(arrays: Any) -> Any:
    return _moved("pinned_host", arrays)


def _to_device(arrays: Any) -> Any:
    return _moved("device", arrays)


ON_HOST = Store(_to_host, _to_device)
"""Activations wait in pinned memory of the host, which a device reads and writes directly."""


@dataclass(frozen=True)
class Runtime:
    """The means of a run. Hashable: parts of it are keys of compiled programs."""

    store: Store = ON_DEVICE
    """Where activations wait between the steps of a block."""
    observe: Callable[[Sequence[str], Hessian], None] | None = None
    """Called with every Hessian and the names of the linears that are solved from it, before they are."""
    round_block: RoundBlock = round_in_loops
    """Rounds a block of columns of the weights that are solved: a function (weights [columns, out], the factor's square on these
    columns [columns, columns], their `Grid` of [1, out] or [columns, out], bits) -> (codes uint8 [columns, out], rounding errors divided by
    the factor's diagonal [columns, out]). By default plain JAX; `gptq_fn.kernels.round_block()` is this machine's fastest."""
    tokens_per_call: int | None = None
    """Calibration tokens that pass through a block at once on each device; None means 2048 on CPUs and 16384 elsewhere.
    A sample is never cut.

    It changes results by float rounding only, which codes amplify: one that flips at a tie changes what all later linears see. In
    a random model of four blocks of width 256, 64 tokens instead of 2048 changed no code of the first block in float32 and 2 % in
    bfloat16, up to 9 % of those of later blocks, and the error of no linear by more than 0.33 %. So do more devices."""
    mesh: Mesh | None = None
    """The devices that share the work, as `data_mesh` makes it, of one process or of several that all do the same; None means
    JAX's default device. Samples, rows of weights and experts are divided among them."""

    def __post_init__(self) -> None:
        """Raise ValueError for a mesh of another kind."""
        if self.mesh is not None:
            require_data_mesh(self.mesh)

    @property
    def tokens(self) -> int:
        """How many calibration tokens pass through a block at once on each device."""
        return self.tokens_per_call or (2048 if jax.default_backend() == "cpu" else 16384)
