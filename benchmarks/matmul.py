"""Microseconds of one matmul with a quantized weight, for every backend of gptq_fn_kernels and its peers, on one GPU.

    python benchmarks/matmul.py --json matmul.json

Claim: the backend that is chosen beats the peers' at every shape, and a dense layer wherever reading the weight takes longer than
multiplying with it. "floor" is what the machine allows: the bytes at the rate of a launch that only reads, or the operations at
the rate of a large dense product, whichever takes longer; both rates are measured first. Everyone gets the same random symmetric
weight, whose scales fit both 16-bit types, in memory of its own for each of so many calls that the L2 cache holds none. The calls
are captured in one CUDA graph, replays are timed with events, of all contenders in turns. Before that every output is filled with NaN and
compared with float64: "error" is the largest relative error in the row, and "spread" the largest (max - min) / median.
gemlite, GPTQModel, Marlin, Machete and torch's own int4 kernel take part where they are there. On a CPU the same runs without graphs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportMissingImports=false, reportOperatorIssue=false
# (pyright does not know what Triton makes of a kernel, and the peers may be absent.)
import argparse
import copy
import importlib.util
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from gptq_fn_interop.timing import Call, copies_of, stopwatch
from gptq_fn_kernels import BACKENDS, Backend, Packed, explain, multiply, prepare, problem_of
from gptq_fn_kernels.words import pack

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""x [m, k] -> [m, n]"""

SHAPES = ("4096x4096", "4096x28672", "14336x4096")
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True)
class Weight:
    """A random symmetric weight [n, k] in every form that a contender may want; scales [n, groups] have the activations' dtype."""

    codes: torch.Tensor
    scales: torch.Tensor
    bits: int
    group: int

    @property
    def packed(self) -> Packed:
        """As a checkpoint of format v2 stores it, in new memory."""
        (n, k), groups = self.codes.shape, self.scales.shape[1]
        zeros = torch.full((n, groups), self.middle, dtype=torch.int32, device=self.codes.device)
        qweight = pack(self.codes.T.int(), self.bits, torch).contiguous()
        qzeros = pack(zeros, self.bits, torch).T.contiguous()
        g_idx = torch.arange(k, dtype=torch.int32, device=self.codes.device) // self.group
        return Packed(qweight, qzeros, self.scales.T.contiguous(), g_idx, self.bits, 0)

    @property
    def middle(self) -> int:
        """The code that stands for zero."""
        return 2 ** (self.bits - 1)

    def dense(self, dtype: torch.dtype) -> torch.Tensor:
        """[n, k], rounded once."""
        scales = self.scales.double().repeat_interleave(self.group, 1)[:, : self.codes.shape[1]]
        return ((self.codes.double() - self.middle) * scales).to(dtype)

    def bytes(self) -> int:
        """What has to be read of it: codes and scales."""
        return self.codes.numel() * self.bits // 8 + self.scales.numel() * self.scales.element_size()


def random_weight(n: int, k: int, bits: int, group: int, dtype: torch.dtype, device: str) -> Weight:
    """A weight whose outputs are about as large as its inputs."""
    generator = torch.Generator(device).manual_seed(n + k + bits)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, device=device, generator=generator)
    size = 2 / (2**bits * math.sqrt(k))
    scales = size * (0.5 + torch.rand(n, -(-k // group), device=device, generator=generator))
    return Weight(codes, scales.bfloat16().to(dtype), bits, group)


@dataclass(frozen=True)
class Contender:
    """`build` gives what multiplies with a weight of its own memory, or says in words why it cannot."""

    name: str
    build: Callable[[Weight], Multiply | str]
    dense: bool = False
    """It reads a weight of the activations' dtype."""


def ours(backend: Backend) -> Contender:
    def build(w: Weight) -> Multiply | str:
        packed = w.packed
        if reason := explain(problem_of(packed, w.scales.dtype))[backend.name]:
            return reason
        prepared = prepare(packed, w.scales.dtype, backend.name)
        return lambda x: multiply(x, prepared)

    return Contender(f"gptq_fn {backend.name}", build)


def dense(w: Weight) -> Multiply:
    weight = w.dense(w.scales.dtype)
    return lambda x: F.linear(x, weight)


@triton.jit
def _dequantize(words, scales, out, n, bits: tl.constexpr, group: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    codes: tl.constexpr = 32 // bits
    row = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    column = tl.program_id(1) * columns + tl.arange(0, columns)[None, :]
    word = tl.load(words + row * n + column, column < n)
    scale = tl.load(scales + row * codes // group * n + column, column < n).to(tl.float32)
    for i in tl.static_range(codes):
        level = (word >> (i * bits) & ((1 << bits) - 1)) - (1 << (bits - 1))
        tl.store(out + (row.to(tl.int64) * codes + i) * n + column, level.to(tl.float32) * scale, column < n)


def dequantize_first(w: Weight) -> Multiply | str:
    """One pass from the checkpoint's words to a dense weight, then the dense product: what large M can always have."""
    n, k = w.codes.shape
    if w.codes.device.type != "cuda" or w.bits == 3 or k % 64 or w.group % 16:
        return "is a Triton kernel for 2, 4 and 8 bits, groups that 16 and inputs that 64 divides, and needs a GPU"
    packed, grid = w.packed, (k * w.bits // 32 // 4, triton.cdiv(n, 512))

    def multiply(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(k, n, dtype=x.dtype, device=x.device)
        _dequantize[grid](packed.qweight, packed.scales, out, n, w.bits, w.group, 4, 512)
        return x @ out

    return multiply


def tinygemm(w: Weight) -> Multiply | str:
    """torch's own kernel of 4 bits; its weight is code - 8 times scale, plus a zero that is none here."""
    n, k = w.codes.shape
    if w.codes.device.type != "cuda" or w.scales.dtype != torch.bfloat16 or w.bits != 4:
        return "multiplies torch.bfloat16 with 4 bits, on a GPU"
    if w.group not in (32, 64, 128, 256) or k % 128 or n % 8:
        return "has groups of 32, 64, 128 or 256 and shapes that its tiles divide"
    weight = torch.ops.aten._convert_weight_to_int4pack(w.codes[:, ::2] << 4 | w.codes[:, 1::2], 8)
    scales = torch.stack([w.scales.T, torch.zeros_like(w.scales.T)], -1).contiguous()
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, weight, w.group, scales)


def gemlite(w: Weight) -> Multiply | str:
    """gemlite's layer as it chooses its kernels itself, with one whole number as the zero point: its cheapest form."""
    n, k = w.codes.shape
    if w.codes.device.type != "cuda" or not importlib.util.find_spec("gemlite"):
        return "needs a GPU and `pip install gemlite`"
    from gemlite import DType, GemLiteLinear

    if w.bits == 3 or w.scales.dtype not in (torch.float16, torch.bfloat16):
        return "multiplies torch.float16 and torch.bfloat16 with 2, 4 or 8 bits"
    if k % 32 or k % w.group:
        return "has whole groups only"
    dtype = DType.FP16 if w.scales.dtype == torch.float16 else DType.BF16
    layer = GemLiteLinear(w.bits, w.group, k, n, input_dtype=dtype, output_dtype=dtype)
    return layer.pack(w.codes.clone(), w.scales.clone(), zeros=w.middle).forward


def gptqmodel(w: Weight) -> Multiply | str:
    """The Triton layer of GPTQModel."""
    n, k = w.codes.shape
    if w.codes.device.type != "cuda" or not importlib.util.find_spec("gptqmodel"):
        return "needs a GPU and `pip install gptqmodel`"
    from gptqmodel.nn_modules.qlinear.tritonv2 import TritonV2Linear

    if w.bits == 3 or w.scales.dtype == torch.float32 or k % 32 or n % 32:
        return "multiplies torch.float16 and torch.bfloat16 with 2, 4 or 8 bits, in shapes that 32 divides"
    packed = w.packed
    layer = TritonV2Linear(bits=w.bits, group_size=w.group, sym=True, desc_act=False, in_features=k, out_features=n, bias=False)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        setattr(layer, name, getattr(packed, name))
    layer.post_init()
    return layer.eval()


def marlin(w: Weight) -> Multiply | str:
    """The layer of Marlin's own repository."""
    n, k = w.codes.shape
    if w.codes.device.type != "cuda" or not importlib.util.find_spec("marlin"):
        return "needs a GPU and Marlin, built from its repository"
    if w.bits != 4 or w.group not in (128, k) or w.scales.dtype != torch.float16 or k % 128 or n % 256:
        return "multiplies torch.float16 with 4 bits in groups of 128 or one a row, in shapes that 128 and 256 divide"
    if w.codes not in _MARLIN:  # packing takes seconds
        from marlin import Layer

        linear, layer = torch.nn.Linear(k, n, bias=False, dtype=torch.float16), Layer(k, n, w.group if w.group < k else -1)
        linear.weight.data = w.dense(torch.float16).cpu()
        layer.pack(linear, w.scales.cpu())
        _MARLIN.clear()
        _MARLIN[w.codes] = layer.cuda()
    return copy.deepcopy(_MARLIN[w.codes]).forward


_MARLIN: dict[torch.Tensor, torch.nn.Module] = {}
"""The last weight, packed."""


def machete(w: Weight) -> Multiply | str:
    """vLLM's Machete, with the one of its schedules that is the fastest here at each M."""
    (n, k), dtype = w.codes.shape, w.scales.dtype
    if w.codes.device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0) or not importlib.util.find_spec("vllm"):
        return "needs a GPU of compute capability 9.0 and `pip install vllm`"
    from vllm import _custom_ops as ops
    from vllm.scalar_type import scalar_types

    kind = {4: scalar_types.uint4b8, 8: scalar_types.uint8b128}.get(w.bits)
    schedules = ops.machete_supported_schedules(dtype, kind, dtype) if kind else []
    if not schedules or w.group not in (64, 128, k) or k % 64 or n % 128:
        return "multiplies 16-bit floats with 4 or 8 bits in groups of 64, 128 or one a row, in shapes that 64 and 128 divide"
    weight, scales = ops.machete_prepack_B(w.packed.qweight.T.contiguous().T, dtype, kind, dtype), w.scales.T.contiguous()

    def call(x: torch.Tensor, weight: torch.Tensor, schedule: str) -> torch.Tensor:
        return ops.machete_mm(x, weight, kind, b_group_scales=scales, b_group_size=w.group, schedule=schedule)

    def multiply(x: torch.Tensor) -> torch.Tensor:
        if (key := (n, k, w.bits, w.group, dtype, len(x))) not in _SCHEDULES:
            weights = [weight.clone() for _ in range(copies_of(w.bytes(), "cuda"))]
            times = in_turns({s: stopwatch([partial(call, x, v, s) for v in weights], "cuda") for s in schedules}, 0)
            _SCHEDULES[key] = min(times, key=lambda s: times[s]["median"])
        return call(x, weight, _SCHEDULES[key])

    return multiply


_SCHEDULES: dict[tuple, str] = {}
"""Machete's fastest at a shape and M."""


CONTENDERS = (
    Contender("dense (cuBLAS)", dense, dense=True),
    Contender("dequantize + dense", dequantize_first),
    Contender("torch tinygemm", tinygemm),
    Contender("gemlite", gemlite),
    Contender("GPTQModel Triton", gptqmodel),
    Contender("Marlin", marlin),
    Contender("Machete", machete),
    *map(ours, BACKENDS),
)


def in_turns(watches: dict[str, Callable[[], float]], budget: float) -> dict[str, dict[str, float]]:
    """Median, min and max of what each measures, over `budget` seconds for each.

    In turns, for a GPU that gets warm lowers its clock: who is measured last would look slower. In another order each turn, for
    so would who comes after what warms most.
    """
    times, began, order = {name: [] for name in watches}, time.perf_counter(), random.Random(0)
    for turn in range(100):
        if turn >= 5 and time.perf_counter() - began > budget * len(watches):
            break
        for name in order.sample(list(watches), len(watches)):
            times[name].append(watches[name]())
    return {name: {"median": statistics.median(ts), "min": min(ts), "max": max(ts)} for name, ts in times.items()}


@triton.jit
def _read(x, out, block: tl.constexpr, blocks: tl.constexpr):
    total = tl.zeros((block,), tl.int32)
    for i in tl.static_range(blocks):
        total ^= tl.load(x + tl.program_id(0).to(tl.int64) * block * blocks + i * block + tl.arange(0, block))
    once = tl.xor_sum(total, 0)
    if once == 123456789:  # hardly ever, but the loads must not be dropped
        tl.store(out, once)


def ceilings(device: str, budget: float, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second that are read, and operations a second of a large dense product."""
    cpu = device == "cpu"
    words, size = (2**24, 512) if cpu else (2**29, 8192)
    x = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=device)
    out = torch.zeros(1, dtype=torch.int32, device=device)

    def reader(block: int, blocks: int) -> Call:
        def read() -> torch.Tensor:
            _read[words // (block * blocks),](x, out, block, blocks, num_warps=block // 512)
            return out

        return read

    readers = [lambda: x.amax().reshape(1)] if cpu else [reader(2048, 4), reader(2048, 8), reader(4096, 8)]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))

    def best(call: Call) -> float:
        return in_turns({"": stopwatch([call], device)}, budget)[""]["min"]

    return 4e6 * words / min(map(best, readers)), 2e6 * size**3 / best(lambda: a @ b.T)


def measured(k: int, n: int, bits: int, group: int, dtype: torch.dtype, args: argparse.Namespace, rates: tuple[float, float]) -> dict:
    """The figures of every contender at one shape, and the floor's."""
    w = random_weight(n, k, bits, group, dtype, args.device)
    exact = w.dense(torch.float64)
    built, rows = {}, {}
    for contender in (c for c in CONTENDERS if not args.only or any(word in c.name for word in args.only)):
        first = contender.build(w)
        if isinstance(first, str):
            rows[contender.name] = {"reason": first}
            continue
        size = n * k * dtype.itemsize if contender.dense else w.bytes()
        copies = copies_of(size, args.device)
        built[contender.name] = [first, *(contender.build(replace(w, scales=w.scales.clone())) for _ in range(copies - 1))]
        rows[contender.name] = {"copies": copies, "times": {}, "error": {}, "failed": {}}
    rows["floor"] = {"times": {}}
    for m in args.rows:
        x = torch.randn(m, k, device=args.device, generator=torch.Generator(args.device).manual_seed(m)).to(dtype)
        right = x.double() @ exact.T
        moved = w.bytes() + (x.numel() + right.numel()) * dtype.itemsize
        rows["floor"]["times"][m] = {"median": 1e6 * max(moved / rates[0], 2 * m * n * k / rates[1])}
        watches = {}
        for name, forms in built.items():
            errors = []

            def check(y: torch.Tensor, errors: list[float] = errors, right: torch.Tensor = right) -> None:
                errors.append(float((y.double() - right).norm() / right.norm()))

            try:
                watches[name] = stopwatch([lambda form=form, x=x: form(x) for form in forms], args.device, check)
                rows[name]["error"][m] = math.nan if any(map(math.isnan, errors)) else max(errors)
            except Exception as error:  # of one contender at one M; the others go on
                rows[name]["failed"][m] = str(error).strip().splitlines()[0]
        for name, found in in_turns(watches, args.budget).items():
            rows[name]["times"][m] = found
    return {"k": k, "n": n, "bits": bits, "group": group, "dtype": str(dtype), "rows": rows}


def show(result: dict, ms: list[int]) -> None:
    """A line for each contender, in microseconds, and a reason for each that is not there."""
    dtype = result["dtype"].removeprefix("torch.")
    print(f"\n{result['k']} x {result['n']}, {result['bits']} bits, group {result['group']}, {dtype}: microseconds")
    print(f"{'M':>24}" + "".join(f"{m:8}" for m in ms) + "    error spread")
    rows = result["rows"]
    for name, row in ((name, row) for name, row in rows.items() if "times" in row):
        times = row["times"]
        cells = "".join(f"{times[m]['median']:8.1f}" if m in times else f"{'-':>8}" for m in ms)
        spread = max(((t["max"] - t["min"]) / t["median"] for t in times.values() if "max" in t), default=math.nan)
        error = max(row.get("error", {}).values(), default=math.nan, key=lambda e: math.inf if math.isnan(e) else e)
        print(f"{name:>24}{cells}" + ("" if name == "floor" else f" {error:8.1e} {spread:5.0%}"))
    for name, row in rows.items():
        for m, why in row.get("failed", {}).items():
            print(f"{'':>8}{name} failed at M = {m}: {why}")
    print(f"{'':>8}without " + "; ".join(f"{name}, which {row['reason']}" for name, row in rows.items() if "reason" in row))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="inputs x outputs of the weight")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS, help="M: how many activations are multiplied at once")
    parser.add_argument("--bits", type=int, nargs="+", default=[4], choices=(2, 3, 4, 8))
    parser.add_argument("--groups", type=int, nargs="+", default=[128], help="inputs that share a scale; 0 for one group a row")
    parser.add_argument("--dtypes", nargs="+", default=["float16"], choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--only", nargs="+", default=(), help="words of the names of contenders: these alone")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--budget", type=float, default=0.15, help="seconds for one figure")
    parser.add_argument("--json", type=Path, help="where to write every figure, with min, max and error")
    args = parser.parse_args(argv)
    gpu = torch.cuda.get_device_properties(0) if args.device == "cuda" else None
    about = f"{gpu.name}, L2 {gpu.L2_cache_size >> 20} MiB" if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{about}; torch {torch.__version__}, triton {triton.__version__}")
    rates, results = {}, []
    with torch.inference_mode():
        for dtype in (getattr(torch, name) for name in args.dtypes):
            rates[dtype] = ceilings(args.device, args.budget, dtype)
            print(f"{dtype}: reads {rates[dtype][0] / 1e9:.0f} GB/s, multiplies at {rates[dtype][1] / 1e12:.3g} TFLOP/s", flush=True)
        for dtype, (shape, bits, group) in product(rates, product(args.shapes, args.bits, args.groups)):
            k, n = map(int, shape.split("x"))
            results.append(measured(k, n, bits, group or k, dtype, args, rates[dtype]))
            show(results[-1], args.rows)
            if args.json:
                told = {str(dtype): {"read": read, "multiply": flops} for dtype, (read, flops) in rates.items()}
                args.json.write_text(json.dumps({"about": about, "ceilings": told, "results": results}, indent=1))


if __name__ == "__main__":
    main()
