"""Quantize a checkpoint from disk to disk with one block in memory, some linears in other ways than the rest.

    python examples/disk_to_disk.py
    python examples/disk_to_disk.py --model Qwen/Qwen2-7B-Instruct --destination qwen2-4bit --data c4

A run that is cut off is continued by the same command with `--resume`. On the command line `gptq-fn quantize` does the same:
gptq-fn quantize MODEL DESTINATION --rule '.*down_proj => bits=8' --activations disk
"""

import resource
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import tyro
from gptq_fn_interop.console import progress
from gptq_fn_interop.runtime import default_runtime
from models import BUILD, float_model

from gptq_fn import Rule, interop, preset


def main(
    model: str | None = None,
    destination: Path = BUILD / "disk-to-disk",
    data: str = "pydoc",
    samples: int = 32,
    length: int = 512,
    resume: bool = False,
) -> None:
    """Quantize a checkpoint to 4 bits, its linears called down_proj to 8.

    Args:
        model: A directory or a model on the hub; SmolLM2-135M-Instruct by default.
        destination: Where the quantized checkpoint goes; it must not exist, and appears when it is complete.
        data: Calibration text: a text file, "pydoc" (CPython's own documentation), c4, wikitext2 or any hub dataset.
        samples: How many calibration samples.
        length: Tokens of a calibration sample.
        resume: Continue a run of the same command that was cut off.
    """
    source = float_model(model)
    calib = interop.tokens(data, source, samples=samples, length=length)
    config = preset("default", bits=4, group_size=128)
    config = replace(config, rules=(Rule(".*[.]down_proj", replace(config, bits=8)),))  # Rule(pattern, None) would leave them as they are
    destination.parent.mkdir(parents=True, exist_ok=True)

    # Activations of the samples wait in a directory, where `runtime` says so, instead of in memory.
    with TemporaryDirectory(prefix="activations-", dir=destination.parent) as waiting, progress("Quantizing blocks") as advance:
        report = interop.quantize_checkpoint(
            source,
            destination,
            calib,
            config,
            progress=advance,
            runtime=replace(default_runtime(), store=interop.on_disk(waiting)),
            resume=resume,
        )

    print(report.table(report.worst(3)))
    for scheme, count in interop.inspect(destination).schemes().items():
        print(f"{count} linears: {scheme}")
    before, after = (sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e6 for path in (source, destination))
    print(
        f"{before:.1f} MB became {after:.1f} MB, with at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:.0f} MB of memory"
    )


if __name__ == "__main__":
    tyro.cli(main)
