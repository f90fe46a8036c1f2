"""The gptq-fn quantize command."""

import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import jax
import numpy as np
from jax.sharding import Mesh
from tyro.conf import Positional, Suppress, arg

from gptq_fn import FAMILIES, ON_DEVICE, ON_HOST, ModelSpec, Preset, QuantConfig, Refinement, Report, Rule, Runtime, Search, preset
from gptq_fn_interop.console import flowing, out, progress
from gptq_fn_interop.report import PAGE, Origin, read_report, write_page

Engine = Literal["transformers", "transformers+gptqmodel", "gptqmodel", "vllm", "sglang", "exllamav2", "llama.cpp"]


@flowing
@dataclass(frozen=True)
class _Options(QuantConfig):
    """The options of QuantConfig, with rules given as text instead. They are checked when a QuantConfig is made of them.

    Args:
        group_size: Consecutive inputs that share a scale; None means that a whole row does. "auto" is 128 or, with --for, the first
            of 128, 64 and 32 that the engine loads.
        grid: How a group's scale is chosen: cover the range ("minmax"), or search for what makes an error least: that of rounding
            ("mse"), the same weighted by what each column's error costs ("hid"), or the error that GPTQ itself makes in the group
            ("loop"; the slowest).
        negative_scales: Whether symmetric grids that are searched for may get negative scales.
        refine: What follows the pass over the columns, in this order and as often as named: better codes ("descent"), better scales
            ("refit").
        alpha: How much of what rounding before a linear changed in its inputs the linear makes good, from 0 to 1. Unless 0, the float
            model runs beside. None means the best for calibration samples that are held out.
    """

    group_size: int | Literal["auto"] | None = "auto"  # pyright: ignore[reportIncompatibleVariableOverride]
    rules: Suppress[tuple[Rule, ...]] = ()
    grid: Search | Literal["preset"] = "preset"  # pyright: ignore[reportIncompatibleVariableOverride]
    negative_scales: bool | Literal["preset"] = "preset"  # pyright: ignore[reportIncompatibleVariableOverride]
    refine: tuple[Refinement, ...] | Literal["preset"] = "preset"  # pyright: ignore[reportIncompatibleVariableOverride]
    alpha: float | Literal["preset"] | None = "preset"  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        """Nothing is refused yet."""

    def config(self, base: Preset, group_size: int | None) -> QuantConfig:
        """What these options change of a preset, with this group size."""
        given = {f.name: getattr(self, f.name) for f in fields(QuantConfig)} | {"group_size": group_size}
        return preset(base, **{name: value for name, value in given.items() if value != "preset"})


@flowing
def quantize(
    source: Annotated[Positional[str], arg(metavar="SOURCE")],
    destination: Annotated[Positional[Path], arg(metavar="DESTINATION")],
    options: Annotated[_Options, arg(name="")] = _Options(),
    base: Annotated[Preset, arg(name="preset")] = "default",
    engine: Annotated[Engine | None, arg(name="for")] = None,
    rule: Annotated[tuple[str, ...], arg(metavar="'REGEX => skip | key=value,...'")] = (),
    data: str = "pydoc",
    samples: int = 64,
    length: int = 512,
    seed: int = 0,
    activations: Literal["device", "host", "disk"] = "device",
    mesh: int | Literal["all"] | None = None,
    resume: bool = False,
    keep_hessians: Path | None = None,
    budget: float | None = None,
    budget_kl: float | None = None,
    probe_data: str = "spoken",
    measured: Path | None = None,
    plot: Path | None = None,
    page: Annotated[bool, arg(name="report")] = False,
) -> None:
    """Quantize a checkpoint and write it in the GPTQ format.

    A model type that no row of the table describes is quantized through transformers' own forward, with all of it in memory.

    Args:
        source: A directory with safetensors, or the name of a model on the Hugging Face hub.
        destination: Where to write; it must not exist, and appears when it is complete.
        options: How to quantize.
        base: Options to begin with: "fast" is plain GPTQ, "default" adds what pays most for its time, "best" all that pays.
        engine: Where the result shall load: the group size is chosen for it, and options that it would refuse are refused here, first.
        rule: Exceptions by name, as '.*down_proj => bits=8' or 'model[.]layers[.]0[.] => skip'; the first match wins.
        data: Calibration text: a text file, "pydoc" (CPython's documentation), c4, wikitext2, ultrachat or any hub dataset.
        samples: Number of calibration samples.
        length: Tokens of a calibration sample.
        seed: Chooses the samples.
        activations: Where activations of the calibration samples wait; in memory of the host or on the destination's disk they leave
            that of the device free.
        mesh: Divide the work among so many devices, or all of them. Where JAX's environment tells of several processes, as
            JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do, of all; each runs this command, with one file system.
        resume: Continue a run of the same command that was cut off, from its last complete block; begin where there is none.
        keep_hessians: A directory in which to keep the Hessians of all linears, for gptq-fn sweep.
        budget: Bits a weight, scales and zero points included, with which the model shall do best: bits and groups of each linear
            are chosen for it, from a calibration pass of its own. A rule's linears are left to the rule.
        budget_kl: The same for the fewest bits with which the KL to the float model is predicted to be this, in nats a token, on text like
            the calibration.
        probe_data: Text on which a budget measures KL beside other samples of the calibration text: "spoken" is what the model itself
            says, for which all of it has to be in memory, and all else as for data. That of data itself: no other text.
        measured: The file for what a budget measures, by default DESTINATION.budget.json; what is there already is not measured again.
        plot: Draw predicted KL against bits a weight into this file.
        page: Also write DESTINATION/report.html, as gptq-fn report does.
    """
    from gptq_fn_interop.calib import tokens
    from gptq_fn_interop.cli_budget import PROBES, SPOKEN, Budget, chosen_config, require, require_drawable, settings_for
    from gptq_fn_interop.hub import local
    from gptq_fn_interop.processes import first, join
    from gptq_fn_interop.staging import require_outside, require_vacant, require_writable

    began = time.perf_counter()
    limited = None if budget is None and budget_kl is None else Budget(budget, budget_kl)
    if (measured or plot or probe_data != SPOKEN) and not limited:
        raise ValueError("--measured, --plot and --probe-data are of budgets; give --budget or --budget-kl, or leave them out.")
    devices = None if mesh is None else join(mesh)
    out.quiet = devices is not None and not first()

    def config_of(group_size: int | None) -> QuantConfig:
        config = options.config(base, group_size)
        return replace(config, rules=tuple(parse_rule(text, config) for text in rule))

    config = config_of(128 if options.group_size == "auto" else options.group_size)
    require_vacant(destination, resume=resume)
    for option, path in (("--keep-hessians", keep_hessians), ("--measured", measured), ("--plot", plot)):
        if path is not None:
            require_outside(destination, path, option)
    for option, path in (("--measured", measured), ("--plot", plot)):
        if path is not None:
            require_writable(path, option)
    if plot is not None:
        require_drawable(plot)
    directory = local(source)
    if engine and not limited:
        config = _fitting(engine, directory, config_of, options.group_size)
    runtime = _runtime(activations, destination, devices)
    chosen = {"preset": base, "for": engine, "budget": budget, "budget_kl": budget_kl}
    origin = Origin(_called(source), _called(data), seed, {name: value for name, value in chosen.items() if value is not None})
    run = _described(directory, config, runtime=runtime, resume=resume, hessians=keep_hessians, origin=origin)
    if run is None:
        if resume or activations != "device" or keep_hessians or mesh or limited:
            means = "--resume, --activations, --mesh, --keep-hessians and budgets"
            raise ValueError(f"{means} are for models that a row of the table describes; this one has none.")
        run = _traced(directory, origin)
    settings = settings_for(directory, config, options.group_size, engine, limited) if limited else ()
    calib = tokens(data, directory, samples=samples + PROBES * bool(limited), length=length, seed=seed)
    if limited:
        calib, probes = np.split(calib, [samples])
        other = None if probe_data == data else probe_data
        file = measured or destination.with_name(f"{destination.name}.budget.json")
        config = chosen_config(directory, calib, probes, config, settings, limited, file, plot, runtime, other, seed)
        if engine:
            require(directory, config, engine)
    with progress("Quantizing blocks", shown=not out.quiet) as advance:
        report = run(calib, config, destination, progress=advance)
    out.print(report.table(report.worst(5)), highlight=False)
    out.print(
        f"{destination}: {len(report.linears)} linears at {report.bits_per_weight:.2f} bits a weight "
        f"in {time.perf_counter() - began:.0f} s; the worst are above, all in report.json."
    )
    if report.restored:
        learned, held = report.restored
        out.print(
            f"Linears also make good what rounding before them changed: {learned:.2%} of their outputs' energy on the calibration samples, "
            f"{held:.2%} on samples held out" + ("; more --samples would help." if held < learned / 2 else ".")
        )
    if report.rounded:
        out.print(f"{len(report.rounded)} of them saw fewer than {config.min_rows} calibration tokens and were rounded to nearest.")
    if page and first():
        out.print(f"{write_page(read_report(destination), destination / PAGE)}: open it in a browser.", highlight=False)
    if engine:
        from gptq_fn_interop.inspection import inspect

        say(engine, inspect(destination), str(destination))


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


def say(engine: str, found: Any, name: str) -> None:
    """Tell whether the engine loads an inspected checkpoint: every reason and exit status 1 if it does not."""
    from gptq_fn_interop.engines import caution, refusals

    if reasons := refusals(engine, found):
        out.print(f"{engine} does not load {name}:", highlight=False)
        for reason in reasons:
            out.print(f"- {reason}", highlight=False)
        sys.exit(1)
    out.print(f"{engine} loads {name}, as far as the quantization is concerned.", highlight=False)
    if note := caution(engine, found):
        out.print(f"Note: {note}", highlight=False)


def _called(source: str) -> str:
    """What a report calls a directory, a file or a name on the hub: where it lies here is left out."""
    return Path(source).resolve().name if Path(source).exists() else source


def _runtime(activations: str, destination: Path, mesh: Mesh | None) -> Runtime:
    """The means of a run on these devices whose activations wait there."""
    from gptq_fn_interop.activations import on_disk
    from gptq_fn_interop.runtime import default_runtime
    from gptq_fn_interop.staging import unfinished

    stores = {"device": ON_DEVICE, "host": ON_HOST, "disk": on_disk(unfinished(destination) / f"activations-{jax.process_index()}")}
    return replace(default_runtime(), store=stores[activations], mesh=mesh)


def _described(directory: Path, config: QuantConfig, **means: Any) -> Callable[..., Report] | None:
    """What quantizes a checkpoint that a row of the table describes, after a look at what headers can tell; None for others."""
    from gptq_fn_interop.checkpoint import Checkpoint
    from gptq_fn_interop.stream import open_source, quantize_checkpoint

    if Checkpoint(directory).config.get("model_type") not in FAMILIES:
        return None
    _, spec = open_source(directory, config)
    require_matching(config.rules, spec)

    def run(calib: Any, config: QuantConfig, destination: Path, progress: Any) -> Report:
        return quantize_checkpoint(directory, destination, calib, config, progress=progress, **means)

    return run


def require_matching(rules: Sequence[Rule], spec: ModelSpec) -> None:
    """Raise ValueError for a rule that matches no linear of the model: it is misspelt, or meant for another model."""
    names = [name for i, block in enumerate(spec.blocks) for linear in block.linears for name in spec.names_of(i, linear)]
    names += [head] if (head := dict(spec.tensors).get("head")) else []
    for rule in rules:
        if not any(re.match(rule.pattern, name) for name in names):
            raise ValueError(
                f"The rule for {rule.pattern!r} matches no linear of this model; their names are as {names[0]} and {names[-1]}, "
                "and a pattern matches from the start."
            )


def _traced(directory: Path, origin: Origin) -> Callable[..., Report]:
    """What quantizes any model that transformers can run."""
    from gptq_fn_interop.traced import quantize_traced

    return partial(quantize_traced, torch_model(directory), origin=origin)


def torch_model(directory: Path) -> Any:
    """The model as transformers has it. Raises ValueError where it does not; code that comes with a checkpoint is never run."""
    import transformers

    import gptq_fn.interop  # noqa: F401 - transformers then loads quantized checkpoints
    from gptq_fn_interop.hf import whole_model

    kind = transformers.PreTrainedConfig.get_config_dict(directory)[0].get("model_type")
    if kind not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(
            f"No row of the table describes model_type {kind!r}, and transformers has no such causal language model. Code that comes "
            "with a checkpoint is never run; describe the model by hand: see docs/own_architecture.md."
        )
    out.print(f"No row of the table describes {kind} models: running transformers' own forward.", highlight=False)
    return whole_model(directory, "auto")


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
        changes[key] = tuple(value.strip().split("+")) if key == "refine" else value_of(value.strip())
    return Rule(pattern, replace(base, rules=(), **changes))


def value_of(text: str) -> Any:
    """What a field of QuantConfig is set to by this text: None, a truth value, a number, or the text."""
    constants = {"none": None, "true": True, "false": False}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
