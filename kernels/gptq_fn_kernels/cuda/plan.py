"""Which of the kernels multiplies so many rows on which GPU, and what a block of it makes.

On Hopper the kernel that splits inputs over the blocks of a cluster (split.cu) is taken to last as long as its waves of blocks, or as
reading the weight; the one whose blocks make tiles, or share their chunks evenly (stream.cu), as long as a block's chunks and what it
reads of others' sums. The microseconds were fitted on an H100 to products of 32 shapes (kernels/NOTES.md). On other GPUs one kernel
multiplies (multistage.cu), with the fewest rows to a block that hold all.
"""

import re
from dataclasses import dataclass, field
from functools import cache
from math import ceil, sqrt

from gptq_fn_kernels.triton.layout import chunk_of

_SHARED = 232_448
"""Bytes of shared memory that Hopper gives the blocks of a multiprocessor, the reserved KiB of each included."""

_SHARED_ELSEWHERE = {"sm_80": 167_936, "sm_87": 167_936, "sm_90a": 233_472, "sm_100": 233_472, "sm_103": 233_472}
"""The same of GPUs for the kernel that uses none of Hopper's instructions."""

_SHARED_AT_LEAST = 102_400
"""Of all others from sm_80 on."""

_MOST_STAGES = 16

FEWEST = 16
"""Rows up to which a warp's matrix instruction is faster than a warpgroup's, which takes as long for 8 rows as for 64."""

SENT = 64
"""Rows up to which blocks of a cluster send each other their sums; more they fetch."""

PARTS = (1, 2, 3, 4, 5, 6)
"""Blocks of a cluster."""

_CHUNK_READ = 66 / 3.1e6
"""Microseconds in which a chunk of an output comes from memory."""

_MOST_OF_READ = 1.37
"""Of its even share of the rate of memory, how much a multiprocessor can have."""

_PLACED = 0.86
"""Of the multiprocessors, the share that clusters of three blocks and more find free at a time."""

_AGAIN = 1.14
"""Of the time that several waves of blocks need by themselves, how much they take together."""

_MANY = 96
"""Rows from which on blocks may share tiles."""

_MOST_ROWS_ELSEWHERE = 256
"""Without Hopper's instructions the weight is dequantized once for more, and cuBLAS multiplies: about where the matrix units instead of
memory begin to set the time. Not measured."""


@dataclass(frozen=True)
class Block:
    """What a block makes: `rows` rows times 64 * `tiles` * `abreast` outputs."""

    rows: int
    abreast: int
    blocks: int
    """Blocks to a multiprocessor."""
    tiles: int = field(default=1, kw_only=True)
    room: int = field(default=_SHARED, kw_only=True)
    """Bytes of shared memory for the blocks of a multiprocessor."""

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return 64 * self.tiles * self.abreast

    @property
    def turns(self) -> int:
        """Warpgroups that take turns with the chunks."""
        return 2 if self.abreast == 1 else 1

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 128 * self.turns * self.abreast

    def stages(self, bits: int, grid: int) -> int:
        """Chunks under way at a time, as many for each of the warpgroups that take turns; `grid` 16-bit floats for an output of each."""
        room = (self.room // self.blocks - 3072 - self.apart) // self._stage(bits, grid)
        return min(room, _MOST_STAGES) // self.turns * self.turns

    @property
    def apart(self) -> int:
        """Bytes of shared memory beside the ring."""
        return 0

    def shared(self, bits: int, grid: int) -> int:
        """Bytes of dynamic shared memory."""
        return self.stages(bits, grid) * self._stage(bits, grid) + self.apart + 1024

    def _stage(self, bits: int, grid: int) -> int:
        return self.rows * chunk_of(bits) * 2 + self.outputs * (64 + 2 * grid)


@dataclass(frozen=True)
class Tile(Block):
    """The same on Hopper, where warps of their own copy."""

    chunk: float
    """Microseconds that a warpgroup takes for a chunk of inputs, with as many blocks to a multiprocessor as there can be."""

    @property
    def threads(self) -> int:
        """As of `Block`."""
        large = self.rows >= (128 if self.abreast == 3 else 192)
        return 128 * self.turns * self.abreast + (128 if large else 64)

    @property
    def apart(self) -> int:
        """As of `Block`: up to `FEWEST` rows there is room for others' sums beside the ring."""
        return self._sums + 1024 if self.rows <= FEWEST else 0

    def shared(self, bits: int, grid: int) -> int:
        """As of `Block`: with more rows the sums come in the ring's place."""
        return max(super().shared(bits, grid), self._sums + 1024)

    @property
    def _sums(self) -> int:
        """Bytes of sums, of which the blocks of a cluster send each other eight rows of an output at a time, or fetch rows of a pitch."""
        if self.rows > SENT:
            return self.turns * self.rows * (self.outputs + 4) * 4
        shares = self.rows // 8
        return max(parts * -(-shares // parts) for parts in PARTS) * self.turns * 2048 * self.abreast


TILES = (
    Tile(8, 1, 3, 0.724),
    Tile(8, 2, 2, 0.432),
    Tile(16, 1, 2, 0.641),
    Tile(16, 2, 2, 0.583),
    Tile(32, 1, 2, 0.828),
    Tile(32, 2, 2, 0.731),
    Tile(64, 1, 1, 0.694),
    Tile(64, 2, 2, 0.94),
    Tile(96, 1, 1, 0.891),
    Tile(96, 2, 1, 0.695),
    Tile(128, 1, 1, 1.046),
    Tile(128, 2, 1, 0.848),
    Tile(128, 3, 1, 1.306),
    Tile(160, 2, 1, 1.053),
    Tile(192, 2, 1, 1.257),
    Tile(256, 2, 1, 1.641),
)


@dataclass(frozen=True)
class Split:
    """A cluster of so many blocks for each tile."""

    tile: Tile
    parts: int

    def microseconds(self, m: int, n: int, chunks: int, processors: int) -> float:
        """About how long it takes to multiply m rows of so many chunks of inputs with n outputs."""
        tile, blocks = self.tile, ceil(m / self.tile.rows) * ceil(n / self.tile.outputs) * self.parts
        waves = ceil(blocks / (processors * tile.blocks * (_PLACED if self.parts > 2 else 1.0)))
        load = min(ceil(blocks / (processors * waves)), tile.blocks)  # blocks of a multiprocessor at a time
        work = ceil(ceil(chunks / self.parts) / tile.turns) * tile.chunk
        read = load * tile.outputs * chunks / self.parts * processors / _MOST_OF_READ * _CHUNK_READ
        whole = waves * self._ends + max(waves * max(work, read), n * chunks * _CHUNK_READ)
        return 0.7 + (whole if waves == 1 else whole * _AGAIN)

    @property
    def _ends(self) -> float:
        """What adding up the parts takes."""
        if self.tile.rows <= SENT:
            return (0.1023 + 0.0087 * self.tile.rows) * self.parts
        return 0.762 + 0.385 * self.parts


@dataclass(frozen=True)
class Stream:
    """One block a multiprocessor, which makes one tile after the other: all of them whole, or those of the last rounds shared evenly."""

    tile: Tile
    whole: bool

    def blocks(self, m: int, n: int, chunks: int, processors: int) -> int:
        """As many as have something to do."""
        shared = self.shared(m, n, processors)
        return min(processors, shared * chunks if shared else self._tiles(m, n))

    def shared(self, m: int, n: int, processors: int) -> int:
        """Tiles that are shared: the last full round of one for each block and what is left behind it, so that each has one to two."""
        tiles = self._tiles(m, n)
        return 0 if self.whole else tiles - max(tiles // processors - 1, 0) * processors

    def microseconds(self, m: int, n: int, chunks: int, processors: int) -> float:
        """As of `Split`."""
        shared = self.shared(m, n, processors)
        steps = 0.93 * ceil((self._tiles(m, n) - shared) / processors) * chunks
        if not shared:
            return 0.3 + steps * self.tile.chunk
        share = shared * chunks / processors
        return 0.3 + (steps + 1.013 * ceil(share)) * self.tile.chunk + 1.87 * ceil(chunks / share)

    def _tiles(self, m: int, n: int) -> int:
        return ceil(m / self.tile.rows) * ceil(n / self.tile.outputs)


@dataclass(frozen=True)
class Multistage:
    """As many blocks as run at once, between which all chunks of all tiles are shared evenly; for every GPU from sm_80 on."""

    tile: Block

    def blocks(self, m: int, n: int, chunks: int, processors: int) -> int:
        """Of so many multiprocessors, but few enough that reading a tile's sums from others takes no longer than its chunks."""
        units = ceil(m / self.tile.rows) * ceil(n / self.tile.outputs) * chunks
        return min(processors * self.tile.blocks, ceil(units / ceil(sqrt(chunks) / 2)))


Plan = Split | Stream | Multistage

_STREAMED = tuple(tile for tile in TILES if tile.rows >= _MANY and tile.turns == 1)

PLANS: tuple[Split | Stream, ...] = (
    *(Split(tile, parts) for tile in TILES for parts in PARTS if parts > 1 or tile not in _STREAMED),
    *(Stream(tile, whole) for tile in _STREAMED for whole in (True, False)),
)


@cache
def plans_of(arch: str) -> tuple[Plan, ...]:
    """The ways to multiply on GPUs of this architecture; none before sm_80."""
    return PLANS if arch == "sm_90a" else multistages(arch)


@cache
def multistages(arch: str) -> tuple[Multistage, ...]:
    """Those that use none of Hopper's instructions, in order of their rows."""
    if int(re.sub(r"\D", "", arch)) < 80:
        return ()
    room = _SHARED_ELSEWHERE.get(arch, _SHARED_AT_LEAST)
    sizes = ((8, 1, 2), (16, 1, 2), (32, 1, 2), (64, 2, 1))
    return tuple(Multistage(Block(rows, 2, blocks, tiles=tiles, room=room)) for rows, tiles, blocks in sizes)


@cache
def plan_of(m: int, n: int, chunks: int, processors: int, arch: str) -> Plan | None:
    """How to multiply m rows of so many chunks of inputs with n outputs, or None: dequantize once and multiply densely."""
    return _on_hopper(m, n, chunks, processors) if arch == "sm_90a" else _elsewhere(m, arch)


def _elsewhere(m: int, arch: str) -> Plan | None:
    if m > _MOST_ROWS_ELSEWHERE:
        return None
    plans = multistages(arch)
    return next((plan for plan in plans if plan.tile.rows >= m), plans[-1])


def _on_hopper(m: int, n: int, chunks: int, processors: int) -> Plan:
    fewest = min((tile.rows for tile in TILES if tile.rows >= m), default=0)  # more than these were timed from 80 rows on alone
    fitting = [plan for plan in PLANS if plan.tile.rows <= fewest or m > SENT]
    return min(fitting, key=lambda plan: plan.microseconds(m, n, chunks, processors))
