"""Calibrate a chat model on what it will see: instructions in Alpaca's form, written with the model's own chat template.

    python examples/instructions.py
    python examples/instructions.py --model Qwen/Qwen2-7B-Instruct --data alpaca_data.json --samples 512

The file is a JSON list of {"instruction": ..., "input": ..., "output": ...}, or of conversations, which are lists of
{"role": ..., "content": ...}. Samples keep their own lengths: none is padded or cut into windows. The file that comes with this
example has two dozen short answers, which is enough to see it run; take hundreds of your own.
"""

import json
import random
from pathlib import Path
from typing import Any

import tyro
from gptq_fn_interop.console import progress
from models import BUILD, float_model, fresh
from transformers import AutoTokenizer

from gptq_fn import interop, preset

SYSTEM = "You are a helpful assistant."
PLAIN = "### Instruction:\n{0}\n\n### Response:\n{1}"
"""What stands in for the chat template of a model that has none."""


def main(
    model: str | None = None,
    data: Path = Path(__file__).parent / "data" / "instructions.json",
    destination: Path | None = None,
    bits: int = 4,
    samples: int = 128,
    length: int = 2048,
) -> None:
    """Quantize a model that is calibrated on instructions and their answers.

    Args:
        model: A directory or a model on the hub; SmolLM2-135M-Instruct by default.
        data: A JSON file of instructions or conversations.
        destination: Where the quantized checkpoint goes; it must not exist.
        bits: Bits of a code.
        samples: How many conversations at most; which ones is drawn.
        length: Tokens of a conversation at most.
    """
    source = float_model(model)
    destination = destination or fresh(BUILD / f"{source.name}-instructions-{bits}bit")
    tokenizer = AutoTokenizer.from_pretrained(source)
    conversations = [conversation(record) for record in json.loads(data.read_text("utf-8"))]
    chosen = random.Random(0).sample(conversations, min(samples, len(conversations)))
    calib = [tokenizer(text_of(messages, tokenizer), add_special_tokens=False)["input_ids"][:length] for messages in chosen]
    print(f"{len(calib)} conversations of {min(map(len, calib))} to {max(map(len, calib))} tokens, {sum(map(len, calib))} together")

    with progress("Quantizing blocks") as advance:
        config = preset("default", bits=bits, group_size=128)  # type: ignore[arg-type]
        report = interop.quantize_checkpoint(source, destination, calib, config, progress=advance)
    print(report.table(report.worst(3)))
    print(f"The quantized model is in {destination}")


def conversation(record: Any) -> list[dict[str, str]]:
    """The messages of a record, which may be a conversation already."""
    if isinstance(record, list):
        return record
    asked = "\n".join(text for text in (record["instruction"], record.get("input")) if text)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked}, {"role": "assistant", "content": record["output"]}]


def text_of(messages: list[dict[str, str]], tokenizer: Any) -> str:
    """A conversation as the model reads it."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    said = [message["content"] for message in messages if message["role"] != "system"]
    return "\n\n".join(PLAIN.format(*turn) for turn in zip(said[::2], said[1::2], strict=False))


if __name__ == "__main__":
    tyro.cli(main)
