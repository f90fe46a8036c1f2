"""Perplexity of a float model and a quantized one on the same held-out text, and how far their predictions lie apart.

    python examples/perplexity.py
    python examples/perplexity.py --model Qwen/Qwen2-7B-Instruct --quantized qwen2-4bit --data wikitext2 --form chunks

A perplexity depends on how the text is cut: "strided" is the loop of transformers' page on perplexity, "chunks" what llama.cpp
measures. Compare figures of one form and one length only. Without `--quantized`, the model in 4 bits that `make demo` leaves is
measured, or made first, which takes some minutes more. `gptq-fn eval` measures the same on the command line.
"""

import math
from pathlib import Path
from typing import Literal

import tyro
from gptq_fn_interop.console import progress
from gptq_fn_interop.windows import chunks, prefix, strided, text_tokens
from models import float_model, in_4_bits
from rich.console import Console
from rich.table import Table

from gptq_fn import interop


def main(
    model: str | None = None,
    quantized: Path | None = None,
    data: str = "pydoc",
    form: Literal["strided", "chunks"] = "strided",
    samples: int = 16,
    length: int = 512,
) -> None:
    """Measure a float model and a quantized one.

    Args:
        model: The float model, a directory or a name on the hub; SmolLM2-135M-Instruct by default.
        quantized: The directory of the quantized one.
        data: Held-out text: a text file, "pydoc" (the half of CPython's documentation that calibration never sees), wikitext2, c4.
        form: How the text is cut into windows, of which strided ones begin half a length apart.
        samples: The text has so many times `length` tokens.
        length: Tokens of a window.
    """
    source = float_model(model)
    text = text_tokens(data, source, samples * length)
    windows = strided(text, length, length // 2) if form == "strided" else chunks(text, length, prefix(source))
    params = interop.load_gptq(quantized or in_4_bits(source))
    with progress("Measuring windows") as advance:
        found = interop.evaluate(params, windows, interop.load_gptq(source), progress=advance)

    assert found.reference_nll is not None
    table = Table("", "float", "quantized", title=f"{source.name} on {found.tokens} tokens of {data}, {form}, {length} long")
    table.add_row("perplexity", f"{math.exp(found.reference_nll):.3f}", f"{found.perplexity:.3f} ± {found.perplexity_error:.3f}")
    table.add_row("KL from the float model, nats a token", "", f"{found.kl:.4f} ± {found.kl_error:.4f}")
    table.add_row("the same likeliest token", "", f"{found.agreement:.1%}")
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
