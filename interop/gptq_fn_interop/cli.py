"""The gptq-fn command."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import Positional, Suppress, arg

from gptq_fn import FAMILIES, QuantConfig, Report, Rule
from gptq_fn_interop.cli_kernels import kernels

out = Console()
problems = Console(stderr=True)


Engine = Literal["transformers", "transformers+gptqmodel", "gptqmodel", "vllm", "sglang", "exllamav2", "llama.cpp"]


@dataclass(frozen=True)
class _Options(QuantConfig):
    """The options of QuantConfig, with rules given as text instead. They are checked when a QuantConfig is made of them."""

    group_size: int | Literal["auto"] | None = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Consecutive inputs that share a scale; None means that a whole row does. "auto" is 128 or, with --for, the first of 128,
    64 and 32 that the engine loads."""
    rules: Suppress[tuple[Rule, ...]] = ()

    def __post_init__(self) -> None:
        """Nothing is refused yet."""


def quantize(
    source: Positional[str],
    destination: Positional[Path],
    options: Annotated[_Options, arg(name="")] = _Options(),
    engine: Annotated[Engine | None, arg(name="for")] = None,
    rule: Annotated[tuple[str, ...], arg(metavar="'REGEX => skip | key=value,...'")] = (),
    data: str = "pydoc",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
) -> None:
    """Quantize a checkpoint and write it in the GPTQ format.

    A model type that no row of the table describes is quantized through transformers' own forward, with all of it in memory.

    Args:
        source: A directory with safetensors, or the name of a model on the Hugging Face hub.
        destination: Where to write; it must not exist, and appears when it is complete.
        options: How to quantize.
        engine: Where the result shall load: the group size is chosen for it, and options that it would refuse are refused here, first.
        rule: Exceptions by name, as '.*down_proj => bits=8' or 'model[.]layers[.]0[.] => skip'; the first match wins.
        data: Calibration text: a text file, "pydoc" (CPython's documentation), c4, wikitext2, ultrachat or any hub dataset.
        samples: Number of calibration samples.
        length: Tokens of a calibration sample.
        seed: Chooses the samples.
    """
    from gptq_fn_interop.calib import tokens
    from gptq_fn_interop.hub import local
    from gptq_fn_interop.shards import require_vacant

    began = time.perf_counter()

    def config_of(group_size: int | None) -> QuantConfig:
        base = QuantConfig(**{**{f.name: getattr(options, f.name) for f in fields(QuantConfig)}, "group_size": group_size})
        return replace(base, rules=tuple(parse_rule(text, base) for text in rule))

    config = config_of(128 if options.group_size == "auto" else options.group_size)
    require_vacant(destination)
    directory = local(source)
    if engine:
        config = _fitting(engine, directory, config_of, options.group_size)
    run = _described(directory, config) or _traced(directory)
    calib = tokens(data, directory, samples=samples, length=length, seed=seed)
    with progress("Quantizing blocks") as advance:
        report = run(calib, config, destination, progress=lambda done, total, _: advance(done, total))
    out.print(report.table(report.worst(5)), highlight=False)
    out.print(
        f"{destination}: {len(report.linears)} linears at {report.bits_per_weight:.2f} bits a weight "
        f"in {time.perf_counter() - began:.0f} s; the worst are above, all in report.json."
    )
    if report.rounded:
        out.print(f"{len(report.rounded)} of them saw fewer than {config.min_rows} calibration tokens and were rounded to nearest.")
    if engine:
        from gptq_fn_interop.inspection import inspect

        _say(engine, inspect(destination), str(destination))


def _fitting(engine: str, directory: Path, config_of: Callable[[int | None], QuantConfig], group_size: int | str | None) -> QuantConfig:
    """The configuration whose result the engine will load. Raises ValueError with its reasons where there is none."""
    from gptq_fn_interop.checkpoint import Checkpoint
    from gptq_fn_interop.engines import GROUP_SIZES, config_for, refusals
    from gptq_fn_interop.gptq_format import described_by
    from gptq_fn_interop.inspection import Inspection
    from gptq_fn_interop.stream import open_source

    sizes = GROUP_SIZES if isinstance(group_size, str) else (group_size,)
    config = config_of(sizes[0])
    if Checkpoint(directory).config.get("model_type") in FAMILIES:
        config = config_for(engine, *open_source(directory, config), config_of, sizes)
        if config.group_size != sizes[0]:
            out.print(f"Groups of {config.group_size}: {engine} would not load groups of {sizes[0]} here.", highlight=False)
        return config
    described = described_by(config, head=False)  # of a model that is traced, the linears are not known yet
    if reasons := refusals(engine, Inspection(described, {"quantization_config": described}, (), ())):
        raise ValueError(f"{engine} would not load the result: {'; '.join(map(str, reasons))}.")
    return config


def _say(engine: str, found: Any, name: str) -> None:
    """Tell whether the engine loads an inspected checkpoint: every reason and exit status 1 if it does not."""
    from gptq_fn_interop.engines import refusals

    if reasons := refusals(engine, found):
        out.print(f"{engine} does not load {name}:", highlight=False)
        for reason in reasons:
            out.print(f"- {reason}", highlight=False, markup=False)
        sys.exit(1)
    out.print(f"{engine} loads {name}, as far as the quantization is concerned.", highlight=False)


def _described(directory: Path, config: QuantConfig) -> Callable[..., Report] | None:
    """What quantizes a checkpoint that a row of the table describes, after a look at what headers can tell; None for others."""
    from gptq_fn_interop.checkpoint import Checkpoint
    from gptq_fn_interop.stream import open_source, quantize_checkpoint

    if Checkpoint(directory).config.get("model_type") not in FAMILIES:
        return None
    open_source(directory, config)
    return lambda calib, config, destination, progress: quantize_checkpoint(directory, destination, calib, config, progress=progress)


def _traced(directory: Path) -> Callable[..., Report]:
    """What quantizes any model that transformers can run."""
    from gptq_fn_interop.traced import quantize_traced

    return partial(quantize_traced, _torch_model(directory))


def _torch_model(directory: Path) -> Any:
    """The model as transformers has it. Raises ValueError where it does not; code that comes with a checkpoint is never run."""
    import transformers

    import gptq_fn.interop  # noqa: F401 - transformers then loads quantized checkpoints

    kind = transformers.PreTrainedConfig.get_config_dict(directory)[0].get("model_type")
    if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"No row of the table describes model_type {kind!r}, and transformers has no such causal language model. Code that comes "
            "with a checkpoint is never run; describe the model by hand: see docs/own_architecture.md."
        )
    out.print(f"No row of the table describes {kind} models: running transformers' own forward.", highlight=False)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=False).eval()


def _predictor(directory: Path) -> Any:
    """What predicts as the model in this directory does."""
    from gptq_fn_interop.checkpoint import Checkpoint
    from gptq_fn_interop.stream import load_gptq

    if Checkpoint(directory).config.get("model_type") in FAMILIES:
        return load_gptq(directory)
    import torch

    from gptq_fn_interop.tensors import to_jax

    model = _torch_model(directory)

    @torch.no_grad()
    def predict(tokens: Any) -> Any:
        return to_jax(model(torch.tensor(np.asarray(tokens), dtype=torch.long)).logits.float())

    return predict


def parse_rule(text: str, base: QuantConfig) -> Rule:
    """A rule from 'REGEX => skip' or 'REGEX => key=value,...', which changes `base`. Raises ValueError."""
    pattern, arrow, action = (part.strip() for part in text.partition("=>"))
    if not arrow or not action:
        raise ValueError(f"A rule reads 'REGEX => skip' or 'REGEX => bits=8,group_size=32'; got {text!r}.")
    if action == "skip":
        return Rule(pattern)
    pairs = [pair.partition("=") for pair in action.split(",")]
    hints = get_type_hints(QuantConfig)
    changes = {}
    for key, _, value in pairs:
        key = key.strip().replace("-", "_")
        if key not in hints or key == "rules":
            raise ValueError(f"The rule {text!r} sets {key!r}; a rule may set {', '.join(k for k in hints if k != 'rules')}.")
        changes[key] = _value(value.strip())
    return Rule(pattern, replace(base, rules=(), **changes))


def _value(text: str) -> Any:
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def evaluate(
    model: Positional[str],
    data: str = "pydoc",
    reference: str | None = None,
    samples: int = 32,
    length: int = 512,
) -> None:
    """Measure perplexity on held-out text and, against a float model, the divergence of the predictions.

    Args:
        model: A directory with a float or quantized checkpoint, or the name of a model on the hub.
        data: Held-out text: a text file, "pydoc" (the half that calibration never sees), wikitext2, c4 or any hub dataset.
        reference: The float model, for KL(reference || model) per token and top-1 agreement.
        samples: Number of samples.
        length: Tokens of a sample.
    """
    from gptq_fn_interop import evaluation
    from gptq_fn_interop.calib import tokens
    from gptq_fn_interop.hub import local

    directory = local(model)
    other = None if reference is None else _predictor(local(reference))
    text = tokens(data, directory, samples=samples, length=length, split="evaluation", seed=None)
    with progress("Evaluating samples") as advance:
        found = evaluation.evaluate(_predictor(directory), text, other, progress=advance)
    table = Table("measure", "value", title=f"{model} on {found.tokens} tokens of {data}")
    table.add_row("perplexity", f"{found.perplexity:.3f}")
    table.add_row("negative log likelihood, nats a token", f"{found.nll:.4f}")
    if found.kl is not None:
        table.add_row("KL from the reference, nats a token", f"{found.kl:.4f} ± {found.kl_error:.4f}")
        table.add_row("top-1 agreement", f"{found.agreement:.1%}")
    out.print(table)


def inspect(model: Positional[str], engine: Annotated[Engine | None, arg(name="for")] = None) -> None:
    """Tell what a quantized checkpoint holds and which engines would load it.

    Args:
        model: A directory with a quantized checkpoint, or the name of one on the hub.
        engine: Tell of this engine alone, with every reason, and exit with status 1 if it does not load the checkpoint.
    """
    from gptq_fn_interop import inspection
    from gptq_fn_interop.engines import ENGINES, refusals
    from gptq_fn_interop.hub import local

    found = inspection.inspect(local(model))
    if engine:
        return _say(engine, found, model)
    for scheme, count in found.schemes().most_common():
        out.print(f"{count} linears: {scheme}", highlight=False)
    size = sum(x.bytes for x in found.linears)
    out.print(f"{size / 1e6:.1f} MB quantized, {found.other_bytes / 1e6:.1f} MB of other tensors", highlight=False)
    out.print(f"zero points: {', '.join(sorted({x.zeros for x in found.linears}))}", highlight=False)
    table = Table("engine", "loads it", "why not")
    for name in ENGINES:
        reasons = refusals(name, found)
        more = f"; and {len(reasons) - 1} more, told by --for {name}" if len(reasons) > 1 else ""
        table.add_row(name, "no" if reasons else "yes", f"{reasons[0]}{more}" if reasons else "")
    out.print(table)


@contextmanager
def progress(title: str):
    """A progress bar with an estimate; yields a function of (done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=problems) as bar:
        task = bar.add_task(title, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield advance


COMMANDS: dict[str, Callable[..., None]] = {"quantize": quantize, "eval": evaluate, "inspect": inspect, "kernels": kernels}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command; errors are one sentence and exit status 1."""
    try:
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="gptq-fn", description="GPTQ quantization of language models.", args=args)
    except (ValueError, OSError) as error:
        problems.print(f"gptq-fn: {error}", style="red", highlight=False, markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        problems.print("gptq-fn: interrupted; nothing was left behind.", style="red")
        sys.exit(130)


if __name__ == "__main__":
    main()
