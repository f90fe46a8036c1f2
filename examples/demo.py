"""Quantize a real model, measure it, and let it speak: what `make demo` runs."""

import argparse
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.console import progress
from gptq_fn_interop.evaluation import evaluate
from gptq_fn_interop.stream import load_gptq, quantize_checkpoint
from models import float_model, fresh

from gptq_fn import preset

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a directory or a model on the hub; SmolLM2-135M-Instruct by default")
    parser.add_argument("--data", default="pydoc", help="text to calibrate on and, another part of it, to evaluate on")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--samples", type=int, default=32, help="calibration samples of 512 tokens")
    parser.add_argument("--build", type=Path, default=Path(__file__).parent.parent / "build", help="where results go")
    args = parser.parse_args()

    source = float_model(args.model, args.build)
    destination = fresh(args.build / f"{source.name}-gptq-{args.bits}bit")
    config = preset("default", bits=args.bits, group_size=args.group_size)
    calib = tokens(args.data, source, samples=args.samples, length=512)
    held_out = tokens(args.data, source, samples=16, length=512, split="evaluation", seed=None)

    began = time.perf_counter()
    with progress("Quantizing blocks") as advance:
        report = quantize_checkpoint(source, destination, calib, config, progress=advance)
    seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    with progress("Evaluating both models") as advance:
        found = evaluate(load_gptq(destination), held_out, load_gptq(source), progress=advance)
    assert found.reference_nll is not None

    table = Table("", "float", f"{config.bits}-bit, group {config.group_size}", title=str(source.name))
    table.add_row("perplexity on held-out text", f"{math.exp(found.reference_nll):.2f}", f"{found.perplexity:.2f}")
    table.add_row("KL from the float model, nats a token", "", f"{found.kl:.4f}")
    table.add_row("checkpoint, MB", f"{megabytes(source):.1f}", f"{megabytes(destination):.1f}")
    table.add_row("bits a quantized weight", "", f"{report.bits_per_weight:.2f}")
    table.add_row("seconds to quantize", "", f"{seconds:.1f}")
    table.add_row("peak memory, GiB", "", f"{peak:.2f}")
    console.print(table)
    console.print("The linears with the largest errors:")
    console.print(report.table(report.worst(5)), highlight=False)
    console.print(f"\nThe quantized model, in transformers: {speak(destination)}", highlight=False, markup=False)
    console.print(f"\nThe checkpoint is in {os.path.relpath(destination)}")


def megabytes(directory: Path) -> float:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6


def speak(directory: Path) -> str:
    """What the checkpoint answers when transformers loads it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import gptq_fn.interop  # noqa: F401 - lets transformers read GPTQ checkpoints

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="bfloat16")  # what CPUs multiply fastest with int4
    question = "What is the capital of France, and what is it known for?"
    if tokenizer.chat_template:
        question = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(question, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=40, do_sample=False)
    return tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


if __name__ == "__main__":
    main()
