"""Bits where they matter: what each group of linears costs the model at several settings, and the settings that fit a budget.

A group is what engines need in one scheme: the linears of a block that read one input, as q, k and v do, and all experts of a block.

One calibration pass measures. The linears, carried along at 8 bits, are solved at every setting from each Hessian as it comes, and
some samples run beside through the float blocks: once with each group alone quantized, once with all linears at each setting. The
KL of a group at another setting than the one that was tried is in proportion to its squared error, and that of several groups is
the sum: the linearity of Malinovskii et al., "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"
(2024), whose constants are measured here by the errors of GPTQ itself instead of noise. Where errors are large the sum is too far up
or down; how far is read off the settings that were tried on all linears.

The constants are of a text. On text like the calibration, linears that know it from their Hessian stray less than on any other, and
those with many inputs know it best: what is measured there alone takes bits from the MLPs that other text needs. So the samples are
of several texts, and a group weighs what it does on the average of them.
"""

import json
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from threadpoolctl import threadpool_limits

from gptq_fn import (
    Batch,
    Hessian,
    LinearReport,
    ModelSpec,
    QuantConfig,
    QuantizedLinear,
    Rule,
    Runtime,
    Samples,
    allocate,
    embed_batches,
    quantize_blocks,
    run_block,
    stored_bits,
)
from gptq_fn.check import check_tokens
from gptq_fn.model.decoder import unembed
from gptq_fn_interop.checkpoint import Checkpoint, read_json
from gptq_fn_interop.engines import FUSED
from gptq_fn_interop.overlap import ahead
from gptq_fn_interop.params import dense_shapes, read_block, read_top
from gptq_fn_interop.processes import by_first
from gptq_fn_interop.resume import identity
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.shards import write_json
from gptq_fn_interop.stream import compute_dtype, open_source
from gptq_fn_interop.sweep import leaves_of, plan_of, solve_from

EXPERT_TAPS = ("expert_in", "expert_down_in")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 128)
"""Few, since every setting is solved and compiled for each shape; groups of 64 lie between these."""

TINY = 1e-12
"""Losses below this count as this, so that there are logarithms of all."""


def settings(
    config: QuantConfig, bits: Iterable[int] | None = None, group_sizes: Iterable[int | None] | None = None
) -> tuple[QuantConfig, ...]:
    """`config` at these bits and group sizes, by default BITS and GROUP_SIZES, without its rules."""
    bits, group_sizes = tuple(bits or BITS), tuple(group_sizes or GROUP_SIZES)
    return tuple(replace(config, bits=b, group_size=size, rules=()) for b in bits for size in group_sizes)


@dataclass(frozen=True)
class Group:
    """Linears of one block that get one setting, and what was measured of them."""

    block: int
    linears: tuple[str, ...]
    weights: int
    bits: tuple[int, ...]
    """All that is stored of them at each setting, scales and zero points included."""
    errors: tuple[float, ...]
    """||(W - Q) X||^2 / ||W X||^2 at each setting, the mean of the linears."""
    kl: tuple[float, ...]
    """KL(float || model) on each text, in nats a token, with these linears alone at the setting that was tried on each group alone."""


@dataclass(frozen=True)
class Measured:
    """What settings cost each group of a model, in bits and in KL to the float model."""

    config: QuantConfig
    """What is common to all settings, and the rules that come before any budget."""
    settings: tuple[QuantConfig, ...]
    tried: int
    """The number of the setting that was tried on each group alone."""
    groups: tuple[Group, ...]
    uniform: tuple[tuple[float, ...], ...]
    """KL(float || model) with all groups at each setting, on each text. The first is like the calibration."""
    fixed: tuple[int, int]
    """Bits and weights of the linears that rules decide."""
    prefix: str
    """Of the names of a block's linears, with "{i}"."""

    @property
    def weights(self) -> int:
        """Of all linears that are quantized."""
        return self.fixed[1] + sum(group.weights for group in self.groups)

    @cached_property
    def bits(self) -> Float[np.ndarray, "groups settings"]:
        """What is stored of each group at each setting."""
        return np.asarray([group.bits for group in self.groups], np.float64)

    @cached_property
    def alone(self) -> Float[np.ndarray, "texts groups settings"]:
        """What each group alone would cost at each setting on each text, by its squared errors."""
        errors = np.asarray([group.errors for group in self.groups], np.float64)
        tried = errors[:, self.tried, None]
        kl = np.asarray([group.kl for group in self.groups], np.float64).T
        return kl[:, :, None] * errors / np.where(tried > 0, tried, np.inf)

    @cached_property
    def among(self) -> Float[np.ndarray, "texts groups settings"]:
        """What each group is taken to cost at each setting on each text, among groups at others.

        That stands between what it costs alone and what all at its setting make of that, beside what they make of the setting
        that was tried: the geometric middle of both.
        """
        grown = np.maximum(np.asarray(self.uniform, np.float64).T, TINY) / np.maximum(self.alone.sum(1), TINY)
        return self.alone * np.sqrt(grown / grown[:, self.tried, None])[:, None]

    @cached_property
    def losses(self) -> Float[np.ndarray, "groups settings"]:
        """What each group weighs at each setting: its share of the KL of a text, the geometric mean over the texts.

        Shares, since a text on which the model strays far would else decide alone; geometric, since what a group does on one
        text and on another differs by a factor.
        """
        shares = self.among / np.maximum(self.among[:, :, self.tried].sum(1), TINY)[:, None, None]
        return np.exp(np.log(np.maximum(shares, TINY)).mean(0))

    def _line(self, text: int) -> tuple[Float[np.ndarray, " settings"], Float[np.ndarray, " settings"]]:
        """Logarithms of the sums over groups and of the KL of all of them on a text, each rising from setting to setting."""
        found = self.among[text].sum(0), np.asarray([each[text] for each in self.uniform])
        sums, whole = (np.maximum.accumulate(np.log(np.maximum(np.sort(a), TINY))) for a in found)
        return sums, whole

    def within(self, bits_per_weight: float) -> Int[np.ndarray, " groups"]:
        """The setting of each group with which the model strays least, at this size. Raises ValueError where all settings are larger."""
        room = bits_per_weight * self.weights - self.fixed[0]
        if (least := self.bits.min(1).sum()) > room:
            raise too_small(bits_per_weight, (least + self.fixed[0]) / self.weights)
        return allocate(self.bits, self.losses, room)

    def reaching(self, kl: float) -> Int[np.ndarray, " groups"]:
        """The smallest settings with which the model strays by `kl` on the first text, as predicted.

        Raises ValueError where all settings stray more.
        """
        least, most = self.losses.min(1).sum(), self.losses.max(1).sum() * (1 + 1e-9)  # all at their worst are within
        chosen = allocate(self.losses, self.bits, least)
        if (best := self.summary(chosen)[1][0]) > kl:
            raise ValueError(f"A KL of {kl:g} cannot be reached: {_up(best)} is predicted for the best setting of each group.")
        for _ in range(40):  # more loss, fewer bits and more KL
            middle = math.sqrt(least * most)
            found = allocate(self.losses, self.bits, middle)
            if self.summary(found)[1][0] <= kl:
                chosen, least = found, middle
            else:
                most = middle
        return chosen

    def summary(self, chosen: Int[np.ndarray, " groups"]) -> tuple[float, tuple[float, ...]]:
        """Bits a weight of this choice, and its predicted KL on each text."""
        each = np.arange(len(chosen))
        totals = self.among[:, each, chosen].sum(1)
        kl = tuple(_along(*self._line(text), float(total)) for text, total in enumerate(totals))
        return float(self.bits[each, chosen].sum() + self.fixed[0]) / self.weights, kl

    def frontier(self, points: int = 40) -> list[tuple[float, float]]:
        """Bits a weight and predicted KL on the first text of the best choices, from the smallest settings to the largest."""
        least, most = self.bits.min(1).sum() + self.fixed[0], self.bits.max(1).sum() + self.fixed[0]
        sizes = np.geomspace(least / self.weights, most / self.weights, points)
        found = (self.summary(self.within(float(bits) * (1 + 1e-12))) for bits in sizes)
        return [(bits, kl[0]) for bits, kl in found]

    def config_of(self, chosen: Int[np.ndarray, " groups"]) -> QuantConfig:
        """The configuration with rules that give each group its setting; the setting that most weights have needs none."""
        weights = Counter[int]()
        for group, setting in zip(self.groups, chosen.tolist(), strict=True):
            weights[setting] += group.weights
        usual = self.settings[weights.most_common(1)[0][0]]
        places: dict[tuple[QuantConfig, str], list[int]] = defaultdict(list)
        for group, setting in zip(self.groups, chosen.tolist(), strict=True):
            if self.settings[setting] != usual:
                places[self.settings[setting], _pattern(self.prefix.format(i=group.block), group.linears)].append(group.block)
        before, _, after = (re.escape(part) for part in self.prefix.partition("{i}"))
        rules = [Rule(f"{before}({'|'.join(map(str, i))}){after}{inside}", setting) for (setting, inside), i in places.items()]
        return replace(usual, rules=(*self.config.rules, *rules))


def too_small(bits_per_weight: float, least: float) -> ValueError:
    """The error for a budget below the `least` bits a weight."""
    return ValueError(
        f"A budget of {bits_per_weight:g} bits a weight is too small: with scales and zero points, the smallest settings need {_up(least)}."
    )


def _along(x: Float[np.ndarray, " n"], y: Float[np.ndarray, " n"], at: float) -> float:
    """exp y at exp x = `at`: on the line through the points, and beyond its ends in proportion."""
    at = float(np.log(max(at, TINY)))
    return float(np.exp(np.interp(at, x, y) + min(at - x[0], 0) + max(at - x[-1], 0)))


def _up(x: float) -> str:
    """Three decimals, rounded up."""
    return f"{np.ceil(x * 1000) / 1000:.3f}"


def _pattern(prefix: str, names: Iterable[str]) -> str:
    """A pattern of what follows the number of the block in the names of a group, and in those that engines give what they fuse."""
    inside = {name.removeprefix(prefix) for name in names}
    experts = {found.group(1) for name in inside if (found := re.match(r"(.*[.]experts)[.]", name))}
    if experts:
        return f"({'|'.join(map(re.escape, sorted(experts)))})([.]|$)"
    fused = set()
    for name in inside:
        parent, dot, leaf = name.rpartition(".")
        fused |= {parent + dot + whole for whole, parts in FUSED.items() if leaf in parts and len(inside) > 1}
    return f"({'|'.join(map(re.escape, sorted(inside | fused)))})$"


# measuring


def measure(
    source: str | Path,
    calib: Samples,
    probes: Sequence[Samples],
    config: QuantConfig,
    settings: Sequence[QuantConfig],
    *,
    spec: ModelSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
    runtime: Runtime | None = None,
) -> Measured:
    """What each of `settings` costs each group of the model in `source`; linears that rules of `config` name are left to these.

    Hessians are those of `calib`; `probes` are a few samples of each text that KL is measured on, in float32, none of them in
    `calib`: first of text like it, then of others, as `gptq_fn_interop.spoken` makes one. One block at a time is read, and
    nothing is written. `progress` is told the steps done and their number: the blocks, then the samples whose KLs are
    there. Alphas count as 0: float inputs are not carried along. Raises ValueError or OSError as `quantize_checkpoint` does.
    """
    runtime = runtime or default_runtime()
    checkpoint, spec = open_source(source, config, spec)
    for setting in settings:
        open_source(source, setting, spec)
    check_tokens(calib, checkpoint.shapes[spec.embedding][0])
    samples = [sample for text in probes for sample in text]
    text_of = [number for number, text in enumerate(probes) for _ in text]
    check_tokens(samples, checkpoint.shapes[spec.embedding][0])
    groups = groups_of(spec, config)
    tried = _tried(settings)
    solving, carrying = [replace(setting, alpha=0.0) for setting in settings], _carrying(config)
    beside = replace(runtime, mesh=None, observe=None)
    found = _Found(spec, groups, solving, runtime)

    def told(done: int) -> None:
        if progress:
            progress(done, len(spec.blocks) + len(samples))

    # As in `quantize_checkpoint`.
    with threadpool_limits(1, "blas"), ahead(partial(read_block, spec, i, checkpoint) for i in range(len(spec.blocks))) as params:
        top = read_top(spec, checkpoint)
        batches = embed_batches(spec, top, calib, runtime, compute_dtype(jnp.dtype(top["embed"]["weight"].dtype)))
        start = embed_batches(spec, top, samples, beside, jnp.dtype(jnp.float32))
        exact, alone, uniform, errors = start, list[list[Batch]](), [start] * len(settings), dict[tuple[str, ...], tuple[float, ...]]()
        carried = quantize_blocks(spec, found.watching(params), batches, carrying, runtime=replace(runtime, observe=found.observe))
        del batches
        for i, _ in enumerate(carried):
            through = partial(_through, spec, i, found.params, runtime=beside)
            errors |= {group: found.errors(group) for group in groups[i]}
            alone = through(alone, {}) + [x for group in groups[i] for x in through([exact], found.leaves(group, tried))]
            everything = tuple(name for group in groups[i] for name in group)
            uniform = [x for n, mine in enumerate(uniform) for x in through([mine], found.leaves(everything, n))]
            (exact,) = through([exact], {})
            told(i + 1)
        kl = _divergences(spec, top, exact, [*alone, *uniform], text_of, beside, lambda done: told(len(spec.blocks) + done))
    sizes = _sizes(checkpoint, spec)
    measured = []
    for (i, names), of_it in zip(((i, names) for i, inside in enumerate(groups) for names in inside), kl, strict=False):
        shapes = [sizes[name] for name in names]
        measured.append(Group(i, names, sum(map(math.prod, shapes)), _bits(shapes, settings), errors[names], of_it))
    fixed, whole = _fixed(spec, config, groups, sizes), tuple(kl[len(measured) :])
    return Measured(config, tuple(settings), tried, tuple(measured), whole, fixed, spec.prefix)


def groups_of(spec: ModelSpec, config: QuantConfig) -> list[list[tuple[str, ...]]]:
    """The linears of each block that are quantized and that no rule of `config` names, in groups that get one setting each."""
    found = []
    for i, block in enumerate(spec.blocks):
        inside: dict[str, list[str]] = defaultdict(list)
        for tap, roles in block.stages:
            linears = [linear for linear in map(block.linear, roles) if linear.quantize]
            names = [name for linear in linears for name in spec.names_of(i, linear)]
            inside["experts" if tap in EXPERT_TAPS else tap] += [name for name in names if not _ruled(config, name)]
        found.append([tuple(names) for names in inside.values() if names])
    return found


def smallest(source: str | Path, config: QuantConfig, settings: Sequence[QuantConfig], spec: ModelSpec | None = None) -> float:
    """Bits a weight of the model where every group has its smallest setting. Raises ValueError where there is nothing to choose."""
    checkpoint, spec = open_source(source, config, spec)
    groups, sizes = groups_of(spec, config), _sizes(checkpoint, spec)
    shapes = [[sizes[name] for name in names] for inside in groups for names in inside]
    if not shapes:
        raise ValueError("Rules decide every linear of the model, so a budget has nothing to choose; leave out rules or the budget.")
    bits, weights = _fixed(spec, config, groups, sizes)
    whole = weights + sum(math.prod(shape) for each in shapes for shape in each)
    return (bits + sum(min(_bits(each, settings)) for each in shapes)) / whole


def _ruled(config: QuantConfig, name: str) -> bool:
    return any(re.match(rule.pattern, name) for rule in config.rules)


def _sizes(checkpoint: Checkpoint, spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of every linear of the blocks and of the head, by its name."""
    shapes, found = dense_shapes(checkpoint.shapes, spec), {}
    for i, block in enumerate(spec.blocks):
        for linear in block.linears:
            for name in spec.names_of(i, linear):
                out, inputs = shapes[f"{name}.weight"]
                found[name] = (out, inputs) if linear.stored == "out_in" else (inputs, out)
    if head := dict(spec.tensors).get("head"):
        found[head] = shapes[spec.embedding if spec.tied else f"{head}.weight"]
    return found


def _bits(shapes: Iterable[tuple[int, int]], settings: Iterable[QuantConfig]) -> tuple[int, ...]:
    """All that is stored of linears of these shapes at each setting."""
    return tuple(sum(stored_bits(shape, setting.bits, setting.group_size) for shape in shapes) for setting in settings)


def _fixed(
    spec: ModelSpec, config: QuantConfig, groups: Sequence[Sequence[Sequence[str]]], sizes: Mapping[str, tuple[int, int]]
) -> tuple[int, int]:
    """Bits and weights of the linears that are quantized and in no group."""
    free = {name for inside in groups for names in inside for name in names}
    fixed = {name: chosen for name, chosen in plan_of(spec, config).items() if name not in free}
    bits = sum(stored_bits(sizes[name], chosen.bits, chosen.group_size) for name, chosen in fixed.items())
    return bits, sum(math.prod(sizes[name]) for name in fixed)


def _tried(settings: Sequence[QuantConfig]) -> int:
    """The setting for each group alone: the smallest of 3 bits or more, whose errors stand out of float rounding and break nothing."""
    order = sorted(range(len(settings)), key=lambda n: _bits([(1, 1024)], [settings[n]]))
    return next((n for n in order if settings[n].bits >= 3), order[-1])


def _carrying(config: QuantConfig) -> QuantConfig:
    """How linears are quantized whose Hessians are wanted: fast and hardly at all, unless a rule decides."""
    rules = tuple(rule if rule.config is None else replace(rule, config=replace(rule.config, alpha=0.0)) for rule in config.rules)
    plain = QuantConfig(bits=8, group_size=config.group_size, grid="minmax", damp=config.damp, order=config.order)
    return replace(plain, experts=config.experts, min_rows=config.min_rows, untie=config.untie, rules=rules)


class _Found:
    """The linears of the block at hand, solved at every setting."""

    def __init__(self, spec: ModelSpec, groups: Sequence[Sequence[tuple[str, ...]]], settings: Sequence[QuantConfig], runtime: Runtime):
        self._spec, self._groups, self._settings, self._runtime = spec, groups, settings, runtime
        self._block, self.params = -1, dict[str, Any]()
        self._solved: dict[tuple[str, QuantConfig], tuple[QuantizedLinear, LinearReport]] = {}

    def watching(self, params: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The parameters of each block, which is at hand until the next is asked for."""
        for p in params:
            self._block, self.params = self._block + 1, p
            self._solved.clear()
            yield p

    def observe(self, names: Sequence[str], h: Hessian) -> None:
        """Solve those of these linears that are in a group, from the Hessian that they share."""
        inside = {name for group in self._groups[self._block] for name in group}
        jobs = {setting: {name: None for name in names if name in inside} for setting in self._settings}
        if not inside.isdisjoint(names):
            for name, setting, q, report in solve_from(leaves_of(self._spec, self._block, self.params), h, jobs, self._runtime):
                self._solved[name, setting] = (jax.device_get(q) if self._runtime.mesh else q), report

    def errors(self, group: Sequence[str]) -> tuple[float, ...]:
        """||(W - Q) X||^2 / ||W X||^2 of a group at each setting, the mean of its linears."""
        return tuple(float(np.mean([self._solved[name, s][1].error ** 2 for name in group])) for s in self._settings)

    def leaves(self, names: Sequence[str], n: int) -> dict[str, Any]:
        """The roles of these linears at setting `n`, those of experts with a leading axis."""
        found, spec = {}, self._spec.blocks[self._block]
        for linear in spec.linears:
            mine = [self._solved[name, self._settings[n]][0] for name in self._spec.names_of(self._block, linear) if name in names]
            if mine:
                found[linear.role] = mine[0] if spec.copies(linear.role) is None else jax.tree.map(lambda *a: jnp.stack(a), *mine)
        return found


def _through(
    spec: ModelSpec, i: int, p: Mapping[str, Any], streams: Sequence[Sequence[Batch]], leaves: Mapping[str, Any], runtime: Runtime
) -> list[list[Batch]]:
    """What leaves block `i` with these leaves in place of its own, of each stream."""
    if not streams:
        return []
    after = iter(run_block(spec.blocks[i], {**p, **leaves}, [batch for stream in streams for batch in stream], runtime=runtime))
    return [[next(after) for _ in stream] for stream in streams]


def _divergences(
    spec: ModelSpec,
    top: Mapping[str, Any],
    exact: Sequence[Batch],
    streams: Sequence[Sequence[Batch]],
    text_of: Sequence[int],
    runtime: Runtime,
    progress: Callable[[int], None],
) -> list[tuple[float, ...]]:
    """KL(exact || stream) of the model's predictions on each text, in nats a token, for each stream of what leaves the last block.

    `text_of` tells which text each sample is of, and `progress` is told how many are done.
    """
    shell, found, tokens = replace(spec, blocks=()), np.zeros((len(streams), max(text_of) + 1)), np.zeros(max(text_of) + 1)
    done = 0
    for n, batch in enumerate(exact):
        x = runtime.store.get(batch.x)
        for row, sample in enumerate(batch.samples):
            text, expected = text_of[sample], _log_probabilities(shell, top, x[row : row + 1])
            tokens[text] += int(batch.keep[row].sum())
            for m, stream in enumerate(streams):
                found[m, text] += float(_divergence(shell, top, expected, runtime.store.get(stream[n].x)[row : row + 1], batch.keep[row]))
            progress(done := done + 1)
    return [tuple(each) for each in np.maximum(found / tokens, 0.0).tolist()]


@partial(jax.jit, static_argnames="spec")
def _log_probabilities(spec: ModelSpec, top: Mapping[str, Any], x: Float[Array, "1 time width"]) -> Float[Array, "time vocab"]:
    return jax.nn.log_softmax(unembed(spec, top, x)[0].astype(jnp.float32))


@partial(jax.jit, static_argnames="spec")
def _divergence(
    spec: ModelSpec,
    top: Mapping[str, Any],
    expected: Float[Array, "time vocab"],
    x: Float[Array, "1 time width"],
    keep: Bool[Array, " time"],
) -> Float[Array, ""]:
    each = (jnp.exp(expected) * (expected - _log_probabilities(spec, top, x))).sum(-1)
    return jnp.where(keep, each, 0.0).sum()


# on disk


def kept(path: str | Path, run: Mapping[str, Any], find: Callable[[], Measured]) -> Measured:
    """What was measured before and is in this file, or what `find` finds, which is written there.

    `run` is what was measured, as `run_of` tells it. Raises ValueError where the file has measurements of something else.
    """
    path = Path(path)
    if not path.exists():
        found = find()
        by_first(lambda: _write(path, run, found))
    told = read_json(path)
    if told.get("version") != 2 or not {"run", "measured"} <= told.keys():
        raise ValueError(f"{path} holds no measurements for budgets; remove it, or name another file.")
    if differing := [key for key, value in run.items() if told["run"].get(key) != value]:
        raise ValueError(
            f"The measurements in {path} are not those of this run: they differ in {', '.join(differing)}. "
            "Remove the file to measure again, or name another."
        )
    found = told["measured"]
    return Measured(
        config=_config(found["config"]),
        settings=tuple(map(_config, found["settings"])),
        tried=found["tried"],
        groups=tuple(map(_group, found["groups"])),
        uniform=tuple(map(tuple, found["uniform"])),
        fixed=tuple(found["fixed"]),
        prefix=found["prefix"],
    )


def run_of(
    source: str | Path,
    calib: Samples,
    probes: Samples,
    config: QuantConfig,
    settings: Sequence[QuantConfig],
    other: str | None = None,
    spec: ModelSpec | None = None,
) -> dict[str, Any]:
    """What decides what is measured, as JSON has it: by value, or as a digest where it is large.

    `probes` are those of text like the calibration; `other` names the other text, which may be spoken, and not the same everywhere.
    Raises ValueError for a grid that is a function, which no file can hold.
    """
    for own in (each.grid_name for each in (config, *settings) if not isinstance(each.grid, str)):
        raise ValueError(f"Measurements are kept in a file, which cannot hold a grid that is a function, found {own}; use `measure` alone.")
    checkpoint, spec = open_source(source, config, spec)
    found = identity(checkpoint, spec, [*calib, *probes], config, Runtime(), 0)
    told = {key: found[key] for key in ("source", "description of the model", "calibration tokens", "config")}
    return told | {"other text": other, "settings": json.loads(json.dumps([asdict(setting) for setting in settings]))}


def _write(path: Path, run: Mapping[str, Any], found: Measured) -> None:
    """The file, whole or not at all."""
    aside = path.with_name(f"{path.name}.unfinished")
    write_json(aside, {"version": 2, "run": run, "measured": asdict(found)})
    os.replace(aside, path)


def _group(told: Mapping[str, Any]) -> Group:
    """The group that JSON tells."""
    return Group(**{**told, **{key: tuple(told[key]) for key in ("linears", "bits", "errors", "kl")}})


def _config(told: Mapping[str, Any]) -> QuantConfig:
    """The configuration that JSON tells."""
    rules = tuple(Rule(rule["pattern"], None if rule["config"] is None else _config(rule["config"])) for rule in told["rules"])
    return QuantConfig(**{**told, "refine": tuple(told["refine"]), "rules": rules})
