"""Perplexity of a float model and a quantized one on the same held-out text, and how far their predictions lie apart.

    python examples/perplexity.py
    python examples/perplexity.py --model Qwen/Qwen2-7B-Instruct --quantized qwen2-4bit --data wikitext2

Without `--quantized`, the model in 4 bits that `make demo` leaves is measured, or made first, which takes some minutes more.
"""

from pathlib import Path

import tyro
from models import float_model, in_4_bits
from rich.console import Console
from rich.table import Table

from gptq_fn import interop


def main(model: str | None = None, quantized: Path | None = None, data: str = "pydoc", samples: int = 16, length: int = 512) -> None:
    """Measure a float model and a quantized one.

    Args:
        model: The float model, a directory or a name on the hub; SmolLM2-135M-Instruct by default.
        quantized: The directory of the quantized one.
        data: Held-out text: a text file, "pydoc" (the half of CPython's documentation that calibration never sees), wikitext2, c4.
        samples: How many samples of it.
        length: Tokens of a sample.
    """
    source = float_model(model)
    text = interop.tokens(data, source, samples=samples, length=length, split="evaluation", seed=None)
    reference = interop.load_gptq(source)
    before = interop.evaluate(reference, text)
    after = interop.evaluate(interop.load_gptq(quantized or in_4_bits(source)), text, reference)

    table = Table("", "float", "quantized", title=f"{source.name} on {after.tokens} tokens of {data}")
    table.add_row("perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")
    table.add_row("KL from the float model, nats a token", "", f"{after.kl:.4f} ± {after.kl_error:.4f}")
    table.add_row("the same likeliest token", "", f"{after.agreement:.1%}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
