"""Hessians of a run, kept on disk: from one calibration, many results.

A directory holds a safetensors file for each Hessian, of the linears that are solved from it, and hessians.json, which tells
the model. What is kept is the mean of a Hessian and its transpose, of which the upper triangle, folded into a rectangle,
takes half the room: 411 MB in float32 for 14,336 inputs.
"""

import hashlib
import json
import os
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from threadpoolctl import threadpool_limits

from gptq_fn import Hessian, LinearReport, ModelSpec, QuantConfig, QuantizedLinear, Report, Runtime, factor, head_plan, quantize_linears
from gptq_fn_interop.checkpoint import Checkpoint, read_json
from gptq_fn_interop.params import Tensors, read_block, read_top
from gptq_fn_interop.shards import write_json
from gptq_fn_interop.stream import open_source
from gptq_fn_interop.tensor_files import READ, Entry, headers, read, write

MODEL, SUFFIX = "hessians.json", ".safetensors"
Jobs = dict[QuantConfig, dict[str, None]]
"""The linears that share a Hessian, by the configurations with which each is wanted."""

AHEAD = 2
"""Hessians that may wait to be written, each in memory."""

VOLATILE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")
"""Keys of a config.json that do not tell what a model computes."""


@contextmanager
def keep_hessians(source: str | Path, directory: str | Path, *, resume: bool = False) -> Iterator[Callable[[Sequence[str], Hessian], None]]:
    """What keeps every Hessian of a run in `directory`, to be passed on as Runtime(observe=...); `source` is the model's directory.

    Files appear when they are complete. They are written by a thread, whose last ones are awaited at the end of the block.
    Where processes share a run, the first one writes. Raises FileExistsError where something is in `directory`, unless
    `resume` says that it is of the same run, ValueError for Hessians of another model, and OSError where a file cannot be written.
    """
    directory, model = Path(directory), _identity(Checkpoint(source))
    first = jax.process_index() == 0
    if first:
        _claim(directory, source, model, resume=resume)
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:

        def observe(names: Sequence[str], h: Hessian) -> None:
            folded, rows = fold(h.xx), int(h.rows)
            if first:
                while len(waiting) >= AHEAD:
                    waiting.popleft().result()
                waiting.append(writer.submit(_write, directory / f"{names[0]}{SUFFIX}", folded, names, rows))

        yield observe
        for written in waiting:
            written.result()


def _claim(directory: Path, source: str | Path, model: Mapping[str, Any], *, resume: bool) -> None:
    """Make the directory one of Hessians of this model."""
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; Hessians are kept in a directory.")
    if directory.is_dir() and any(directory.iterdir()):
        if not resume:
            raise FileExistsError(f"{directory} exists already and is not empty; choose another directory for Hessians or remove it.")
        _require_model(directory, source, model)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / MODEL, model)


def _write(path: Path, folded: Float[Array, "rows columns"], names: Sequence[str], rows: int) -> None:
    """A file of one Hessian, which has its name when it is complete."""
    aside = path.with_name(f"{path.name}.unfinished")
    told = np.frombuffer(json.dumps(names).encode(), np.uint8)
    try:
        write(aside, {"upper": np.asarray(folded), "rows": np.asarray(rows, np.int32), "names": told})
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"The Hessian of {names[0]} cannot be written to {path.parent}: {error.strerror or error}.") from error


@jax.jit
def fold(xx: Float[Array, "n n"]) -> Float[Array, "rows n+1"]:
    """The upper triangle of the mean of `xx` and its transpose: row i beside row n - 1 - i, which has as much as row i lacks."""
    n, half = len(xx), -(-len(xx) // 2)
    xx = 0.5 * xx + 0.5 * xx.T
    row, column = jnp.arange(half)[:, None], jnp.arange(n + 1)[None]
    return jnp.where(column > row, jnp.pad(xx[:half], ((0, 0), (1, 0))), jnp.pad(xx[::-1, ::-1][:half], ((0, 0), (0, 1))))


@jax.jit
def unfold(folded: Float[Array, "rows n+1"]) -> Float[Array, "n n"]:
    """The symmetric matrix whose upper triangle `fold` made this of."""
    half, n = len(folded), folded.shape[1] - 1
    upper = jnp.concatenate([folded[: n - half, 1:], folded[::-1, :-1][:, ::-1]])
    row, column = jnp.arange(n)[:, None], jnp.arange(n)[None]
    return jnp.where(column >= row, upper, upper.T)


class KeptHessians(Mapping[tuple[str, ...], Hessian]):
    """The Hessians in a directory by the names of the linears that are solved from each; each is read when it is asked for.

    Raises FileNotFoundError or ValueError, in a sentence, for what is no such directory and for damaged files.
    """

    def __init__(self, directory: str | Path):
        """Open the headers of the files; no Hessian is read."""
        self.directory = Path(directory)
        _read_model(self.directory)
        self._files = dict(_told(path) for path in sorted(self.directory.glob(f"*{SUFFIX}")))
        self._group_of = {name: names for names in self._files for name in names}

    def of(self, name: str) -> tuple[str, ...]:
        """The linears that share a Hessian with the linear called `name`. Raises ValueError where none was kept for it."""
        if name not in self._group_of:
            raise ValueError(
                f"{self.directory} has no Hessian of {name}: the run that kept them left it alone, or was cut off, or the file was lost. "
                "Keep Hessians of a complete run that quantizes it, or leave it alone by a rule."
            )
        return self._group_of[name]

    def require_model(self, source: Checkpoint) -> None:
        """Raise ValueError unless the Hessians are those of this checkpoint."""
        _require_model(self.directory, source.directory, _identity(source))

    def __getitem__(self, names: tuple[str, ...]) -> Hessian:
        """The Hessian that these linears share."""
        found = self._files[names]
        return Hessian(unfold(jnp.asarray(read("upper", found["upper"]))), jnp.asarray(read("rows", found["rows"])))

    def __iter__(self) -> Iterator[tuple[str, ...]]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _told(path: Path) -> tuple[tuple[str, ...], dict[str, Entry]]:
    """The linears of a file, and its tensors. Raises ValueError for a file that is damaged or holds something else."""
    found = headers(path)
    if {name: entry.dtype for name, entry in found.items()} != {"upper": "float32", "rows": "int32", "names": "uint8"}:
        raise ValueError(f"{path} is not a file of a Hessian: something else wrote it. Remove it, or name the directory that was kept.")
    return tuple(json.loads(read("names", found["names"]).tobytes())), found


def _identity(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells a model from others: its config, and a digest of all names, shapes and first values of its tensors."""
    entries = []
    for path in checkpoint.files:
        with open(path, "rb") as file:
            for name, entry in headers(path).items():
                file.seek(entry.offset)
                first = file.read(min(256, entry.nbytes)) if entry.dtype in READ else b""
                entries.append((name, entry.dtype, entry.shape, first.hex()))
    config = {key: value for key, value in checkpoint.config.items() if key not in VOLATILE}
    return {"version": 1, "tensors": hashlib.sha256(json.dumps(sorted(entries)).encode()).hexdigest(), "config": config}


def _read_model(directory: Path) -> dict[str, Any]:
    if not (directory / MODEL).exists():
        raise FileNotFoundError(f"{directory} holds no Hessians: it has no {MODEL}, which gptq-fn quantize --keep-hessians writes.")
    found = read_json(directory / MODEL)
    if found.get("version") != 1:
        raise ValueError(f"{directory / MODEL} is of version {found.get('version')!r}; version 1 can be read. Keep Hessians again.")
    return found


def _require_model(directory: Path, source: str | Path, model: Mapping[str, Any]) -> None:
    kept = _read_model(directory)
    if kept != model:
        before, now = kept.get("config", {}), model["config"]
        keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        reason = f"the configs differ in {', '.join(keys[:5])}" if keys else "the configs are equal, but the weights are not"
        raise ValueError(f"The Hessians in {directory} are those of another model than {source}: {reason}.")


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
    of the run that was kept. Raises ValueError or OSError in a sentence, before any work where a Hessian is missing.
    """
    opened = [open_source(source, config, spec) for config in configs]
    if not opened:
        return ()
    checkpoint, spec = opened[0]
    kept = KeptHessians(hessians)
    kept.require_model(checkpoint)
    plans = [_plan(spec, config) for config in configs]
    found = {(name, config): report for name, config, _, report in _solved(spec, checkpoint, kept, plans, progress, runtime)}
    return tuple(Report(config, tuple(found[job] for job in plan.items())) for config, plan in zip(configs, plans, strict=True))


def _plan(spec: ModelSpec, config: QuantConfig) -> dict[str, QuantConfig]:
    """The configuration of every linear that is quantized, in forward order."""
    plan = {}
    for i, block in enumerate(spec.blocks):
        for role in (role for _, roles in block.stages for role in roles):
            linear = block.linear(role)
            plan |= {name: config.resolve(name, usual=linear.quantize) for name in spec.names_of(i, linear)}
    if (head := head_plan(spec, config)) is not None:
        plan[dict(spec.tensors)["head"]] = head
    return {name: chosen for name, chosen in plan.items() if chosen is not None}


def _solved(
    spec: ModelSpec,
    tensors: Tensors,
    kept: KeptHessians,
    plans: Sequence[Mapping[str, QuantConfig]],
    progress: Callable[[int, int], None] | None,
    runtime: Runtime | None,
) -> Iterator[tuple[str, QuantConfig, QuantizedLinear, LinearReport]]:
    """Every linear of any plan, quantized with each configuration that a plan has for it, block by block."""
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
                yield from _quantized(leaf_of, kept[names], wanted[names], runtime)
                done += 1
                if progress:
                    progress(done, len(wanted))


def _reader(spec: ModelSpec, i: int, tensors: Tensors) -> Callable[[str], Mapping[str, Any]]:
    """The parameters of a linear of block `i` by its name; behind the last block, those of the head."""
    if i == len(spec.blocks):
        top = read_top(spec, tensors)
        return lambda _: top["embed" if spec.tied else "head"]
    block, p = spec.blocks[i], read_block(spec, i, tensors)
    at = {name: (linear.role, n) for linear in block.linears for n, name in enumerate(spec.names_of(i, linear))}

    def leaf_of(name: str) -> Mapping[str, Any]:
        role, n = at[name]
        return p[role] if block.copies(role) is None else jax.tree.map(lambda a: a[n], p[role])

    return leaf_of


def _quantized(
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
