"""From a checkpoint on disk to a quantized one, with one block in memory at a time."""

import json
import shutil
from collections.abc import Callable, Iterator
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
    quantize_blocks,
    quantize_head,
    spec_from_config,
)
from gptq_fn.check import Shapes
from gptq_fn.kernels import pack_roles
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.gptq_format import quantization_config, unpackable, zeros_version
from gptq_fn_interop.params import Tensors, dense_shapes, read_block, read_params, read_top, write_block, write_params, write_top
from gptq_fn_interop.shards import SHARD_BYTES, ShardWriter, staged, write_json

COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "chat_template*",
    "preprocessor_config.json",
    "LICENSE*",
    "NOTICE*",
)
"""What is copied from a model's directory beside its tensors."""

Progress = Callable[[int, int, tuple[LinearReport, ...]], None]
"""Called after each block with the blocks done, their number, and the reports of the block."""


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
) -> Report:
    """Quantize the checkpoint in `source` and write it, in the GPTQ format, to `destination`.

    `calib` holds token ids [samples, time], or samples of any lengths. `spec` describes models that are in no table. The
    destination appears when it is complete; a run that fails or is interrupted leaves nothing there. Raises ValueError or
    OSError in a sentence, before any work where the checkpoint, the config or the tokens are at fault.
    """
    config = config or QuantConfig()
    checkpoint, spec = open_source(source, config, spec)
    check_tokens(calib, checkpoint.shapes[spec.embedding][0])

    with staged(destination) as aside:
        writer = ShardWriter(aside, shard_bytes)
        quantized, embedding, report = quantize_tensors(spec, checkpoint, calib, config, writer.add, progress, runtime)
        writer.close()
        described = checkpoint.config if spec.origin is None else model_config(quantized)
        describe(aside, described, embedding, report)
        write_json(aside / "report.json", report.as_dict())
        copy_companions(Path(source), aside)
    return report


def quantize_tensors(
    spec: ModelSpec,
    tensors: Tensors,
    calib: Samples,
    config: QuantConfig,
    add: Callable[[str, np.ndarray], None],
    progress: Progress | None,
    runtime: Runtime | None = None,
) -> tuple[ModelSpec, np.dtype, Report]:
    """Quantize a model, of which `tensors` are read block by block, and `add` each tensor of the quantized one.

    Returns the spec of the quantized model, which may have a head of its own, the dtype of its embedding, and the report.
    """
    # On CPUs, XLA's Cholesky runs in SciPy's BLAS, whose threads spin while XLA's own are at work: one is faster.
    with threadpool_limits(1, "blas"):
        top = read_top(spec, tensors)
        batches = embed_batches(spec, top, calib, runtime, compute_dtype(jnp.dtype(top["embed"]["weight"].dtype)))
        zeros, reports = zeros_version(config), []
        blocks = (read_block(spec, i, tensors) for i in range(len(spec.blocks)))
        for i, (p, found, after) in enumerate(quantize_blocks(spec, blocks, batches, config, runtime=runtime)):
            batches = after
            for name, array in write_block(spec, i, p, zeros):
                add(name, array)
            reports.extend(found)
            if progress:
                progress(i + 1, len(spec.blocks), found)
        spec, top, found = quantize_head(spec, top, batches, config, runtime=runtime)
        for name, array in write_top(spec, top, zeros):
            add(name, array)
    return spec, top["embed"]["weight"].dtype, Report(config, (*reports, *found))


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
    with staged(destination) as aside:
        writer = ShardWriter(aside, shard_bytes)
        for name, array in write_params(quantized.spec, quantized.params, zeros_version(quantized.report.config)):
            writer.add(name, array)
        writer.close()
        describe(aside, described, quantized.params["top"]["embed"]["weight"].dtype, quantized.report)
        write_json(aside / "report.json", quantized.report.as_dict())


def load_gptq(directory: str | Path, *, spec: ModelSpec | None = None, packed: bool = False) -> tuple[dict[str, Any], ModelSpec]:
    """(params, spec) of a quantized or float checkpoint, written here, by AutoGPTQ or by GPTQModel.

    Where `packed`, each block is packed as by `gptq_fn.kernels.pack` before the next one is read: for `forward` and `generate`.
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


def check_tokens(calib: Samples, vocabulary: int) -> None:
    """Raise ValueError unless `calib` is token ids below `vocabulary`: an array [samples, time], or samples of any lengths."""
    samples = [np.asarray(sample) for sample in calib]
    if odd := [x for x in samples if x.ndim != 1 or not x.size or not np.issubdtype(x.dtype, np.integer)]:
        raise ValueError(
            "Calibration tokens are whole numbers [samples, time], or a sequence of samples [time]; "
            f"got a sample of {odd[0].dtype} {list(odd[0].shape)}."
        )
    if not samples:
        raise ValueError("There are no calibration samples; give some token ids [samples, time].")
    low, high = min(int(x.min()) for x in samples), max(int(x.max()) for x in samples)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"Calibration tokens reach from {low} to {high} but the model knows {vocabulary}: another tokenizer made them.")


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
