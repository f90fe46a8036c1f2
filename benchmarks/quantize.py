"""A whole run, from a float checkpoint on disk to a quantized one: seconds in all, seconds of each stage, peaks of memory.

    python benchmarks/quantize.py                                   # Llama-3-8B's shape: 20 GB of disk, one large GPU
    python benchmarks/quantize.py --shape llama-3-70b --blocks 3 --activations host
    python benchmarks/quantize.py --model DIR --samples 32 --length 512

Without --model the checkpoint has random weights, written first. The run is made twice: of the first blocks, which compiles
all programs and is traced for the table of stages, and of the whole. Stages are the device's busy time by program, and the
time of the threads that read and write; they overlap, so they add up to more than the run where it is well filled.

--gptqmodel times that library on the first blocks. --peer times the procedure of the GPTQ authors' code on one block on the same
device: a float32 Hessian for each linear, the block run again for each group of linears, three factorizations, a Python loop
over columns.
"""

import argparse
import gzip
import json
import resource
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gptq_fn_interop.activations import on_disk
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.stream import quantize_checkpoint
from safetensors.numpy import save_file

from gptq_fn import ON_DEVICE, ON_HOST, PRESETS, data_mesh, preset

LLAMA = {"model_type": "llama", "vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
    "llama-3-70b": LLAMA
    | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "mixtral-8x7b": {"model_type": "mixtral", "vocab_size": 32000, "rope_theta": 1e6, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3-30b-a3b": {"model_type": "qwen3_moe", "vocab_size": 151936, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "hidden_act": "silu"}
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
    "small": LLAMA
    | {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    | {"vocab_size": 1024},
}

HOST_STAGES = {"read a block": "read", "write a block": "pack and write"}
"""Annotations of threads."""

STAGES = {
    "jit__enter": "forward",
    "jit__advance": "forward",
    "jit__dequantize": "forward",
    "jit__add": "Hessian",
    "jit__factor": "factor",
    "jit_solve_together": "solve",
    "jit__solve": "factor and solve experts",
}
"""What programs do."""


def tensors(config: Mapping[str, Any]) -> Iterator[tuple[int | None, str, tuple[int, ...]]]:
    """(block or None, name, shape) of every tensor of a Llama-like checkpoint, experts included."""
    width, heads, kv = config["hidden_size"], config["num_attention_heads"], config["num_key_value_heads"]
    dim = config.get("head_dim", width // heads)
    yield None, "model.embed_tokens.weight", (config["vocab_size"], width)
    yield None, "model.norm.weight", (width,)
    yield None, "lm_head.weight", (config["vocab_size"], width)
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        yield i, p + "input_layernorm.weight", (width,)
        yield i, p + "post_attention_layernorm.weight", (width,)
        for name, out, inputs in (("q", heads * dim, width), ("k", kv * dim, width), ("v", kv * dim, width), ("o", width, heads * dim)):
            yield i, f"{p}self_attn.{name}_proj.weight", (out, inputs)
        if config["model_type"] == "qwen3_moe":
            yield i, p + "self_attn.q_norm.weight", (dim,)
            yield i, p + "self_attn.k_norm.weight", (dim,)
        yield from ((i, p + name, shape) for name, shape in feed_forward(config))


def feed_forward(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    width, kind = config["hidden_size"], config["model_type"]
    prefix, names, inner, count = {
        "llama": ("mlp", ("gate_proj", "up_proj", "down_proj"), config["intermediate_size"], None),
        "mixtral": ("block_sparse_moe", ("w1", "w3", "w2"), config["intermediate_size"], config.get("num_local_experts")),
        "qwen3_moe": ("mlp", ("gate_proj", "up_proj", "down_proj"), config.get("moe_intermediate_size"), config.get("num_experts")),
    }[kind]
    gate, up, down = names
    if count is not None:
        yield f"{prefix}.gate.weight", (count, width)
    for path in [prefix] if count is None else [f"{prefix}.experts.{n}" for n in range(count)]:
        yield f"{path}.{gate}.weight", (inner, width)
        yield f"{path}.{up}.weight", (inner, width)
        yield f"{path}.{down}.weight", (width, inner)


def write_random(config: Mapping[str, Any], directory: Path) -> None:
    """A checkpoint of random bfloat16 weights, a shard for each block."""
    directory.mkdir(parents=True)
    shards: dict[int | None, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for i, name, shape in tensors(config):
        shards[i][name] = shape
    made = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    files, key = {}, jax.random.key(0)
    for i, named in shards.items():
        held, file = {}, f"model-{'top' if i is None else f'{i:05}'}.safetensors"
        for name, shape in named.items():
            key, mine = jax.random.split(key)
            held[name] = np.ones(shape, jnp.bfloat16) if len(shape) == 1 else np.asarray(made(mine, shape))
        save_file(held, directory / file)
        files |= dict.fromkeys(named, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    architecture = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}[config["model_type"]]
    (directory / "config.json").write_text(json.dumps({**config, "architectures": [architecture], "dtype": "bfloat16"}))


def first_blocks(source: Path, blocks: int, directory: Path) -> Path:
    """The random checkpoint with fewer blocks: links to their shards."""
    directory.mkdir()
    config = {**json.loads((source / "config.json").read_text()), "num_hidden_layers": blocks}
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    index = {name: index[name] for _, name, _ in tensors(config)}
    for file in set(index.values()):
        (directory / file).symlink_to((source / file).resolve())
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config))
    return directory


class Watch:
    """When each block was done; the trace of those from the second to the last that is to be traced."""

    def __init__(self, traces: Path | None, last: int):
        self.began, self.done, self._traces, self._last = time.perf_counter(), [], traces, last

    def __call__(self, done: int, total: int) -> None:
        self.done.append(time.perf_counter() - self.began)
        print(f"  block {done} of {total} after {self.done[-1]:.2f} s", flush=True)
        if self._traces is not None and done == 1:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0
            jax.profiler.start_trace(str(self._traces), profiler_options=options)
        if self._traces is not None and done == self._last:
            jax.profiler.stop_trace()


def stages(traces: Path, blocks: int) -> dict[str, float]:
    """Seconds of each stage a block: of programs by the kernels that they ran, each counted without what it contains."""
    (file,) = traces.glob("**/*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    on_gpu = {e["pid"] for e in events if e.get("name") == "process_name" and "/device:GPU" in e["args"]["name"]}
    by_thread, counts = defaultdict(list), Counter()
    for e in events:
        program = e.get("args", {}).get("hlo_module")
        if e.get("ph") == "X" and (e["name"] in HOST_STAGES or (program is not None and (not on_gpu or e["pid"] in on_gpu))):
            counts[e["name"]] += 1
            by_thread[e["pid"], e["tid"]].append(
                (e["ts"], -e["dur"], HOST_STAGES.get(e["name"]) or STAGES.get(program, f"other: {program}"))
            )
    found: Counter[str] = Counter()
    for timed in by_thread.values():
        inside: list[tuple[float, str]] = []  # where each event under way ends
        for start, negative, stage in sorted(timed):
            while inside and inside[-1][0] <= start:
                inside.pop()
            if inside:
                found[inside[-1][1]] += negative
            found[stage] -= negative
            inside.append((start - negative, stage))
    times = {stage: counts[event] for event, stage in HOST_STAGES.items()}
    return {stage: us / 1e6 / (times.get(stage) or blocks) for stage, us in found.most_common()}


def peer(config: Mapping[str, Any], samples: int, length: int) -> None:
    """One block by the procedure of the GPTQ authors' code, in torch on this device."""
    import torch
    from solver import reference
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kind: Any = AutoConfig.for_model(**{**config, "num_hidden_layers": 1})
    kind._attn_implementation = "sdpa"
    with torch.device(device), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        layer, rotary = LlamaDecoderLayer(kind, 0).eval(), LlamaRotaryEmbedding(kind)
        xs = torch.randn(samples, length, kind.hidden_size)
        places = rotary(xs, torch.arange(length)[None])
        torch.set_default_dtype(torch.float32)
        began = time.perf_counter()
        linears = {name: module for name, module in layer.named_modules() if isinstance(module, torch.nn.Linear)}
        for group in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)):
            mine = {name: m for name, m in linears.items() if name.rpartition(".")[2].removesuffix("_proj") in group}
            hessians = {name: torch.zeros(m.in_features, m.in_features) for name, m in mine.items()}

            def add(name: str) -> Any:
                def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
                    x = args[0].reshape(-1, args[0].shape[-1]).float()
                    hessians[name].addmm_(x.T, x)  # noqa: B023 - removed before the next turn

                return hook

            handles = [m.register_forward_pre_hook(add(name)) for name, m in mine.items()]
            for x in xs:
                layer(x[None], position_embeddings=places)
            for handle in handles:
                handle.remove()
            for name, m in mine.items():
                m.weight.data = reference(m.weight.float(), hessians[name]).to(m.weight.dtype)
        for i, x in enumerate(xs):
            xs[i] = layer(x[None], position_embeddings=places)[0]
        xs.sum().item()
    print(f"the authors' procedure in torch, one block: {time.perf_counter() - began:.2f} s", flush=True)


def gptqmodel(source: Path, blocks: int, calib: np.ndarray) -> None:
    """The first blocks by GPTQModel with its defaults, loading and saving apart."""
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports] - a peer, not a dependency
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    # it asks for a tokenizer, though the calibration is token ids
    Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<unk>"}))
    model = GPTQModel.load(str(source), QuantizeConfig(bits=4, group_size=128), dtype=torch.bfloat16)
    data = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in calib]
    began = time.perf_counter()
    model.quantize(data, batch_size=1)
    print(f"GPTQModel, {blocks} blocks: {time.perf_counter() - began:.2f} s", flush=True)


def peaks() -> str:
    device = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / 2**30
    return f"peaks: {device:.1f} GiB of a device, {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB of the host"


def run(source: Path, destination: Path, calib: np.ndarray, args: argparse.Namespace, traces: Path | None = None, last: int = 0) -> Watch:
    began, watch = time.perf_counter(), Watch(traces, last)
    stores = {"device": ON_DEVICE, "host": ON_HOST, "disk": on_disk(destination.with_name("activations"))}
    mesh = data_mesh(jax.devices()[: args.devices]) if args.devices > 1 else None
    runtime = replace(default_runtime(), store=stores[args.activations], mesh=mesh)
    report = quantize_checkpoint(source, destination, calib, preset(args.preset), progress=watch, runtime=runtime)
    seconds, error = time.perf_counter() - began, np.mean([x.error for x in report.linears])
    print(f"{len(watch.done)} blocks, disk to disk: {seconds:.1f} s; {peaks()}; mean relative error {error:.4f}", flush=True)
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--model", type=Path, help="a checkpoint to quantize instead of random weights")
    parser.add_argument("--blocks", type=int, help="fewer blocks than the shape has")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--traced", type=int, default=3, help="blocks of the first run; all but the first of them are traced")
    parser.add_argument("--activations", choices=["device", "host", "disk"], default="device")
    parser.add_argument("--preset", choices=PRESETS, default="fast", help="plain GPTQ by default")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where there is room for two checkpoints")
    parser.add_argument("--peer", action="store_true", help="also time one block by the procedure of the GPTQ authors' code")
    parser.add_argument("--gptqmodel", action="store_true", help="also quantize the first blocks by GPTQModel, where it is installed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as scratch:
        room = Path(scratch)
        if args.model is None:
            config, source = SHAPES[args.shape] | ({"num_hidden_layers": args.blocks} if args.blocks else {}), room / "model"
            began = time.perf_counter()
            write_random(config, source)
            print(
                f"{args.shape}, random weights, {args.blocks or 'all'} blocks, written in {time.perf_counter() - began:.1f} s", flush=True
            )
            first = first_blocks(source, min(args.traced, config["num_hidden_layers"]), room / "first")
        else:
            config, source, first = json.loads((args.model / "config.json").read_text()), args.model, args.model
        calib = np.random.default_rng(0).integers(0, config["vocab_size"], (args.samples, args.length), np.int32)
        traces = room / "traces"
        cold = run(first, room / "first-quantized", calib, args, traces, args.traced)
        warm = run(source, room / "quantized", calib, args)
        a_block = float(np.median(np.diff(warm.done)))
        print(f"first block, with compiling and reading: {cold.done[0]:.1f} s, without compiling: {warm.done[0]:.1f} s")
        print(f"a block: {a_block:.3f} s, all blocks {warm.done[-1]:.1f} s\n\n{'stage':24s}{'s a block':>10s}")
        for stage, seconds in stages(traces, args.traced - 1).items():
            if seconds > a_block / 500:
                print(f"{stage:24s}{seconds:10.4f}")
        if args.gptqmodel:
            gptqmodel(first, args.traced, calib)
    if args.peer:
        peer(config, args.samples, args.length)


if __name__ == "__main__":
    main()
