"""Warps, blocks and clusters, and the order in which they run: any."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

import numpy as np

from ptx.program import PARAMETER, PARAMETERS, Instruction, Program
from ptx.tiles import Map

ALL = np.ones(32, bool)
SHARED_FROM = 1024
"""The first address of a block's shared memory that is its own."""
PEER = 24
"""An address in the shared memory of a block of the cluster has the block's rank + 1 from this bit on."""

Execute = Callable[["Warp", np.ndarray], str | None]
"""What an instruction does to the lanes of a warp that are active, and what it says."""
Step = tuple[Instruction, Execute | None, int | None, bool]
"""An instruction with what it does, or with where it goes, and whether the lanes of a warp do it together; one that does nothing ends."""

WAITS, YIELDS = "waits", "yields"
"""What an instruction says that is to be tried again, or that is done but lets others run."""


class Fault(AssertionError):
    """A kernel did what a GPU would not forgive."""


class Memory:
    """Global memory: the buffers that there are, each with a name."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, str, np.ndarray]] = []

    def add(self, name: str, address: int, room: np.ndarray) -> None:
        """`room` is uint8 [size] at this address."""
        self._buffers.append((address, name, room))

    def at(self, addresses: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The buffer in which these addresses have `size` bytes each, and where. Raises Fault where none has."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for address, _, room in self._buffers:
            if address <= low and high <= address + len(room):
                return room, addresses.astype(np.int64) - address
        names = ", ".join(f"{name} at {address:#x} of {len(room)} bytes" for address, name, room in self._buffers)
        raise Fault(f"nothing lies from {low:#x} to {high:#x}; there are {names}")


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def arrive(self, count: int = 1, expected: int = 0) -> None:
        self.pending -= count
        if self.pending < 0:
            raise Fault("more arrive at a barrier than it counts")
        self.come(-expected)

    def come(self, size: int) -> None:
        self.bytes -= size
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def ended(self, parity: int) -> bool:
        return self.phase % 2 != parity


@dataclass(eq=False)
class Block:
    """A block with its shared memory, of a cluster."""

    place: tuple[int, int, int]
    rank: int
    cluster: "Cluster"
    shared: np.ndarray
    warps: "list[Warp]" = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)
    named: dict[int, list[int]] = field(default_factory=dict)
    """For each barrier of `bar.sync`, threads that have arrived, and how often all had."""

    def barrier(self, address: int) -> Barrier:
        """The mbarrier at this address. Raises Fault where none has been made."""
        if address not in self.barriers:
            raise Fault(f"there is no barrier at {address}")
        return self.barriers[address]

    def peer(self, address: int) -> "tuple[Block, int]":
        """The block that an address of the cluster's shared memory means, and the address there."""
        if not address >> PEER:
            return self, address
        found = self.cluster.blocks[(address >> PEER) - 1]
        found.last()
        return found, address & (1 << PEER) - 1

    def last(self) -> None:
        """Raises Fault where the block has ended, whose shared memory is gone with it."""
        if all(warp.done for warp in self.warps):
            raise Fault(f"block {self.place} has ended, and its shared memory is used")


@dataclass(eq=False)
class Cluster:
    """Blocks that see each other's shared memory."""

    blocks: list[Block]
    arrived: "set[Warp]" = field(default_factory=set)
    phase: int = 0

    def settle(self) -> None:
        """Ends the phase of its barrier when all warps that there still are have arrived."""
        if all(warp in self.arrived or warp.done for block in self.blocks for warp in block.warps):
            self.arrived.clear()
            self.phase += 1


class Warp:
    """32 lanes. Those at the lowest place in the program go on until they meet others."""

    def __init__(self, grid: "Grid", block: Block, index: int) -> None:
        self.grid, self.block, self.index = grid, block, index
        self.registers: dict[str, np.ndarray] = {}
        self.live, self.groups = ALL.copy(), [[0, ALL.copy(), False]]  # where, who, whether they wait for the others
        self.waiting: int | None = None
        """Which phase of a barrier of the block has to end."""
        self.arrived: int | None = None
        """Which of the cluster's."""
        self.copies: list[list[list[bool]]] = [[] for _ in range(32)]
        """Of each lane, groups of bulk copies from shared memory: what of them has been read."""
        self.open: list[list[bool]] = [[] for _ in range(32)]
        """Of each lane, those of no group yet."""
        self.loads: list[list[Callable[[], None]]] = [[]]
        """Groups of `cp.async`, the last one still open."""
        self.idle = -1
        """How many events there had been when it waited last."""
        self.products: list[list[Callable[[], None]]] = [[]]
        """Groups of `wgmma`: what looks whether their operands still are what they were."""

    @property
    def done(self) -> bool:
        return not self.groups

    def run(self, steps: int) -> str | None:
        """At most so many instructions: what the last said."""
        ran, code = 0, self.grid.code
        while self.groups and ran < steps:
            group, limit = self._front()
            at, mask, _ = group
            whole = bool((mask == self.live).all())
            while ran < steps and at < limit:
                instruction, execute, target, together = code[at]
                active = mask
                if instruction.guard:
                    guard = self.registers[instruction.guard]
                    active = mask & (~guard if instruction.unless else guard)
                ran += 1
                if target is not None or execute is None:
                    group[0] = at + 1
                    group[1] = mask & ~active
                    if execute is None and target is None:  # ret
                        self.live &= ~active
                    elif active.any():
                        self.groups.append([target, active, False])
                    break
                if together and not whole:
                    group[0], group[2] = at, True
                    break
                said = execute(self, active) if active.any() else None
                if said == WAITS:
                    group[0] = at
                    return said
                at += 1
                group[0] = at
                if said == YIELDS:
                    return said
            self.groups = [each for each in self.groups if each[1].any()]
        if self.done:
            if not all(read for groups in (*self.copies, self.open) for group in groups for read in group):
                raise Fault(
                    f"warp {self.index} of block {self.block.place} has ended, and its copies from shared memory have not been read"
                )
            self.block.cluster.settle()
            self.grid.events += 1
        return None

    def _front(self) -> tuple[list, float]:
        """The lanes that go on, and where others wait for them."""
        merged: dict[int, list] = {}
        for at, mask, waits in self.groups:
            if at in merged:
                merged[at] = [at, merged[at][1] | mask, False]
            else:
                merged[at] = [at, mask, waits]
        self.groups = [merged[at] for at in sorted(merged)]
        for i, group in enumerate(self.groups):
            if not group[2]:
                return group, min((other[0] for other in self.groups[i + 1 :] if other[0] > group[0]), default=np.inf)
        places = "; ".join(f"lanes {np.flatnonzero(mask).tolist()} at {self.grid.code[at][0].text}" for at, mask, _ in self.groups)
        raise Fault(f"lanes of a warp wait for each other: {places}")

    def put(self, name: str, value: np.ndarray, active: np.ndarray) -> None:
        """Writes a register of the active lanes."""
        if not active.all():
            value = np.where(active, value, self.registers.get(name, np.zeros(32, value.dtype)))
        self.registers[name] = value


@dataclass(eq=False)
class Grid:
    """A launch: `values` are the kernel's arguments, whole numbers or tensor maps."""

    program: Program
    code: Sequence[Step]
    size: tuple[int, int, int]
    threads: int
    cluster: tuple[int, int, int]
    dynamic: int
    """Bytes of dynamic shared memory."""
    values: Sequence[int | Map]
    memory: Memory
    order: np.random.Generator
    resident: int
    """Blocks at a time, or a cluster where that has more."""
    pending: list[Callable[[], None]] = field(default_factory=list)
    """What TMA and others do later."""
    events: int = 0
    """What has happened that a warp may have waited for."""

    def map_at(self, address: int) -> Map:
        found = self.values[(address - PARAMETERS) // PARAMETER]
        assert isinstance(found, Map)
        return found

    def run(self) -> None:
        """To its end. Raises Fault."""
        waiting, running = self._clusters(), []
        while waiting or running:
            while waiting and (not running or sum(len(each.blocks) for each in (*running, waiting[0])) <= self.resident):
                running.append(waiting.pop(0))
            warps = [warp for each in running for block in each.blocks for warp in block.warps if not warp.done]
            able = [warp for warp in warps if warp.idle != self.events]
            if self.pending and (not able or self.order.random() < 0.2):
                self._later()
            elif able:
                warp = able[int(self.order.integers(len(able)))]
                if warp.run(int(self.order.integers(1, 4000))):
                    warp.idle = self.events
            elif warps:
                raise Fault(f"all wait: {self._told(warps)}")
            running = [each for each in running if not all(warp.done for block in each.blocks for warp in block.warps)]
        while self.pending:
            self._later()

    def _later(self) -> None:
        self.pending.pop(int(self.order.integers(len(self.pending))))()
        self.events += 1

    def _clusters(self) -> list[Cluster]:
        """In the order in which they start."""
        found, size = [], SHARED_FROM + max([*self.program.shared.values(), SHARED_FROM]) + self.dynamic
        for corner in product(*(range(0, of, by) for of, by in zip(reversed(self.size), reversed(self.cluster), strict=True))):
            cluster = Cluster([])
            for rank, within in enumerate(product(*map(range, reversed(self.cluster)))):
                place = tuple(reversed([a + b for a, b in zip(corner, within, strict=True)]))
                block = Block(place, rank, cluster, np.full(size, 0xFF, np.uint8))
                block.warps = [Warp(self, block, i) for i in range(self.threads // 32)]
                cluster.blocks.append(block)
            found.append(cluster)
        return found

    def _told(self, warps: list[Warp]) -> str:
        lines = []
        for warp in warps:
            for at, mask, _ in warp.groups:
                lines.append(f"block {warp.block.place}, warp {warp.index}, {int(mask.sum())} lanes: {self.code[at][0].text}")
        return "\n".join(lines)
