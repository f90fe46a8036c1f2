"""Tokens a second of `gptq_fn.generate` and of transformers' generate, for a float model and its quantized copy, in turns.

    python benchmarks/generate.py FLOAT QUANTIZED

Claim: on two CPU cores the quantized model generates faster than the float one in transformers, with this package's layers; packed
it takes half of the time here that it takes unpacked, though longer than the float model. All compute in float32 and take the
likeliest tokens. A step reads every weight once, so the float model's bytes over the memory's bandwidth, printed here, bound it.
Quantized weights are packed here; "unpacked" is the same model as QuantizedLinears, whose blocks each step dequantizes.
transformers uses the kernel chosen here.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import AutoModelForCausalLM

import gptq_fn
from gptq_fn import interop


def unpacked(directory: Path, prompts: np.ndarray) -> Callable[[int], object]:
    return ours(directory, prompts, packed=False)


def ours(directory: Path, prompts: np.ndarray, *, packed: bool = True) -> Callable[[int], object]:
    params, spec = interop.load_gptq(directory, packed=packed)
    params = jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, params)
    tokens = jnp.asarray(prompts, jnp.int32)
    return lambda n: jax.block_until_ready(gptq_fn.generate(spec, params, tokens, n))


def theirs(directory: Path, prompts: np.ndarray) -> Callable[[int], object]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.from_numpy(prompts).long()
    told = {"attention_mask": torch.ones_like(tokens), "do_sample": False, "pad_token_id": 0}
    return lambda n: model.generate(tokens, max_new_tokens=n, min_new_tokens=n, **told)


def seconds(f: Callable[[int], object], n: int) -> float:
    began = time.perf_counter()
    f(n)
    return time.perf_counter() - began


def bandwidth() -> float:
    """GB a second that are read and written when 256 MiB are copied."""
    source, target = np.ones(1 << 25), np.empty(1 << 25)
    np.copyto(target, source)
    return 2 * source.nbytes / 1e9 / min(seconds(lambda _: np.copyto(target, source), 0) for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float", type=Path)
    parser.add_argument("quantized", type=Path)
    parser.add_argument("--prompt", type=int, default=64, help="tokens in a prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to generate")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    prompts = np.random.default_rng(0).integers(100, 1000, (args.batch, args.prompt))
    made = {(what, who.__name__): who(getattr(args, what), prompts) for what in ("float", "quantized") for who in (ours, theirs)}
    made["quantized", "unpacked"] = unpacked(args.quantized, prompts)
    print(f"{torch.get_num_threads()} torch threads, {jax.devices()[0]}, {bandwidth():.0f} GB/s")
    print(f"{args.batch} prompts of {args.prompt} tokens, continued by {args.new}, {args.runs} times in turns", flush=True)
    first = {name: seconds(f, args.new) for name, f in made.items()}
    short = {name: [] for name in made}
    whole = {name: [] for name in made}
    for _ in range(args.runs):
        for name, f in made.items():
            short[name].append(seconds(f, 1))
            whole[name].append(seconds(f, args.new))
    for name in made:
        step = statistics.median((b - a) / (args.new - 1) for a, b in zip(short[name], whole[name], strict=True))
        what, who = name
        print(
            f"{what:>10} {who:>8}  prompt {statistics.median(short[name]):6.2f} s   {args.batch / step:7.1f} tokens/s"
            f"   ({1e3 * step:.1f} ms a step; first call {first[name]:.1f} s)"
        )
    for what in ("float", "quantized"):
        ratio = statistics.median(b / a for a, b in zip(whole[what, "ours"], whole[what, "theirs"], strict=True))
        print(f"{what:>10}: gptq_fn takes 1/{ratio:.2f} of the time of transformers, prompt included")


if __name__ == "__main__":
    main()
