"""Launches of compiled kernels."""

from collections.abc import Sequence

import numpy as np

from ptx.gpu import SHARED_FROM, Grid, Memory, Step
from ptx.instructions import compiled
from ptx.program import Instruction, Program, parse
from ptx.tiles import Map


def code_of(program: Program) -> list[Step]:
    """What the program's instructions do."""
    steps: list[Step] = []
    for each in program.instructions:
        target = program.labels[each.operands[0]] if each.op.startswith("bra") else None
        execute = None if target is not None or each.op == "ret" else compiled(each, program)
        steps.append((each, execute, target, ".aligned" in each.op or each.op.startswith(("bar.", "elect.", "shfl."))))
    return [*steps, (Instruction("ret", "", False, "ret", ()), None, None, False)]


class Kernel:
    """A kernel of PTX, ready to be launched."""

    def __init__(self, ptx: str) -> None:
        self.program = parse(ptx, SHARED_FROM)
        self.code = code_of(self.program)

    def launch(
        self,
        values: Sequence[int | Map],
        memory: Memory,
        *,
        grid: tuple[int, int, int],
        threads: int,
        cluster: tuple[int, int, int] = (1, 1, 1),
        shared: int = 0,
        seed: int = 0,
        resident: int = 8,
    ) -> None:
        """With these arguments and so many bytes of dynamic shared memory; the seed draws the order. Raises `Fault`."""
        Grid(self.program, self.code, grid, threads, cluster, shared, values, memory, np.random.default_rng(seed), resident).run()
