"""The CUDA tier computes x W^T: its layout and choices everywhere, its products on a GPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from gptq_fn_kernels import Packed, dequantize, explain, problem_of
from gptq_fn_kernels.cuda import backend
from gptq_fn_kernels.cuda.machine import arch_of
from gptq_fn_kernels.cuda.plan import PLANS, Block, Multistage, Plan, Stream, multistages, plan_of, plans_of
from gptq_fn_kernels.cuda.variants import variants
from gptq_fn_kernels.cuda.weight import CudaWeight, prepare
from gptq_fn_kernels.triton.layout import chunk_of, unpack_words
from gptq_writer import SCALE_DTYPES, Linear, Scheme, random_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from test_triton import exact_of, packed_of, relative

SHARED = {"sm_80": 164, "sm_86": 100, "sm_89": 100, "sm_90a": 228, "sm_100": 228, "sm_120": 100}
"""KiB of a multiprocessor, of which each block takes one for itself and leaves one."""
seeds = st.integers(0, 2**32 - 1)


@st.composite
def linears(draw: st.DrawFn) -> tuple[Linear, Scheme]:
    scheme = Scheme(
        bits=draw(st.sampled_from((4, 8))),
        group_size=draw(st.sampled_from((-1, 16, 24, 32, 48, 64, 96, 128, 256))),
        sym=draw(st.booleans()),
        desc_act=draw(st.booleans()),
        zeros=draw(st.sampled_from(("v1", "v2"))),
        scales=draw(st.sampled_from(SCALE_DTYPES)),
    )
    inputs, outputs = 8 * draw(st.integers(1, 80)), 8 * draw(st.integers(1, 40))
    return random_linear(np.random.default_rng(draw(seeds)), inputs, outputs, scheme), scheme


# layout


@settings(max_examples=40)
@given(linears())
def test_the_prepared_weight_is_the_weight(drawn: tuple[Linear, Scheme]) -> None:
    linear, scheme = drawn
    w = prepare(packed_of(linear, scheme))
    codes = unpack_words(w.words, None, w.bits, torch.stack).double()
    chunks, n, groups, of_group = w.grid.shape
    share = chunk_of(w.bits) // groups
    scales = w.grid[..., 0].double().permute(1, 0, 2).reshape(n, -1).repeat_interleave(share, 1)
    zeros = torch.full_like(scales, 2 ** (w.bits - 1))
    if of_group == 2:
        zeros = w.grid.view(torch.float16)[..., 1].double().permute(1, 0, 2).reshape(n, -1).repeat_interleave(share, 1)
    weight = (codes - zeros) * scales
    slots = torch.arange(chunks * chunk_of(w.bits))
    inputs = slots.where(slots < w.k, w.k) if w.gather is None else w.gather.long()
    expected = torch.cat([torch.from_numpy(linear.weight), torch.zeros(w.n, 1, dtype=torch.float64)], 1)
    used = slice(w.k) if w.gather is None else slice(None)  # slots behind the last input are multiplied with zeros
    np.testing.assert_allclose(weight[:, used], expected[:, inputs][:, used], rtol=2**-11 if scheme.scales == torch.float32 else 0)


# the choice


@settings(max_examples=200)
@given(st.integers(1, 70_000), st.integers(1, 40_000), st.integers(1, 500), st.integers(1, 200))
def test_plans_serve_every_size(m: int, n: int, chunks: int, processors: int) -> None:
    plan = plan_of(m, n, chunks, processors, "sm_90a")
    assert plan is not None
    assert m > 64 or plan.tile.rows < max(2 * m, 16)
    if isinstance(plan, Stream):
        tiles = -(-m // plan.tile.rows) * -(-n // plan.tile.outputs)
        assert 1 <= plan.blocks(m, n, chunks, processors) <= processors
        assert plan.shared(m, n, processors) in (range(1) if plan.whole else range(min(tiles, processors), min(tiles, 2 * processors) + 1))
    for arch in sorted({*SHARED} - {"sm_90a"}):
        other = plan_of(m, n, chunks, processors, arch)
        assert (other is None) == (m > 256)
        if other is not None:
            assert isinstance(other, Multistage)
            assert other.tile.rows >= min(m, 64)
            units = -(-m // other.tile.rows) * -(-n // other.tile.outputs) * chunks
            assert 1 <= other.blocks(m, n, chunks, processors) <= min(units, 2 * processors)


@pytest.mark.parametrize(
    ("arch", "tile"), [(arch, plan.tile) for arch in SHARED for plan in (*plans_of(arch), *multistages(arch))], ids=str
)
def test_tiles_fit_the_gpu(arch: str, tile: Block) -> None:
    for bits, share in ((bits, share) for bits in (4, 8) for share in (16, 32, 64, 128) if share <= chunk_of(bits)):
        for of_group in (1, 2):
            grid = chunk_of(bits) // share * of_group
            assert tile.stages(bits, grid) >= 2
            assert tile.stages(bits, grid) % tile.turns == 0
            assert tile.blocks * (tile.shared(bits, grid) + 1024 + 16 * tile.stages(bits, grid)) <= SHARED[arch] * 1024


def test_many_rows_are_dequantized_once_where_there_are_no_instructions_of_hopper() -> None:
    assert plan_of(100_000, 4096, 32, 132, "sm_80") is None


def test_gpus_before_ampere_have_no_kernel() -> None:
    assert plans_of("sm_75") == () == variants("sm_75", 4, 128, torch.float16, True)
    assert variants("sm_80", 4, 128, torch.float16, True) != variants("sm_90a", 4, 128, torch.float16, True) != ()


@pytest.mark.parametrize(
    ("capability", "cuda", "multistage"),
    [((7, 5), "found sm_75", "8.0 or later"), ((8, 6), "found sm_86", None), ((9, 0), None, "Hopper's"), ((12, 0), "found sm_120", None)],
)
def test_reasons(capability: tuple[int, int], cuda: str | None, multistage: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = Scheme(4, 32)
    packed = packed_of(random_linear(np.random.default_rng(0), 64, 16, scheme), scheme)
    problem = problem_of(packed, torch.float16)
    assert "runs on an NVIDIA GPU, not on cpu" in str(explain(problem)["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(backend, "unavailable", lambda: None)
    found = explain(replace(problem, device="cuda"))
    for name, expected in (("cuda", cuda), ("multistage", multistage)):
        assert (found[name] is None) == (expected is None)
        assert expected is None or expected in str(found[name])
    assert "not 3" in str(explain(replace(problem, device="cuda", bits=3))["cuda"])
    assert "float32" in str(explain(replace(problem, device="cuda", dtype=torch.float32))["multistage"])
    assert "8 must divide" in str(explain(replace(problem, device="cuda", n=20))["cuda"])


# products


def same(found: torch.Tensor, y: torch.Tensor, weight: CudaWeight) -> None:
    """Two products of one input, bit for bit; else says by which plan, and where they differ."""
    if torch.equal(found, y):
        return
    rows, outputs = (found != y).nonzero(as_tuple=True)
    chunks, n = weight.parts[0].shape[:2]
    plan = plan_of(len(y), n, chunks, torch.cuda.get_device_properties(y.device).multi_processor_count, arch_of(y.device))
    raise AssertionError(
        f"{len(rows)} of {y.numel()} elements differ: {len(y)} rows by {plan}, {weight.bits} bits, {y.dtype}, "
        f"rows {rows.unique().tolist()[:9]}, outputs {int(outputs.min())} to {int(outputs.max())}, {int(found.isnan().sum())} NaN"
    )


def check(packed: Packed, x: torch.Tensor, prepared: CudaWeight | None = None) -> None:
    weight = prepare(packed) if prepared is None else prepared
    exact = exact_of(x, packed)
    y = backend.matmul(x, weight)
    assert y.shape == exact.shape
    assert y.dtype == x.dtype
    dense = dequantize(packed, torch.float64).to(x.dtype)
    tolerance = max(1.2 * relative(x @ dense.T, exact), 1e-6) + 1e-4
    assert relative(y, exact) < tolerance
    same(backend.matmul(x, weight), y, weight)
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., 1:-2] = x
    same(backend.matmul(wide[..., 1:-2], weight), y, weight)
    alike = x[:1].expand(3, -1)
    same(backend.matmul(alike, weight), backend.matmul(alike.contiguous(), weight), weight)
    found = backend.gradient(y, weight)
    assert relative(found, y.double() @ dequantize(packed, torch.float64)) < 0.6 * torch.finfo(x.dtype).eps


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@settings(max_examples=30, deadline=None)
@given(linears(), st.integers(1, 600), seeds)
def test_products_on_a_gpu(dtype: torch.dtype, drawn: tuple[Linear, Scheme], m: int, seed: int) -> None:
    packed = packed_of(*drawn, "cuda")
    check(packed, torch.randn(m, packed.k, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda())


@pytest.mark.gpu
@pytest.mark.parametrize("plan", [*PLANS, *(plan for arch in ("sm_80", "sm_86", "sm_90a") for plan in multistages(arch))], ids=str)
def test_every_plan(plan: Plan) -> None:
    """Also where blocks are more than a GPU holds at once, and where chunks are fewer than blocks."""
    for bits, sym, n, k in ((4, True, 2056, 4104), (8, False, 328, 264)):
        scheme = Scheme(bits, 64, sym=sym)
        packed = packed_of(random_linear(np.random.default_rng(bits), k, n, scheme), scheme, "cuda")
        weight = prepare(packed)
        for m in {1, plan.tile.rows - 3, plan.tile.rows, 2 * plan.tile.rows + 5, 1500}:
            x = torch.randn(m, k, device="cuda", dtype=torch.float16)
            exact = exact_of(x, packed)
            for _ in range(3):
                y = backend.multiply_by(plan, x, weight.parts, bits)
                assert relative(y, exact) < 5e-4, (bits, m)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("k", "n"), [(576, 1536), (4096, 1024), (11008, 4096), (896, 151_936)])
def test_shapes_of_models_on_a_gpu(k: int, n: int, bits: int) -> None:
    scheme = Scheme(bits, 128, sym=bits == 4)
    packed = packed_of(random_linear(np.random.default_rng(bits), k, n, scheme), scheme, "cuda")
    prepared = prepare(packed)
    for dtype in (torch.float16, torch.bfloat16):
        for m in (1, 3, 8, 16, 24, 48, 96, 200, 300, 700, 2000):
            check(packed, torch.randn(m, k, device="cuda").to(dtype), prepared)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_many_times(dtype: torch.dtype, bits: int) -> None:
    """Of every tile of blocks that do not wait for another, some waves of them, many under way behind copies of activations.

    A kernel once let TMA write over activations that a warp had begun to load (kernels/NOTES.md, version 15): in a run of this by six
    processes at a time up to every fourth product of 16 rows differed, most where blocks write y while others start.
    """
    scheme = Scheme(bits, 128, sym=False)
    packed = packed_of(random_linear(np.random.default_rng(bits), 1024, 40_960, scheme), scheme, "cuda")
    weight = prepare(packed)
    for plan in [plan for plan in PLANS if (plan.whole if isinstance(plan, Stream) else plan.parts == 1)]:
        xs = [torch.randn(plan.tile.rows, packed.k, device="cuda").to(dtype) for _ in range(2)]
        exact = [exact_of(x, packed) for x in xs]
        right = [backend.multiply_by(plan, x, weight.parts, bits) for x in xs]
        assert max(relative(y, each) for y, each in zip(right, exact, strict=True)) < torch.finfo(dtype).eps
        differ = torch.zeros((), dtype=torch.bool, device="cuda")
        for turn in range(200):
            x = xs[turn % 2].clone()
            y = backend.multiply_by(plan, x, weight.parts, bits)
            x.fill_(torch.nan)  # what the next copy takes the place of
            differ |= (y != right[turn % 2]).any()
            y.fill_(torch.nan)
        assert not differ, plan


@pytest.mark.gpu
@pytest.mark.parametrize("m", [7, 600])
def test_streams_graphs_and_empty_batches(m: int) -> None:
    """600 rows go to the kernel whose blocks leave sums to one another."""
    scheme = Scheme(4, 128, desc_act=True)
    packed = packed_of(random_linear(np.random.default_rng(0), 4096, 4096, scheme), scheme, "cuda")
    weight, x = prepare(packed), torch.randn(m, 4096, device="cuda", dtype=torch.float16)
    y = backend.matmul(x, weight)
    assert backend.matmul(x[:0], weight).shape == (0, 4096)
    graphs = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            captured = [backend.matmul(x, weight) for _ in range(3)]
        graphs.append((graph, captured))
    x.copy_(torch.randn_like(x))
    y = backend.matmul(x, weight)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    for _ in range(10):  # all at once, on one weight
        for stream, graph in zip(streams, graphs, strict=False):
            with torch.cuda.stream(stream):
                graph[0].replay()
        for stream in streams[2:]:
            with torch.cuda.stream(stream):
                found.append(backend.matmul(x, weight))
    torch.cuda.synchronize()
    assert all(torch.equal(each, y) for each in [*found, *graphs[0][1], *graphs[1][1]])
    with pytest.raises(ValueError, match="4096 inputs"):
        backend.matmul(x[:, :8], weight)
