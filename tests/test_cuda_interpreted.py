"""The CUDA kernels without a GPU: what NVRTC makes of them is interpreted, in an order that is drawn, and compared with float64."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gptq_fn_kernels.cuda import backend
from gptq_fn_kernels.cuda import compile as compiler
from gptq_fn_kernels.cuda.plan import PLANS, TILES, Plan, Stream, multistages
from gptq_fn_kernels.triton.layout import chunk_of, unpack_words
from ptx.machine import Machine
from test_triton import relative

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=f"the compiler {compiler.missing()}")

ERRORS = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
"""Of a product that is rounded to them once."""
HOPPER = [plan for plan in PLANS if isinstance(plan, Stream) or plan.parts in (1, 2 + TILES.index(plan.tile) % 5)]
"""Of every tile: one block that has all inputs, a cluster that shares them, and blocks that make whole tiles or share them."""

FEW = next(plan for plan in PLANS if plan.tile.rows == 8 and plan.parts == 3)
MANY = next(plan for plan in PLANS if plan.tile.rows == 128 and plan.parts == 2)
SHARED = next(plan for plan in PLANS if isinstance(plan, Stream) and not plan.whole)
WHOLE = next(plan for plan in PLANS if isinstance(plan, Stream) and plan.whole)


@dataclass(frozen=True)
class Product:
    """Activations [m, k] and a weight [n, k] in the kernels' layout."""

    x: torch.Tensor
    parts: tuple[torch.Tensor, torch.Tensor, None]
    bits: int

    @property
    def weight(self) -> torch.Tensor:
        """float64 [n, slots]."""
        words, grid, _ = self.parts
        codes, (_, n, groups, of_group) = unpack_words(words, None, self.bits, torch.stack).double(), grid.shape
        zeros = grid.view(torch.float16)[..., 1] if of_group == 2 else torch.full(grid.shape[:-1], 2 ** (self.bits - 1))
        scales, zeros = (
            part.double().permute(1, 0, 2).reshape(n, -1).repeat_interleave(chunk_of(self.bits) // groups, 1)
            for part in (grid[..., 0], zeros)
        )
        return (codes - zeros) * scales

    def by(self, plan: Plan, gpu: Machine) -> torch.Tensor:
        """What the plan makes of it."""
        with gpu:
            y = backend.multiply_by(plan, self.x, self.parts, self.bits)
        assert not gpu.flags.any(), "a kernel leaves flags as it finds them"
        return y

    def error(self, y: torch.Tensor) -> float:
        """Relative."""
        return relative(y, self.x.double() @ self.weight[:, : self.x.shape[1]].T)


def drawn(gpu: Machine, m: int, n: int, k: int, seed: int, **given: int) -> Product:
    """Of a kind that the seed draws, unless it is given."""
    draw, torch_draw = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    bits, zeros = given.get("bits") or int(draw.choice((4, 8))), int(draw.integers(2))
    dtype = list(ERRORS)[draw.integers(2)]
    scales = (torch.float16, dtype)[draw.integers(2)]
    chunk = chunk_of(bits)
    chunks, groups = -(-k // chunk), chunk // int(draw.choice((16, 32, 64, chunk)))
    words = torch.randint(-(2**31), 2**31 - 1, (chunks, n, 16), dtype=torch.int32, generator=torch_draw)
    grid = (torch.rand(chunks, n, groups, 1 + zeros, generator=torch_draw) * 0.01 + 0.001).to(scales)
    if zeros:
        grid[..., 1] = torch.randint(0, 2**bits, grid.shape[:-1], generator=torch_draw).half().view(scales)
    x = torch.randn(m, k, generator=torch_draw).to(dtype)
    for name, tensor in (("x", x), ("words", words), ("grid", grid)):
        gpu.add(name, tensor)
    return Product(x, (words, grid, None), bits)


def fitting(plan: Plan, gpu: Machine, seed: int, **given: int) -> Product:
    """With about as many rows as the plan's tile has, and some tiles of outputs."""
    draw = np.random.default_rng(seed)
    tile, gpu.seed, gpu.resident, gpu.processors = plan.tile, seed, int(draw.integers(1, 10)), int(draw.integers(1, 5))
    m = int(draw.choice((max(1, tile.rows - 5), tile.rows, tile.rows + 3)))
    return drawn(gpu, m, 8 * int(draw.integers(1, tile.outputs // 4)), 8 * int(draw.integers(2, 70)), seed, **given)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, "sm_90a", processors=3)


@pytest.mark.parametrize(("seed", "plan"), list(enumerate(HOPPER)), ids=str)
def test_products_on_hopper(seed: int, plan: Plan, gpu: Machine) -> None:
    product = fitting(plan, gpu, seed)
    assert product.error(product.by(plan, gpu)) < ERRORS[product.x.dtype]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_120"])
def test_products_elsewhere(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Machine(monkeypatch, arch, processors=3)
    for seed, plan in enumerate(multistages(arch)):
        product = fitting(plan, gpu, seed)
        assert product.error(product.by(plan, gpu)) < ERRORS[product.x.dtype]


@pytest.mark.parametrize("plan", [FEW, MANY, SHARED], ids=str)
def test_any_order_gives_the_same_bits(plan: Plan, gpu: Machine) -> None:
    product, found = fitting(plan, gpu, 1), []
    for gpu.seed, gpu.resident in ((1, 1), (2, 3), (3, 16)):
        found.append(product.by(plan, gpu))
    assert all(torch.equal(found[0], y) for y in found)


@pytest.mark.parametrize("seed", range(4))
def test_the_weight_itself(seed: int, gpu: Machine) -> None:
    product = drawn(gpu, 1, 8 * (1 + 3 * seed), 8 * (3 + 17 * seed), seed)
    with gpu:
        weight = backend._dequantized(product.x, product.parts, product.bits)
    assert relative(weight, product.weight) < ERRORS[product.x.dtype]


def test_slots_without_an_input_are_zero(gpu: Machine) -> None:
    x, gather = torch.randn(3, 500).half(), torch.randint(0, 501, (4224,), dtype=torch.int32)
    for name, tensor in (("x", x), ("gather", gather)):
        gpu.add(name, tensor)
    with gpu:
        y = backend._gathered(x, gather)
    assert torch.equal(y, torch.cat([x, torch.zeros(3, 1, dtype=x.dtype)], 1)[:, gather.long()])


# That the interpreter sees what is wrong

RAISED = "if (threadIdx.x % 128 == 0) wait_raised(flags + block * ABREAST + group);"
EMPTY, ALONE = "        wait_empty(i);\n", "        if (!elected()) return;\n"

FAULTS = {
    "reads what has not come": (FEW, "by_warp.cuh", "    ring.wait_full(i);\n", ""),
    "writes over weights that are read": (MANY, "hopper.cuh", f"{EMPTY}{ALONE}        expect(", f"{ALONE}        expect("),
    "writes over inputs that are read": (MANY, "hopper.cuh", f"{EMPTY}{ALONE}        for (", f"{ALONE}        for ("),
    "releases what it is about to read": (FEW, "by_warp.cuh", "ring.release(before)", "ring.release(i)"),
    "releases what the matrix units read": (MANY, "by_warpgroup.cuh", "        wgmma_wait<1>();\n", ""),
    "adds up what has not been sent": (FEW, "sent.cuh", "    wait(barrier, 0);\n", ""),
    "ends while others read its sums": (MANY, "fetched.cuh", "arrive_in_cluster();", ""),
    "adds up what has not been left": (SHARED, "stream.cu", RAISED, ""),
    "writes over a tile that leaves": (
        WHOLE,
        "stream.cu",
        "        if (place < 0) return;\n        wait();\n",
        "        if (place < 0) return;\n",
    ),
    "ends before its last tile has left": (SHARED, "stream.cu", "        leaving.wait();\n", ""),
    "waits for bytes that nobody sends": (FEW, "sent.cuh", "(me.holders() - 1) * lanes", "me.holders() * lanes"),
    "reads behind the weight": (FEW, "hopper.cuh", "const u32 outs = min(OUTS, n - out0);", "const u32 outs = OUTS;"),
    "takes another zero point": (MANY, "bits.cuh", "0x64086408 : 0x64806480", "0x64096409 : 0x64816481"),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_kernel_that_is_wrong_is_found(what: str, gpu: Machine, tmp_path: Path) -> None:
    plan, file, old, new = FAULTS[what]
    gpu.change(tmp_path, file, old, new)
    for seed in range(6):
        product = drawn(gpu, plan.tile.rows + 1, plan.tile.outputs + 8, 1600, seed)
        gpu.seed = seed
        try:
            if not product.error(product.by(plan, gpu)) < ERRORS[product.x.dtype]:
                return
        except AssertionError:
            return
    pytest.fail("no run showed it")
