"""Which of the kernels multiplies so many rows on which GPU, and what a block of it makes.

On Hopper the kernel that splits inputs over the blocks of a cluster (split.cu) is taken to last as long as its waves of blocks, the
one whose blocks make tiles, or share their chunks evenly (stream.cu), as long as a block's chunks and what it reads of others' sums.
The microseconds were fitted on an H100 (kernels/NOTES.md) to 1080 products of up to 64 rows and to 177 of 96 to 8192; what is chosen
by them took 1.2 and .3 % more than the best, where it was timed. On other GPUs one kernel multiplies (multistage.cu), with the fewest
rows to a block that hold all.
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

_MANY = 96
"""Rows of which a block may have fewer than there are, and from which on blocks share tiles."""

_MOST_ROWS_ELSEWHERE = 256
"""Without Hopper's instructions the weight is dequantized once for more, and cuBLAS multiplies: about where the matrix units instead of
memory begin to set the time. Not measured."""


@dataclass(frozen=True)
class Block:
    """What a block makes: `rows` rows times 64 * `tiles` * `abreast` outputs."""

    rows: int
    tiles: int
    abreast: int
    blocks: int
    """Blocks to a multiprocessor."""
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
        large = self.rows * self.tiles >= (128 if self.abreast == 3 else 192)
        return 128 * self.turns * self.abreast + (128 if large else 32)

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
        shares = self.tiles * self.rows // 8
        return max(parts * -(-shares // parts) for parts in PARTS) * self.turns * 2048 * self.abreast


TILES = (
    Tile(8, 1, 1, 3, 0.97),
    Tile(8, 1, 2, 2, 0.63),
    Tile(8, 1, 2, 3, 0.71),
    Tile(16, 1, 1, 2, 0.68),
    Tile(16, 1, 2, 2, 0.59),
    Tile(32, 1, 1, 2, 1.05),
    Tile(32, 1, 2, 2, 0.87),
    Tile(64, 1, 1, 1, 0.59),
    Tile(64, 1, 2, 2, 0.61),
    Tile(96, 1, 1, 1, 0.95),
    Tile(96, 1, 2, 1, 0.70),
    Tile(128, 1, 1, 1, 1.07),
    Tile(128, 1, 2, 1, 0.82),
    Tile(128, 1, 3, 1, 1.24),
    Tile(128, 2, 1, 1, 1.75),
    Tile(128, 2, 2, 1, 1.69),
    Tile(160, 1, 1, 1, 1.39),
    Tile(160, 1, 2, 1, 1.01),
    Tile(192, 1, 1, 1, 1.52),
    Tile(192, 1, 2, 1, 1.22),
    Tile(256, 1, 2, 1, 1.62),
)


@dataclass(frozen=True)
class Split:
    """A cluster of so many blocks for each tile."""

    tile: Tile
    parts: int

    def microseconds(self, m: int, n: int, chunks: int, processors: int) -> float:
        """About how long it takes to multiply m rows of so many chunks of inputs with n outputs."""
        blocks = ceil(m / self.tile.rows) * ceil(n / self.tile.outputs) * self.parts
        waves = ceil(blocks / (processors * self.tile.blocks * self._placed))
        steps = ceil(ceil(chunks / self.parts) / self.tile.turns)
        slower = 1.09 if waves > 2 and self.tile.rows <= SENT else 1.0  # a GPU that is busy for long takes its clock back
        work = max(slower * waves * steps * self.tile.chunk, n * chunks * _CHUNK_READ)
        return 0.7 + slower * waves * self._ends + work

    @property
    def _placed(self) -> float:
        """Of the places for blocks, the share that clusters take: those of three and more leave some of a GPU's parts without work."""
        if self.parts <= 2:
            return 1.0
        if self.tile.rows > SENT:
            return 0.85
        return 0.87 if self.parts <= 4 else 0.78

    @property
    def _ends(self) -> float:
        """What adding up the parts takes."""
        if self.tile.rows <= SENT:
            return (0.233 + 0.0078 * self.tile.rows) * self.parts
        return 3.2 + 0.77 * self.parts


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
            return 2.94 + steps * self.tile.chunk
        share = shared * chunks / processors
        return 2.94 + (steps + 0.98 * ceil(share)) * self.tile.chunk + 1.92 * ceil(chunks / share)

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
    return tuple(Multistage(Block(rows, tiles, 2, blocks, room=room)) for rows, tiles, blocks in sizes)


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
    fewest = min((tile.rows for tile in TILES if tile.rows >= m), default=_MANY)
    fitting = [plan for plan in PLANS if plan.tile.rows == fewest or plan.tile.rows >= _MANY <= m]
    return min(fitting, key=lambda plan: plan.microseconds(m, n, chunks, processors))
