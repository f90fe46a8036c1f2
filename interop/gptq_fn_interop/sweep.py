"""Many settings from the Hessians of one run, without another forward pass."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from threadpoolctl import threadpool_limits

from gptq_fn import Hessian, LinearReport, ModelSpec, QuantConfig, QuantizedLinear, Report, Runtime, factor, head_plan, quantize_linears
from gptq_fn_interop.kept import KeptHessians
from gptq_fn_interop.params import Tensors, read_block, read_top
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.stream import open_source

Jobs = dict[QuantConfig, dict[str, None]]
"""The linears that share a Hessian, by the configurations with which each is wanted."""


def sweep(
    source: str | Path,
    hessians: str | Path,
    configs: Sequence[QuantConfig],
    *,
    spec: ModelSpec | None = None,
    progress: Callable[[int, int], None] | None = None,
    runtime: Runtime | None = None,
) -> tuple[Report, ...]:
    """The report of each config, solved from the Hessians that were kept in `hessians` without another forward pass.

    Each block of the checkpoint in `source` and each Hessian are read once, and each Hessian is factored once for each damping and
    order of columns; `progress` is told the Hessians done and their number. With the config of the run that kept them the result is
    that of the run. With others it is not what a run of their own would find: what entered each linear carries the rounding errors
    of the run that was kept. `runtime` is by default what serves best here. Raises ValueError or OSError in a sentence, before any
    work where a Hessian is missing.
    """
    configs = [config.alone("Hessians do not tell how the inputs of their run differ from those of the float model") for config in configs]
    opened = [open_source(source, config, spec) for config in configs]
    if not opened:
        return ()
    checkpoint, spec = opened[0]
    kept = KeptHessians(hessians)
    kept.require_model(checkpoint)
    plans = [plan_of(spec, config) for config in configs]
    solved = solve_kept(spec, checkpoint, kept, plans, progress, runtime or default_runtime())
    found = {(name, config): report for name, config, _, report in solved}
    return tuple(Report(config, tuple(found[job] for job in plan.items())) for config, plan in zip(configs, plans, strict=True))


def plan_of(spec: ModelSpec, config: QuantConfig) -> dict[str, QuantConfig]:
    """The configuration of every linear that is quantized, in forward order."""
    plan = {}
    for i, block in enumerate(spec.blocks):
        for role in (role for _, roles in block.stages for role in roles):
            linear = block.linear(role)
            plan |= {name: config.resolve(name, usual=linear.quantize) for name in spec.names_of(i, linear)}
    if (head := head_plan(spec, config)) is not None:
        plan[dict(spec.tensors)["head"]] = head
    return {name: chosen for name, chosen in plan.items() if chosen is not None}


def solve_kept(
    spec: ModelSpec,
    tensors: Tensors,
    kept: KeptHessians,
    plans: Sequence[Mapping[str, QuantConfig]],
    progress: Callable[[int, int], None] | None = None,
    runtime: Runtime | None = None,
) -> Iterator[tuple[str, QuantConfig, QuantizedLinear, LinearReport]]:
    """Every linear of any plan, quantized with each configuration that a plan has for it, block by block.

    A plan maps names to configurations without rules. Raises ValueError as `sweep` does.
    """
    wanted: dict[tuple[str, ...], Jobs] = defaultdict(lambda: defaultdict(dict))
    for plan in plans:
        for name, config in plan.items():
            wanted[kept.of(name)][config][name] = None
    place_of = {name: i for i, block in enumerate(spec.blocks) for linear in block.linears for name in spec.names_of(i, linear)}
    places: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for names in wanted:
        places[place_of.get(names[0], len(spec.blocks))].append(names)
    done = 0
    with threadpool_limits(1, "blas"):  # as in `quantize_checkpoint`
        for i, groups in sorted(places.items()):
            leaf_of = _reader(spec, i, tensors)
            for names in groups:
                yield from solve_from(leaf_of, kept[names], wanted[names], runtime)
                done += 1
                if progress:
                    progress(done, len(wanted))


def _reader(spec: ModelSpec, i: int, tensors: Tensors) -> Callable[[str], Mapping[str, Any]]:
    """The parameters of a linear of block `i` by its name; behind the last block, those of the head."""
    if i == len(spec.blocks):
        top = read_top(spec, tensors)
        return lambda _: top["embed" if spec.tied else "head"]
    return leaves_of(spec, i, read_block(spec, i, tensors))


def leaves_of(spec: ModelSpec, i: int, p: Mapping[str, Any]) -> Callable[[str], Mapping[str, Any]]:
    """The parameters of a linear of block `i`, whose parameters are `p`, by its name."""
    block = spec.blocks[i]
    at = {name: (linear.role, n) for linear in block.linears for n, name in enumerate(spec.names_of(i, linear))}

    def leaf_of(name: str) -> Mapping[str, Any]:
        role, n = at[name]
        return p[role] if block.copies(role) is None else jax.tree.map(lambda a: a[n], p[role])

    return leaf_of


def solve_from(
    leaf_of: Callable[[str], Mapping[str, Any]], h: Hessian, jobs: Jobs, runtime: Runtime | None
) -> Iterator[tuple[str, QuantConfig, QuantizedLinear, LinearReport]]:
    """The linears of these jobs; `h` is factored once for all configurations that can share the factor."""
    shared: dict[QuantConfig, list[QuantConfig]] = defaultdict(list)
    for config in jobs:
        shared[_factoring(config)].append(config)
    linears = {name: leaf_of(name) for names in jobs.values() for name in names}
    for factoring, configs in shared.items():
        f = factor(h, factoring)
        for config in configs:
            mine = {name: linears[name] for name in jobs[config]}
            solved = quantize_linears(mine, h, dict.fromkeys(mine, _solving(config)), factor=lambda *_: f, runtime=runtime)  # noqa: B023
            yield from ((name, config, q, report) for name, q, report in solved)


def _factoring(config: QuantConfig) -> QuantConfig:
    """What `factor` reads of a configuration, all else as by default."""
    if config.order == "group":
        return QuantConfig(damp=config.damp, group_size=config.group_size)
    return QuantConfig(damp=config.damp, order=config.order)


def _solving(config: QuantConfig) -> QuantConfig:
    """What solving with a factor reads of a configuration, all else as by default: settings that differ in damping share a program."""
    usual = QuantConfig()
    return replace(config, damp=usual.damp, sequential=usual.sequential, experts=usual.experts, untie=usual.untie)
