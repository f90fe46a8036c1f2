"""From a checkpoint on disk to a quantized one, with one block in memory at a time."""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401 - loads the BLAS that XLA calls for Cholesky, so that its threads can be limited
from threadpoolctl import threadpool_limits

from gptq_fn import (
    LinearReport,
    ModelSpec,
    QuantConfig,
    Quantized,
    Report,
    Runtime,
    Samples,
    check,
    embed_batches,
    head_plan,
    preset,
    quantize_blocks,
    quantize_head,
    run_block,
    spec_from_config,
)
from gptq_fn.check import Shapes, check_tokens
from gptq_fn.kernels import pack_roles
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.gptq_format import described_by, quantization_config, unpackable, zeros_version
from gptq_fn_interop.kept import KeptHessians, keep_hessians
from gptq_fn_interop.overlap import ahead, behind
from gptq_fn_interop.params import Tensors, dense_shapes, read_block, read_params, read_top, under_way, write_block, write_params, write_top
from gptq_fn_interop.processes import by_first, first, meet, mine
from gptq_fn_interop.report.run import Origin, describe_run, write_report
from gptq_fn_interop.resume import Block, begin, blocks_of, complete, files_of, identity
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.shards import SHARD_BYTES, assemble, write_json, write_parts
from gptq_fn_interop.staging import claimed, complete_blocks, link, require_outside, staged, taking_its_place, unfinished

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "additional_chat_templates",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What is copied from a model's directory beside its tensors."""

Progress = Callable[[int, int], None]
"""Called after each step of a long task, as a block that is quantized, with the steps done and their number."""


Write = Callable[[int | None, Iterator[tuple[str, np.ndarray]], tuple[LinearReport, ...]], None]
"""Takes the tensors of a block, by its number, and its reports; for None the tensors outside the blocks."""


_READING = partial(jax.profiler.annotate_function, name="read a block")
_WRITING = partial(jax.profiler.annotate_function, name="write a block")
"""The names that these tasks have in a profile."""


def quantize_checkpoint(
    source: str | Path,
    destination: str | Path,
    calib: Samples,
    config: QuantConfig | None = None,
    *,
    spec: ModelSpec | None = None,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    runtime: Runtime | None = None,
    resume: bool = False,
    hessians: str | Path | None = None,
    origin: Origin | None = None,
) -> Report:
    """Quantize the checkpoint in `source` and write it, in the GPTQ format, to `destination`.

    `calib` holds token ids [samples, time], or samples of any lengths. `spec` describes models that are in no table. While a
    block is computed the next one is read and the one before is written. The destination appears when it is complete.
    A run that fails or is killed leaves its complete blocks in a hidden directory beside it, if there are any; the same
    call with `resume` continues from them and writes what it would have written without the failure, byte for byte, but for
    the seconds in report.json. `hessians` is a directory in which all Hessians are kept, for `sweep`. `origin` is told in report.json,
    by default the name of the source's directory. `progress` is called with the blocks done and their number. Raises ValueError or
    OSError in a sentence, before any work where the checkpoint, the config, the tokens or the destination are at fault.

    Processes that share a mesh each call this with the same arguments, and with one file system: each writes some of the blocks,
    and the first one all else.
    """
    began = time.perf_counter()
    config, runtime = config or preset("default"), runtime or default_runtime()
    checkpoint, spec = open_source(source, config, spec)
    check_tokens(calib, checkpoint.shapes[spec.embedding][0])
    if hessians is not None:
        require_outside(destination, hessians, "Hessians in")

    with ExitStack() as stack:
        aside = by_first(lambda: stack.enter_context(claimed(destination, resume=resume))) or unfinished(destination)
        run = identity(checkpoint, spec, calib, config, runtime, shard_bytes)
        by_first(lambda: begin(aside, run))
        done, outside = blocks_of(aside), list[Path]()
        with (
            _resumable(aside, len(spec.blocks)),
            _keeping(source, hessians, runtime, done, resume=resume) as (runtime, settle),
        ):

            def write(i: int | None, tensors: Iterator[tuple[str, np.ndarray]], reports: tuple[LinearReport, ...]) -> None:
                if i is None and first():
                    outside.extend(write_parts(aside, "outside", tensors, shard_bytes))
                elif i is not None and mine(i):
                    settle()  # a block that is complete is not computed again
                    complete(aside, i, tensors, reports, shard_bytes)

            quantized, embedding, report = quantize_tensors(
                spec, checkpoint, calib, config, write, progress, runtime, [(block.tensors, block.reports) for block in done]
            )

            def finish() -> None:
                parts = [*files_of(aside, len(spec.blocks)), *outside]
                with taking_its_place(aside, destination) as result:
                    for part in parts:
                        link(part, result / part.name)  # so that the blocks stay until all is well
                    assemble([result / part.name for part in parts], result, shard_bytes)
                    described = checkpoint.config if spec.origin is None else model_config(quantized)
                    describe(result, described, embedding, report)
                    told = origin or Origin(Path(source).resolve().name)
                    write_report(result, report, describe_run(told, calib=calib, seconds=time.perf_counter() - began))
                    copy_companions(Path(source), result)

            meet()  # every process has written its blocks
            by_first(finish)
    return report


@contextmanager
def _keeping(
    source: str | Path, hessians: str | Path | None, runtime: Runtime, done: Sequence[Block], *, resume: bool
) -> Iterator[tuple[Runtime, Callable[[], None]]]:
    """The runtime, which keeps Hessians where there is a directory for them, and what waits until those so far are on the disk.

    Raises ValueError where those of complete blocks are not there.
    """
    if hessians is None:
        yield runtime, lambda: None
        return
    with keep_hessians(source, hessians, resume=resume) as keeper:
        if done:
            KeptHessians(hessians).require(x.name for block in done for x in block.reports)
        yield replace(runtime, observe=keeper), keeper.settle


@contextmanager
def _resumable(aside: Path, blocks: int) -> Iterator[None]:
    """Adds to what goes wrong a note that tells how to continue, if any block is complete."""
    try:
        yield
    except BaseException as error:
        if done := complete_blocks(aside):
            error.add_note(f"{done} of {blocks} blocks are complete, in {aside}: the same command with --resume continues from there.")
        raise


def quantize_tensors(
    spec: ModelSpec,
    tensors: Tensors,
    calib: Samples,
    config: QuantConfig,
    write: Write,
    progress: Progress | None = None,
    runtime: Runtime | None = None,
    done: Sequence[tuple[Tensors, tuple[LinearReport, ...]]] = (),
) -> tuple[ModelSpec, np.dtype, Report]:
    """Quantize a model, of which `tensors` are read block by block, and `write` each block of the quantized one.

    Reading and writing are done by a thread each, one block ahead and one block behind. `done` are the tensors and reports of
    the first blocks, where these were quantized before. Returns the spec of the quantized model, which may have a head of its
    own, the dtype of its embedding, and the report.
    """
    runtime, zeros, blocks = runtime or default_runtime(), zeros_version(config), len(spec.blocks)
    described, plan, reports = described_by(config, head=False), head_plan(spec, config), []
    sources = []
    for i in range(blocks):
        if i < len(done):
            sources.append(_READING(partial(read_block, spec, i, done[i][0], described)))
        if i >= len(done) or config.asymmetric:  # through float blocks goes the float stream
            sources.append(_READING(partial(read_block, spec, i, tensors)))

    def told(i: int, found: tuple[LinearReport, ...]) -> None:
        reports.extend(found)
        if progress:
            progress(i + 1, blocks)

    # On CPUs, XLA's Cholesky runs in SciPy's BLAS, whose threads spin while XLA's own are at work: one is faster.
    with threadpool_limits(1, "blas"), ahead(sources) as params, behind() as later:
        top = read_top(spec, tensors)
        embedding = top["embed"]["weight"].dtype
        batches = embed_batches(spec, top, calib, runtime, compute_dtype(jnp.dtype(embedding)), beside=config.asymmetric)
        if plan is None:  # what lies outside the blocks is not needed any more, and large
            later(partial(write, None, write_top(spec, top, zeros), ()))
            top = {}
        for i, (_, found) in enumerate(done):
            quantized, exact = next(params), next(params) if config.asymmetric else None
            batches = run_block(spec.blocks[i], quantized, batches, exact=exact, runtime=runtime)
            told(i, found)
        rest = quantize_blocks(spec, params, batches, config, runtime=runtime, first=len(done))
        for i, (p, found, after) in enumerate(rest, len(done)):
            batches = after
            tensors_of_block = write_block(spec, i, under_way(p, zeros), zeros)
            later(_WRITING(partial(write, i, tensors_of_block, found)))
            told(i, found)
        if plan is not None:
            spec, top, found = quantize_head(spec, top, batches, config, runtime=runtime)
            later(partial(write, None, write_top(spec, top, zeros), found))
            reports.extend(found)
    return spec, embedding, Report(config, tuple(reports))


def open_source(source: str | Path, config: QuantConfig, spec: ModelSpec | None = None) -> tuple[Checkpoint, ModelSpec]:
    """The float checkpoint in `source` and its spec, when everything that headers can tell says that it can be quantized.

    Raises ValueError or OSError in a sentence where it cannot.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.quantization is not None:
        raise ValueError(f"{source} is quantized already; quantize the float checkpoint that it was made from.")
    spec = spec or spec_from_config(checkpoint.config)
    checkpoint = checkpoint.aligned(spec)
    head_plan(spec, config)
    shapes = dense_shapes(checkpoint.shapes, spec)
    if problems := (*check(spec, shapes), *unstorable(spec, shapes, config)):
        raise ValueError(
            f"{source} cannot be quantized: {' '.join(problems[:5])}" + f" (and {len(problems) - 5} more)" * (len(problems) > 5)
        )
    return checkpoint, spec


def save_gptq(
    quantized: Quantized, destination: str | Path, *, config: dict[str, Any] | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a quantized model to a new directory. `config` is its config.json, by default the one its spec came from.

    Raises FileExistsError, or ValueError where there is no config.
    """
    described = model_config(quantized.spec) if config is None else config
    with staged(destination) as result:
        tensors = write_params(quantized.spec, quantized.params, zeros_version(quantized.report.config))
        assemble(write_parts(result, "part", tensors, shard_bytes), result, shard_bytes)
        describe(result, described, quantized.params["top"]["embed"]["weight"].dtype, quantized.report)
        write_report(result, quantized.report, describe_run())


def load_gptq(directory: str | Path, *, spec: ModelSpec | None = None, packed: bool = False) -> tuple[dict[str, Any], ModelSpec]:
    """(params, spec) of a quantized or float checkpoint, written here, by AutoGPTQ or by GPTQModel.

    Where `packed`, each block is packed as by `gptq_fn.kernels.pack` before the next one is read: for `forward` and `generate`.
    Raises ValueError or OSError in a sentence where the files are damaged, missing, or not what config.json says.
    """
    checkpoint = Checkpoint(directory)
    spec = spec or spec_from_config(checkpoint.config)
    checkpoint = checkpoint.aligned(spec)
    if problems := check(spec, dense_shapes(checkpoint.shapes, spec, checkpoint.quantization)):
        raise ValueError(f"{directory} is not what its config says: {' '.join(problems[:5])}")
    return read_params(spec, checkpoint, checkpoint.quantization, pack_roles if packed else dict), spec


def compute_dtype(stored: jnp.dtype) -> jnp.dtype:
    """What to compute in: float32 on CPUs, which are slow in half precision; else what the checkpoint holds."""
    return jnp.dtype(jnp.float32) if jax.default_backend() == "cpu" else stored


def model_config(spec: ModelSpec) -> dict[str, Any]:
    """The config.json that this spec came from. Raises ValueError for a spec written by hand."""
    if spec.origin is None:
        raise ValueError("This spec was written by hand, so there is no config.json that transformers could read; pass one as config=.")
    return json.loads(spec.origin)


def unstorable(spec: ModelSpec, shapes: Shapes, config: QuantConfig) -> Iterator[str]:
    """Which linears the configuration makes impossible to store, and why."""
    linears = ((i, linear) for i, block in enumerate(spec.blocks) for linear in block.linears)
    stored = {name: (linear.stored, linear.quantize) for i, linear in linears for name in spec.names_of(i, linear)}
    head = dict(spec.tensors).get("head")
    for name, (layout, usual) in {**stored, **({head: ("out_in", False)} if head else {})}.items():
        chosen = config.resolve(name, usual=usual)
        shape = shapes.get(spec.embedding if name == head and spec.tied else f"{name}.weight", ())
        if chosen is not None and len(shape) == 2:
            out, inputs = shape if layout == "out_in" else shape[::-1]
            if reason := unpackable((out, inputs), chosen.bits):
                yield f"{name}: {reason}"
    for i, block in enumerate(spec.blocks):
        experts = [next(spec.names_of(i, linear)) for linear in block.linears if linear.role.startswith("experts.")]
        left = [name for name in experts if config.resolve(name) is None]
        if left and len(left) < len(experts):
            yield f"{left[0]}: a rule leaves it out, but readers take the experts of a block only as a whole; leave out all or none."


def describe(directory: Path, model: dict[str, Any], embedding: np.dtype, report: Report) -> None:
    """Write both places where readers look for the quantization config, and the dtype of what is not quantized.

    Without a dtype, transformers' "auto" takes that of the first tensor, which may be a float16 scale.
    """
    described = quantization_config(report)
    dtype = {} if "dtype" in model or "torch_dtype" in model else {"dtype": str(embedding)}
    write_json(directory / "config.json", {**model, **dtype, "quantization_config": described})
    write_json(directory / "quantize_config.json", described)


def copy_companions(source: Path, destination: Path) -> None:
    """Copy what belongs to a model beside its tensors: tokenizer, chat template, licence."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_dir():
                shutil.copytree(path, destination / path.name)
            else:
                shutil.copyfile(path, destination / path.name)
