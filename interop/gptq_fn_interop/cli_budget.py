"""What gptq-fn quantize does with a budget: measure, choose, and tell."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Int
from rich.table import Table

from gptq_fn import QuantConfig, Runtime, Samples
from gptq_fn_interop import budget as budgets
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.console import out, progress
from gptq_fn_interop.spoken import spoken
from gptq_fn_interop.stream import open_source

PROBES = 4
"""Samples of each text on which KL is measured. None of them is in the calibration."""

SPOKEN = "spoken"
"""The name of the text that the model itself speaks."""

PICTURES = (".png", ".pdf", ".svg")
"""How the names of pictures end."""


@dataclass(frozen=True)
class Budget:
    """What a model may cost: bits a weight, or else KL to the float model. Raises ValueError unless it is one of them."""

    bits: float | None
    kl: float | None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.kl is None):
            raise ValueError("A budget is either of bits or of KL; give one of --budget and --budget-kl.")
        if (limit := self.bits if self.kl is None else self.kl) is None or not limit > 0:
            raise ValueError(f"A budget is positive, got {limit}.")


def settings_for(
    directory: Path, config: QuantConfig, group_size: int | str | None, engine: str | None, budget: Budget
) -> Sequence[QuantConfig]:
    """The settings that can be stored, that the engine would load, and that a budget may choose from.

    Raises ValueError where there are none, or all are too large.
    """
    sizes = budgets.GROUP_SIZES if isinstance(group_size, str) else (group_size,)
    refused, found = [], []
    for setting in budgets.settings(config, group_sizes=sizes):
        try:
            require(directory, replace(setting, rules=config.rules), engine)
            found.append(setting)
        except ValueError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    least = budgets.smallest(directory, config, found)
    if budget.bits is not None and budget.bits < least:
        raise budgets.too_small(budget.bits, least)
    return found


def require(directory: Path, config: QuantConfig, engine: str | None) -> None:
    """Raise ValueError where the configuration cannot be stored or the engine would not load it."""
    from gptq_fn_interop.engines import config_for

    checkpoint, spec = open_source(directory, config)
    if engine:
        config_for(engine, checkpoint, spec, lambda _: config, (config.group_size,))


def chosen_config(
    directory: Path,
    calib: Samples,
    probes: Int[np.ndarray, "samples length"],
    config: QuantConfig,
    settings: Sequence[QuantConfig],
    budget: Budget,
    file: Path,
    picture: Path | None,
    runtime: Runtime,
    other: str | None,
    seed: int,
) -> QuantConfig:
    """`config` with rules that give each group of linears the setting that serves the budget best; tells which.

    KL is measured on `probes`, which are like the calibration, and on as many samples of the `other` text. What is measured is
    kept in `file`, and read from there if it was measured before.
    """

    def measured() -> budgets.Measured:
        found = [probes] if other is None else [probes, _samples(other, directory, len(probes), probes.shape[1], seed)]
        with progress("Measuring settings", shown=not out.quiet) as advance:
            return budgets.measure(directory, calib, found, config, settings, progress=advance, runtime=runtime)

    if file.exists():
        out.print(f"What settings cost was measured before: {file}.", highlight=False)
    found = budgets.kept(file, budgets.run_of(directory, calib, probes, config, settings, other), measured)
    chosen = found.within(budget.bits) if budget.bits is not None else found.reaching(budget.kl or 0.0)
    bits, kl = found.summary(chosen)
    out.print(table(found, chosen))
    texts = ["on text like the calibration", "on what the model itself speaks" if other == SPOKEN else f"on {other}"]
    told = " and ".join(f"{each:.2g} nats a token {text}" for each, text in zip(kl, texts, strict=False))
    out.print(f"{bits:.3f} bits a weight; the KL to the float model is predicted to be about {told}.", highlight=False)
    if picture is not None:
        draw(found, chosen, Checkpoint(directory).directory.name, picture)
        out.print(f"Bits against predicted KL: {picture}", highlight=False)
    return found.config_of(chosen)


def _samples(name: str, directory: Path, samples: int, length: int, seed: int) -> Samples:
    """Samples of the text of this name. Raises ValueError, as for a model that cannot speak because it does not fit in memory."""
    if name != SPOKEN:
        return tokens(name, directory, samples=samples, length=length, seed=seed)
    try:
        with progress("Letting the model speak", shown=not out.quiet) as advance:
            return spoken(directory, samples=samples, length=length, seed=seed, progress=advance)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"The model could not speak: {str(error).splitlines()[0]} All of it has to be in memory for that; "
            "--probe-data names text of which KL is measured instead."
        ) from error


def table(found: budgets.Measured, chosen: Int[np.ndarray, " groups"]) -> Table:
    """A row for each setting: what all linears cost at it on the first text, and how many got it."""
    linears, weights = Counter[int](), Counter[int]()
    for group, n in zip(found.groups, chosen.tolist(), strict=True):
        linears[n] += len(group.linears)
        weights[n] += group.weights
    shown = Table("bits", "groups", "bits a weight", "KL if everywhere", "linears", "share of weights")
    for n, setting in enumerate(found.settings):
        size = "row" if setting.group_size is None else str(setting.group_size)
        everywhere = found.summary(np.full(len(found.groups), n))[0]
        cells = f"{everywhere:.3f}", f"{found.uniform[n][0]:.3g}", str(linears[n]), f"{weights[n] / found.weights:.1%}"
        shown.add_row(str(setting.bits), size, *cells)
    return shown


def require_drawable(path: Path) -> None:
    """Raise ValueError where there is no matplotlib, or no picture has such a name."""
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path}: name a file that ends in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}.")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot draws with matplotlib, which is not installed: pip install matplotlib.")


def draw(found: budgets.Measured, chosen: Int[np.ndarray, " groups"], title: str, path: Path) -> None:
    """Draw bits a weight against predicted KL on the first text: the best choices, each setting for all, and what was chosen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    axes.plot(*zip(*found.frontier(), strict=True), color="tab:blue", label="best choices, predicted")
    for n, setting in enumerate(found.settings):
        at: Any = found.summary(np.full(len(found.groups), n))[0], found.uniform[n][0]
        axes.plot(*at, "o", color="tab:gray", label=None if n else "one setting for all, measured")
        # Aslant, since at few bits the points are nearer to each other than their names are long.
        aslant: Any = {"rotation": 40, "rotation_mode": "anchor"}
        axes.annotate(f"{setting.bits}b g{setting.group_size or 'row'}", at, (3, 4), textcoords="offset points", fontsize=8, **aslant)
    bits, kl = found.summary(chosen)
    axes.plot(bits, kl[0], "*", color="tab:red", markersize=12, label=f"chosen: {bits:.3f} bits, KL {kl[0]:.2g} predicted")
    axes.margins(x=0.08, y=0.2)
    axes.set(
        yscale="log", xlabel="bits a weight, scales and zero points included", ylabel="KL to the float model, nats a token", title=title
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
