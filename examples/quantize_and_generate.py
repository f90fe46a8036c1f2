"""Quantize a model in memory, save it, load it and let it speak: the first example of AutoGPTQ's README in our API.

    python examples/quantize_and_generate.py
    python examples/quantize_and_generate.py --model facebook/opt-125m --destination opt-125m-4bit

It is short because nothing has to be said: the preset chooses how to quantize, and calibration text is CPython's own
documentation. `from_autogptq.py` is the same program in AutoGPTQ's words, `disk_to_disk.py` serves models that are larger
than memory.
"""

from pathlib import Path
from typing import Any

import torch
import tyro
from gptq_fn_interop.console import progress
from models import BUILD, float_model, fresh
from transformers import AutoModelForCausalLM, AutoTokenizer, TextGenerationPipeline

from gptq_fn import interop, preset

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main(model: str | None = None, destination: Path | None = None, prompt: str = "Quantization is", samples: int = 32, length: int = 512):
    """Quantize a model to 4 bits in groups of 128 and continue a prompt.

    Args:
        model: A directory or a model on the hub; SmolLM2-135M-Instruct by default.
        destination: Where the quantized model goes; it must not exist.
        prompt: What the model continues.
        samples: How many calibration samples.
        length: Tokens of a calibration sample.
    """
    source = float_model(model)
    destination = destination or fresh(BUILD / f"{source.name}-4bit")
    tokenizer = AutoTokenizer.from_pretrained(source)
    quantized: Any = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    calib = interop.tokens("pydoc", tokenizer, samples=samples, length=length)

    with progress("Quantizing blocks") as advance:
        report = interop.quantize_model(quantized, calib, preset("default", bits=4, group_size=128), progress=advance)
    print(f"{len(report.linears)} linears at {report.bits_per_weight:.2f} bits a weight; those with the largest errors:")
    print(report.table(report.worst(3)))
    quantized.save_pretrained(destination)
    tokenizer.save_pretrained(destination)

    loaded: Any = AutoModelForCausalLM.from_pretrained(destination, dtype="auto")
    loaded.to(DEVICE)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(DEVICE)
    print("generate:", tokenizer.decode(loaded.generate(**inputs, max_new_tokens=24, do_sample=False)[0]))
    pipeline = TextGenerationPipeline(model=loaded, tokenizer=tokenizer)
    print("pipeline:", pipeline(prompt, max_new_tokens=24, do_sample=False)[0]["generated_text"])
    print(f"The quantized model is in {destination}")


if __name__ == "__main__":
    tyro.cli(main)
