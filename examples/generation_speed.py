"""Tokens a second of language models in 16 bits and with quantized weights, along every way there is to generate.

    python examples/generation_speed.py                      # Llama-7B and Llama-3-8B shapes, on a GPU of 80 GB
    python examples/generation_speed.py --shape tiny --device cpu --max-new-tokens 16

Weights are random and made on the device, since speed does not depend on them: no model is fetched. The ways:

  generate   transformers' `generate`, with each number of beams
  captured   transformers' model with a static cache; one decode step in a CUDA graph that is replayed for each token
  compiled   the same, but torch.compile has fused the step's small programs before; only if it is asked for, since it takes a minute
  jax        `gptq_fn.generate`, on the same weights

Every figure is of whole texts, prompts included, but without what is done once: compiling, capturing, packing.
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from gptq_fn_kernels.words import pack, unpack, words_of
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache

import gptq_fn
from gptq_fn import interop, kernels

SHAPES: dict[str, dict[str, Any]] = {
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000},
    "llama-3-8b": {
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 128256},
        **{"num_key_value_heads": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    },
    "tiny": {
        **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256},
        "num_key_value_heads": 2,
    },
}

Text = Callable[[int], list[list[int]]]
"""How many tokens to add -> the texts."""

console = Console()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=["llama-7b", "llama-3-8b"], choices=SHAPES)
    parser.add_argument("--weights", nargs="+", default=["dense", "int"], choices=("dense", "int"), help="the model as it is, or quantized")
    parser.add_argument("--paths", nargs="+", default=["generate", "captured", "jax"], choices=("generate", "captured", "compiled", "jax"))
    parser.add_argument("--num-samples", type=int, default=1, help="how often each text is generated; the median counts")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--generate-tokens", type=int, help="another number of new tokens for transformers' generate, which is slow")
    parser.add_argument("--num-beams", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--bits", type=int, default=4, choices=(2, 3, 4, 8))
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--backend", help="the kernel by its name, where the first that serves is not meant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", action="store_true", help="tell what the time of a captured step goes to")
    parser.add_argument("--json", type=Path, help="where to write the figures and the tokens")
    args = parser.parse_args(argv)
    args.dtype = getattr(torch, args.dtype)

    found = []
    for shape in args.shape:
        for weights in args.weights:
            torch.manual_seed(0)
            model = random_model(shape, args)
            if weights == "int":
                quantize(model, args)
            prompts = torch.randint(1, model.config.vocab_size, (args.batch_size, args.prompt), device=args.device)
            for path, beams, text, n, before in ways(model, prompts, args):
                row = {"shape": shape, "weights": weights, "path": path, "beams": beams, **measured(text, n, before, args)}
                found.append(row)
                same = agreement(row["tokens"], next(r["tokens"] for r in found if (r["shape"], r["weights"]) == (shape, weights)))
                about = f"{path}, {beams} beams" if beams else path
                more = "" if beams not in (None, 1) else f"; {same - args.prompt} of {n} as the first way"
                console.print(f"{shape} {weights}: {about}: {row['tokens_per_second']:.1f} tokens/s{more}", highlight=False)
                del text
                free()
                if args.json:
                    args.json.write_text(json.dumps(found))
            del model
            free()
    for shape in args.shape:
        console.print(table_of(shape, [row for row in found if row["shape"] == shape], args))


def random_model(shape: str, args: argparse.Namespace) -> Any:
    """A float model of this shape, in evaluation mode, on the device."""
    none: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = LlamaConfig(**SHAPES[shape], **none, max_position_embeddings=args.prompt + args.max_new_tokens + 64)
    with torch.device(args.device):
        return AutoModelForCausalLM.from_config(config, dtype=args.dtype).eval().requires_grad_(False)


def quantize(model: Any, args: argparse.Namespace) -> None:
    """Put a QuantLinear of random codes in the place of each linear of the blocks; its weights are spread like the random ones."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            tensors = random_tensors(module.out_features, module.in_features, model.config.initializer_range, args)
            model.set_submodule(name, interop.QuantLinear(tensors, args.bits, {"bits": args.bits, "sym": True}, args.backend).eval())


def random_tensors(out: int, inputs: int, spread: float, args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """What a symmetric checkpoint of format v1 holds of a linear without a bias."""
    bits, device, groups = args.bits, args.device, -(-inputs // args.group_size)
    zeros = torch.full((out, groups), 2 ** (bits - 1) - 1, dtype=torch.int32, device=device)
    signs = 2 * torch.randint(0, 2, (groups, out), device=device) - 1
    scale = spread * 12**0.5 / 2**bits  # the standard deviation of whole numbers below 2^bits is 2^bits / sqrt(12)
    return {
        "qweight": torch.randint(-(2**31), 2**31, (words_of(inputs, bits), out), dtype=torch.int32, device=device),
        "qzeros": pack(zeros, bits, torch).T.contiguous(),
        # Of either sign: codes are half a step below their zero point on average, which would add up until float16 overflows.
        "scales": (scale * (0.5 + torch.rand(groups, out, device=device)) * signs).to(args.dtype),
        "g_idx": torch.arange(inputs, dtype=torch.int32, device=device) // args.group_size,
    }


def ways(model: Any, prompts: torch.Tensor, args: argparse.Namespace) -> Any:
    """(path, beams, what generates that way, how many tokens, how many before time counts) of each way, made when it is its turn."""
    if "captured" in args.paths:
        yield "captured", None, captured(model, model, prompts, args), args.max_new_tokens, 8
    if "compiled" in args.paths:
        yield "compiled", None, captured(model, torch.compile(model, fullgraph=True, dynamic=False), prompts, args), args.max_new_tokens, 8
    if "generate" in args.paths:
        for beams in args.num_beams:
            yield "generate", beams, plain(model, prompts, beams), args.generate_tokens or args.max_new_tokens, 8
    if "jax" in args.paths:
        yield "jax", None, in_jax(model, prompts, args), args.max_new_tokens, args.max_new_tokens  # programs depend on the length


def plain(model: Any, prompts: torch.Tensor, beams: int) -> Text:
    """transformers' generate, as anyone calls it."""
    told = {"attention_mask": torch.ones_like(prompts), "do_sample": False, "num_beams": beams, "pad_token_id": 0}

    @torch.inference_mode()
    def text(n: int) -> list[list[int]]:
        return model.generate(prompts, max_new_tokens=n, min_new_tokens=n, **told).tolist()

    return text


def captured(model: Any, stepping: Any, prompts: torch.Tensor, args: argparse.Namespace) -> Text:
    """Prompts through the model, then replays of a captured step of the model `stepping`, which reads the newest tokens and writes
    the next ones.

    On a CPU the step is called instead.
    """
    cache = StaticCache(config=model.config, max_cache_len=prompts.shape[1] + args.max_new_tokens + 8)
    newest = torch.zeros(len(prompts), 1, dtype=torch.long, device=prompts.device)

    @torch.no_grad()
    def step(tokens: torch.Tensor = newest, through: Any = stepping) -> None:
        logits = through(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        newest.copy_(logits[:, -1].argmax(-1, keepdim=True))

    step(prompts, model)
    replay = step if prompts.device.type == "cpu" else captured_in_graph(step)

    @torch.no_grad()
    def text(n: int) -> list[list[int]]:
        cache.reset()
        step(prompts, model)
        found = [prompts, newest.clone()]
        for _ in range(n - 1):
            replay()
            found.append(newest.clone())
        return torch.cat(found, 1).tolist()

    if args.profile:
        tell_where_time_goes(lambda: [replay() for _ in range(5)], 5, args.device)
    return text


def captured_in_graph(step: Callable[[], None]) -> Callable[[], None]:
    """What replays the step. It runs three times before, so that nothing is left to compile or to allocate."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay


def in_jax(model: Any, prompts: torch.Tensor, args: argparse.Namespace) -> Text:
    """gptq_fn's own generate, on a copy of the weights: quantized ones stay packed."""
    import jax

    params, spec = in_jax_arrays(model)
    tokens = interop.to_jax(prompts.int())

    def text(n: int) -> list[list[int]]:
        return jax.block_until_ready(gptq_fn.generate(spec, params, tokens, n)).tolist()

    if args.profile and args.device != "cpu":  # XLA's work on a CPU is no operation of torch
        text(64)
        tell_where_time_goes(lambda: text(64), 64, args.device)
    return text


def in_jax_arrays(model: Any) -> tuple[dict[str, Any], gptq_fn.ModelSpec]:
    """What `interop.from_hf` followed by `kernels.pack` gives, but codes are unpacked on the device, not on the host."""
    import jax.numpy as jnp

    spec = gptq_fn.spec_from_config(json.loads(model.config.to_json_string()))

    def leaf(name: str) -> Any:
        module = model.get_submodule(name)
        if not isinstance(module, interop.QuantLinear):
            return {"weight": interop.to_jax(module.weight)}
        packed = module.packed
        return gptq_fn.QuantizedLinear(
            codes=unpack(interop.to_jax(packed.qweight), packed.bits, packed.k, jnp).T.astype(jnp.uint8),
            scale=interop.to_jax(packed.scales.T),
            zero=interop.to_jax(packed.zeros.T.to(torch.uint8)),
            group_of=interop.to_jax(packed.g_idx),
            bits=packed.bits,
        )

    def block(i: int) -> dict[str, Any]:
        names = [*spec.blocks[i].norms, *((linear.role, linear.name) for linear in spec.blocks[i].linears)]
        return kernels.pack_roles({role: leaf(spec.prefix.format(i=i) + name) for role, name in names if name})

    top = {role: leaf(name) for role, name in spec.tensors if name and not (role == "head" and spec.tied)}
    return {"top": top, "blocks": [block(i) for i in range(len(spec.blocks))]}, spec


def measured(text: Text, n: int, before: int, args: argparse.Namespace) -> dict[str, Any]:
    """The median rate of `n` new tokens, after a text of `before` which compiles what is not compiled yet, and the tokens."""
    tokens = text(min(n, before))
    seconds = []
    for _ in range(args.num_samples):
        synchronize(args.device)
        began = time.perf_counter()
        tokens = text(n)
        seconds.append(time.perf_counter() - began)
    return {"tokens_per_second": args.batch_size * n / statistics.median(seconds), "new": n, "seconds": seconds, "tokens": tokens}


def tell_where_time_goes(run: Callable[[], object], steps: int, device: str) -> None:
    """The ten kernels, whosever they are, that a run of so many steps spends most of its time in."""
    on_gpu = device != "cpu"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        began = time.perf_counter()
        run()
        synchronize(device)
        seconds = time.perf_counter() - began
    each = [(e.self_device_time_total if on_gpu else e.self_cpu_time_total, e.count, e.key) for e in found.key_averages()]
    total = sum(spent for spent, _, _ in each)
    title = f"A step of {1e6 * seconds / steps:.0f} us, {total / steps:.0f} of it in kernels"
    table = Table("us", "of kernels", "calls", "kernel", title=title)
    for spent, count, name in sorted(each, reverse=True)[:10]:
        table.add_row(f"{spent / steps:.1f}", f"{spent / total:.1%}", f"{count / steps:g}", name[:90])
    console.print(table)


def table_of(shape: str, rows: list[dict[str, Any]], args: argparse.Namespace) -> Table:
    """Rates of every way, and how many times the dense model's they are."""
    title = f"{shape}, {args.batch_size} x {args.prompt} tokens and {args.max_new_tokens} more: tokens a second"
    dense, quantized = str(args.dtype).removeprefix("torch."), f"{args.bits} bits"
    table = Table("", dense, quantized, "ratio", "of the best in transformers", title=title)
    rates = {(row["path"], row["beams"], row["weights"]): row["tokens_per_second"] for row in rows}
    best = max((rate for (path, beams, weights), rate in rates.items() if weights == "dense" and path != "jax"), default=None)
    for path, beams in dict.fromkeys((path, beams) for path, beams, _ in rates):
        one, other = rates.get((path, beams, "dense")), rates.get((path, beams, "int"))
        cells = [f"{rate:.1f}" if rate else "" for rate in (one, other)]
        ratios = [f"{other / rate:.2f}" if other and rate else "" for rate in (one, best)]
        table.add_row(f"{path}, {beams} beams" if beams else path, *cells, *ratios)
    return table


def agreement(texts: list[list[int]], others: list[list[int]]) -> int:
    """How many tokens all texts begin with that the other ones begin with, too; rounding makes them part in the end."""
    a, b = torch.tensor(texts), torch.tensor(others)
    n = min(a.shape[1], b.shape[1])
    return int((a[:, :n] == b[:, :n]).int().cumprod(1).sum(1).min())


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def free() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
