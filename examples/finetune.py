"""Fine-tune a quantized model with LoRA, and watch held-out text become likelier. `pip install peft` first.

    python examples/finetune.py build/smollm2-gptq-4bit

trains on half of CPython's own documentation and measures on the other half. Without a directory, SmolLM2-135M-Instruct
is fetched and quantized first, which takes some minutes more.
"""

import argparse
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.console import progress
from models import float_model, fresh, in_4_bits

import gptq_fn.interop  # noqa: F401 - lets transformers read GPTQ checkpoints

console = Console()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, help="the directory of a GPTQ checkpoint; SmolLM2 in 4 bits by default")
    parser.add_argument("--data", default="pydoc", help="text to train on and, another part of it, to measure on")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2, help="samples in a step")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sample")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-3, help="the learning rate at the start; it falls to nothing")
    parser.add_argument("--build", type=Path, default=Path(__file__).parent.parent / "build", help="where results go")
    args = parser.parse_args()

    source = args.model or in_4_bits(float_model(None, args.build), args.build)
    samples = torch.from_numpy(tokens(args.data, source, samples=args.steps * args.batch, length=args.length)).long()
    held_out = torch.from_numpy(tokens(args.data, source, samples=16, length=args.length, split="evaluation", seed=None)).long()
    destination = fresh(args.build / f"{source.name}-lora")

    torch.manual_seed(0)
    base: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    trainable, _ = model.get_nb_trainable_parameters()

    before = perplexity(model, held_out, "Measuring the quantized model")
    began = time.perf_counter()
    losses = train(model, samples.reshape(args.steps, args.batch, args.length), args.rate)
    seconds = time.perf_counter() - began
    after = perplexity(model, held_out, "Measuring it with the adapter")
    model.save_pretrained(str(destination))

    table = Table("", source.name, "with LoRA", title=f"{args.steps} steps of {args.batch} x {args.length} tokens")
    table.add_row("perplexity on held-out text", f"{before:.2f}", f"{after:.2f}")
    table.add_row("loss, first and last ten steps", f"{np.mean(losses[:10]):.3f}", f"{np.mean(losses[-10:]):.3f}")
    table.add_row("trained parameters", "", f"{trainable:,}")
    table.add_row("seconds to train", "", f"{seconds:.1f}")
    table.add_row("peak memory, GiB", "", f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f}")
    console.print(table)
    console.print(f"The adapter is in {os.path.relpath(destination)}; PeftModel.from_pretrained(model, directory) puts it on again.")


def train(model: Any, batches: torch.Tensor, rate: float) -> list[float]:
    """The loss of each step: one pass over `batches` [steps, batch, time] with AdamW and a cosine schedule."""
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, len(batches))
    losses = []
    model.train()
    with progress("Training") as advance:
        for step, batch in enumerate(batches):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            adamw.step()
            schedule.step()
            adamw.zero_grad()
            losses.append(loss.item())
            advance(step + 1, len(batches))
    return losses


@torch.no_grad()
def perplexity(model: Any, samples: torch.Tensor, title: str) -> float:
    """exp of the mean negative log likelihood of the tokens of `samples` [n, time], each after those before it."""
    model.eval()
    batches = samples.split(4)  # each forward pass dequantizes every weight once
    total = 0.0
    with progress(title) as advance:
        for i, batch in enumerate(batches):
            total += len(batch) * model(input_ids=batch, labels=batch).loss.item()
            advance(i + 1, len(batches))
    return math.exp(total / len(samples))


if __name__ == "__main__":
    main()
