"""How far quantized models stray from their float original on text that they were not calibrated on, at several settings.

    python benchmarks/quality.py MODEL --configs bits=4 preset=best,bits=3 "covering: bits=3,group_size=64,grid=minmax"
    python benchmarks/quality.py MODEL --configs bits=4 --also DIRECTORY_THAT_ANOTHER_TOOL_QUANTIZED
    python benchmarks/quality.py MODEL --configs bits=4 --calib calib.npy --texts prose=held_out.npy

Claim to check: of two settings of the same size, one strays less, on text like the calibration and on text unlike it.

MODEL is a directory or a name on the hub. A setting names fields of QuantConfig, and may begin with a preset, with "+" between the
items of a tuple, and may have a name. Each is quantized in memory from several disjoint draws of calibration samples. Printed are
KL(float || quantized) in nats a token, perplexity, and how often both models find the same token likeliest: means over draws, and
as "+-" the standard error over sequences. The second table has the KL relative to that of the first row; its errors are those of
paired differences, which are much surer than either row. Seconds are those of the fastest draw: from two draws on, no compiling
counts.

A text is "pydoc" (CPython's own documentation, half of it to calibrate on), "licences" (NumPy's: legal prose), "code" (modules of
CPython's library), a text file, a dataset on the hub, or token ids [rows, length] in a .npy file. Of a file that is calibrated on,
that is the first half, and the second is judged on. Text that repeats the calibration is refused.
"""

import argparse
import importlib
import importlib.metadata
import inspect
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg  # noqa: F401 - loads the BLAS whose threads are limited while quantizing
from gptq_fn_interop.calib import Split, encoder, tokens
from gptq_fn_interop.cli_quantize import value_of
from gptq_fn_interop.evaluation import Model
from gptq_fn_interop.hub import local
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.stream import compute_dtype, load_gptq
from jaxtyping import Array, Float, Int
from threadpoolctl import threadpool_limits

from gptq_fn import ModelSpec, QuantConfig, QuantizedLinear, Runtime, dequantize, preset, quantize
from gptq_fn.model.decoder import run_block, run_embed, unembed

RUN = 32
"""How many tokens in a row make a repetition."""

MODULES = ("argparse", "datetime", "inspect", "subprocess", "tarfile", "typing")
"""What "code" is."""


@dataclass(frozen=True)
class Judged:
    """A model on one text: means over the tokens of each sequence, in nats; [draws, sequences]."""

    kl: np.ndarray
    nll: np.ndarray
    same: np.ndarray
    """How often both models find the same token likeliest."""


@dataclass(frozen=True)
class Row:
    """A quantized model, or several of the same setting, on all texts."""

    name: str
    bits: float
    """Bits a quantized weight, with its share of scales and zero points."""
    seconds: float | None
    texts: Mapping[str, Judged]


# settings


def setting(text: str) -> tuple[str, QuantConfig]:
    """A name and a configuration, of "field=value,..." or "name: field=value,...". Raises ValueError."""
    name, colon, fields = text.partition(":")
    hints, changes, base = get_type_hints(QuantConfig), {}, "fast"
    for pair in (fields if colon else text).split(","):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if key == "preset":
            base = value
            continue
        if not equals or key not in hints or key == "rules":
            names = ", ".join(["preset", *(key for key in hints if key != "rules")])
            raise ValueError(f"The setting {text!r} has {pair.strip()!r}; it reads field=value,... with fields of {names}.")
        several = get_origin(hints[key]) is tuple
        changes[key] = tuple(value_of(item) for item in value.split("+") if item) if several else value_of(value)
    return name.strip(), preset(base, **changes)  # pyright: ignore[reportArgumentType] - it refuses other names


# texts


def samples(source: str, model: Path, count: int, length: int, split: Split, halved: bool) -> np.ndarray:
    """Token ids [count or fewer, length] of a text. Of a file, the half of this split where it is `halved`. Raises ValueError."""
    if source.endswith(".npy"):
        found = np.load(source)
        if found.ndim != 2 or not np.issubdtype(found.dtype, np.integer):
            raise ValueError(f"{source} holds {found.dtype} {list(found.shape)}; token ids are whole numbers [rows, length].")
        return found[:count].astype(np.int32)
    built_in = {"licences": licences, "code": code}
    if source not in built_in and not Path(source).is_file():
        return tokens(source, model, samples=count, length=length, split=split, seed=0 if split == "calibration" else None)
    ids = encoder(model)(built_in[source]() if source in built_in else Path(source).read_text("utf-8"))
    if halved:
        ids = ids[: len(ids) // 2] if split == "calibration" else ids[len(ids) // 2 :]
    rows = min(count, len(ids) // length)
    if not rows:
        raise ValueError(f"{source} has {len(ids)} tokens, less than one sequence of {length}; give more text or a smaller --length.")
    return np.asarray(ids[: rows * length], np.int32).reshape(rows, length)


def licences() -> str:
    """The licences of NumPy and of the libraries in its wheel."""
    files = [file for file in importlib.metadata.files("numpy") or () if file.name == "LICENSE.txt"]
    return min(files, key=lambda file: len(file.parts)).read_text("utf-8")


def code() -> str:
    """The source of some modules of CPython's library."""
    return "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def require_other(name: str, judged: np.ndarray, calib: np.ndarray) -> None:
    """Raise ValueError where more than one run of RUN tokens in a hundred of a text stands in the calibration too."""
    seen = {run for row in calib for run in _runs(row)}
    runs = [run for row in judged for run in _runs(row)]
    if runs and (share := sum(run in seen for run in runs) / len(runs)) > 0.01:
        raise ValueError(f"{share:.0%} of the text {name!r} stands in the calibration too; judge on other text.")


def _runs(row: np.ndarray) -> list[bytes]:
    return [row[i : i + RUN].tobytes() for i in range(len(row) - RUN + 1)]


# judging


def leaves(params: Any) -> list[Any]:
    """All linears and other parameters, quantized ones as QuantizedLinear."""
    return jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QuantizedLinear))


def bits_per_weight(params: Mapping[str, Any]) -> float:
    """Bits of codes, 16-bit scales and zero points, a quantized weight."""
    found = [leaf for leaf in leaves(params) if isinstance(leaf, QuantizedLinear)]
    bits = sum(leaf.codes.size * leaf.bits + leaf.scale.size * (16 + leaf.bits) for leaf in found)
    return bits / max(1, sum(leaf.codes.size for leaf in found))


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """The parameters on JAX's default device and in this dtype; quantized weights become dense."""

    def leaf(x: Any) -> Any:
        if not isinstance(x, QuantizedLinear):
            return jnp.asarray(x).astype(dtype)
        bias = {} if x.bias is None else {"bias": x.bias.astype(dtype)}
        return {"weight": _dense(x.with_bias(None), dtype), **bias}

    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, QuantizedLinear))


@partial(jax.jit, static_argnames="dtype")
def _dense(q: QuantizedLinear, dtype: jnp.dtype) -> Array:
    return dequantize(q).astype(dtype)


def batches(ids: np.ndarray, tokens: int) -> list[Array]:
    """The sequences in calls of about so many tokens, and at least one sequence."""
    together = max(1, tokens // ids.shape[1])
    return [jnp.asarray(ids[i : i + together]) for i in range(0, len(ids), together)]


def last(model: Model, ids: Array) -> Array:
    """What leaves the last block, [rows, time, width]."""
    params, spec = model
    x = run_embed(replace(spec, blocks=()), params["top"], ids)
    for block, p in zip(spec.blocks, params["blocks"], strict=True):
        x, _ = run_block(block, p, x)
    return x


Head = tuple[ModelSpec, Mapping[str, Any]]
"""What makes logits of what leaves the last block: a spec without blocks, and the parameters outside of them."""


@dataclass(frozen=True)
class Original:
    """The float model on all texts. What leaves its last block is kept, for logits would fill memory: its head is run again."""

    head: Head
    texts: Mapping[str, Sequence[tuple[Array, Array]]]
    """Of each call the token ids, and what leaves the last block."""
    dtype: jnp.dtype
    """What is computed in, quantized models too."""


def original(model: Model, texts: Mapping[str, np.ndarray], dtype: jnp.dtype, tokens: int) -> Original:
    """The float model run on these texts in this dtype, about so many tokens a call."""
    params, spec = cast(model[0], dtype), model[1]
    with jax.default_matmul_precision("float32"):
        kept = {name: [(x, last((params, spec), x)) for x in batches(ids, tokens)] for name, ids in texts.items()}
    return Original((replace(spec, blocks=()), params["top"]), kept, dtype)


def judge(model: Model, reference: Original) -> dict[str, np.ndarray]:
    """KL from the float model, negative log likelihood and agreement on each text, [3, sequences]."""
    params, spec = cast(model[0], reference.dtype), model[1]
    head, found = (replace(spec, blocks=()), params["top"]), {}
    with jax.default_matmul_precision("float32"):
        for name, calls in reference.texts.items():
            rows = [measure(*head, *reference.head, last((params, spec), ids), kept, ids) for ids, kept in calls]
            found[name] = np.concatenate([np.asarray(row, np.float64) for row in rows], axis=1)
    return found


@partial(jax.jit, static_argnames=("spec", "original"))
def measure(
    spec: ModelSpec,
    top: Any,
    original: ModelSpec,
    reference: Any,
    x: Float[Array, "rows time width"],
    kept: Float[Array, "rows time width"],
    ids: Int[Array, "rows time"],
) -> Float[Array, "3 rows"]:
    """KL from the original, negative log likelihood and agreement: means over each row's predictions, one row at a time."""

    def one(row: tuple[Array, Array, Array]) -> Array:
        mine, other, ids = row
        log_p = jax.nn.log_softmax(unembed(spec, top, mine[None])[0, :-1].astype(jnp.float32))
        log_r = jax.nn.log_softmax(unembed(original, reference, other[None])[0, :-1].astype(jnp.float32))
        kl = (jnp.exp(log_r) * (log_r - log_p)).sum(-1)
        nll = -jnp.take_along_axis(log_p, ids[1:, None], axis=1)[:, 0]
        return jnp.stack([kl, nll, (log_p.argmax(-1) == log_r.argmax(-1)).astype(jnp.float32)]).mean(1)

    return jax.lax.map(one, (x, kept, ids)).T


def judged(found: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Judged]:
    """The draws together."""
    return {name: Judged(*np.stack([draw[name] for draw in found], axis=1)) for name in found[0]}


def quantized(name: str, config: QuantConfig, model: Model, draws: Sequence[np.ndarray], reference: Original, runtime: Runtime) -> Row:
    """The setting's row."""
    found, seconds, bits = [], [], 0.0
    for calib in draws:
        began = time.perf_counter()
        with threadpool_limits(1, "blas"):  # as runs of the command do
            made = jax.block_until_ready(quantize(*model, calib, config, runtime=runtime))
        seconds.append(time.perf_counter() - began)
        bits = bits_per_weight(made.params)
        found.append(judge((made.params, made.spec), reference))
    return Row(name, bits, min(seconds), judged(found))


# telling


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Of [draws, sequences]: the mean, and its standard error over sequences."""
    each = values.mean(0)
    return float(each.mean()), float(each.std(ddof=1) / math.sqrt(len(each))) if len(each) > 1 else math.nan


def table(rows: Sequence[Row], perplexity: Mapping[str, float]) -> str:
    """Markdown: what the rows are on each text, and their KL relative to the first row."""
    texts = list(perplexity)
    head = ["setting", "bits", *(f"{name}: {what}" for name in texts for what in ("KL", "perplexity", "top-1")), "seconds"]
    body = [["float", "", *(cell for name in texts for cell in ("", f"{perplexity[name]:.2f}", "")), ""]]
    ratios = []
    for row in rows:
        cells, mine = [row.name, f"{row.bits:.2f}"], [row.name]
        for name, found in row.texts.items():
            kl, error = mean_and_error(found.kl)
            cells += [f"{kl:.4f} +- {error:.4f}", f"{math.exp(found.nll.mean()):.2f}", f"{found.same.mean():.1%}"]
            first = rows[0].texts[name].kl
            ratio = kl / float(first.mean())
            _, error = mean_and_error(found.kl.mean(0, keepdims=True) - ratio * first.mean(0, keepdims=True))
            mine.append(f"{ratio:.3f} +- {error / float(first.mean()):.3f}")
        body.append([*cells, "" if row.seconds is None else f"{row.seconds:.1f}"])
        ratios.append(mine)
    return _markdown(head, body) + "\n\n" + _markdown([f"KL relative to {rows[0].name}", *texts], ratios)


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in (head, *body)]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def as_data(row: Row) -> dict[str, Any]:
    """JSON-ready: every figure of every draw and sequence."""
    texts = {name: {key: value.round(6).tolist() for key, value in vars(found).items()} for name, found in row.texts.items()}
    return {**vars(row), "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory, or a name on the hub")
    parser.add_argument("--configs", nargs="*", default=[], metavar="SETTING", help='"bits=3,group_size=64", "name: bits=4"')
    parser.add_argument("--also", nargs="*", type=Path, default=[], metavar="DIR", help="quantized checkpoints of the same model")
    parser.add_argument("--calib", default="pydoc", metavar="TEXT")
    parser.add_argument("--texts", nargs="+", default=["pydoc", "licences", "code"], metavar="[NAME=]TEXT", help="what is judged on")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples of a draw")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample and of a sequence")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16, help="sequences of a text")
    parser.add_argument("--dtype", default="float32", help="what is judged in")
    parser.add_argument("--json", type=Path, help="where to write every figure of every draw and sequence")
    args = parser.parse_args()
    if not args.configs and not args.also:
        parser.error("there is nothing to judge: give --configs, --also or both.")
    try:
        run(args)
    except (OSError, ValueError) as error:
        sys.exit(f"{error}")


def run(args: argparse.Namespace) -> None:
    settings = [setting(text) for text in args.configs]
    directory, runtime = local(args.model), default_runtime()
    named = {name or source: source for name, _, source in (text.rpartition("=") for text in args.texts)}
    size = {"model": directory, "length": args.length}
    calib = samples(args.calib, count=args.draws * args.samples, split="calibration", halved=True, **size)
    if len(calib) < args.draws * args.samples:
        raise ValueError(f"{args.calib} fills {len(calib)} samples, but {args.draws} draws of {args.samples} were asked for.")
    draws = np.split(calib, args.draws)
    texts = {
        name: samples(source, count=args.rows, split="evaluation", halved=source == args.calib, **size) for name, source in named.items()
    }
    for name, ids in texts.items():
        require_other(name, ids, calib)

    params, spec = load_gptq(directory)
    reference = original((params, spec), texts, jnp.dtype(args.dtype), runtime.tokens)
    perplexity = {name: math.exp(found[1].mean()) for name, found in judge((params, spec), reference).items()}
    model = (cast(params, compute_dtype(params["top"]["embed"]["weight"].dtype)), spec)
    del params
    rows: list[Row] = []
    about = {**{key: str(value) for key, value in vars(args).items()}, "device": jax.devices()[0].device_kind}

    def told(row: Row) -> None:
        rows.append(row)
        figures = ", ".join("{} {:.4f} +- {:.4f}".format(name, *mean_and_error(found.kl)) for name, found in row.texts.items())
        print(f"{row.name}: KL {figures}" + ("" if row.seconds is None else f" ({row.seconds:.1f} s)"), file=sys.stderr, flush=True)
        if args.json:
            args.json.write_text(json.dumps({"about": about, "float": perplexity, "rows": [*map(as_data, rows)]}, indent=1))

    for name, config in settings:
        told(quantized(name, config, model, draws, reference, runtime))
    for other in args.also:
        found = load_gptq(other)
        told(Row(other.name, bits_per_weight(found[0]), None, judged([judge(found, reference)])))
    print(table(rows, perplexity))


if __name__ == "__main__":
    main()
