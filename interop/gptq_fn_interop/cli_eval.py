"""The gptq-fn eval command."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from rich.table import Table
from tyro.conf import Positional, arg

from gptq_fn_interop import evaluation
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.console import flowing, out, progress
from gptq_fn_interop.hub import local
from gptq_fn_interop.predictors import Way, load_predictor, positions
from gptq_fn_interop.staging import require_writable
from gptq_fn_interop.windows import Window, chunks, prefix, strided, text_tokens

Form = Literal["samples", "strided", "chunks"]


@flowing
def evaluate(
    model: Annotated[Positional[str], arg(metavar="MODEL")],
    reference: Annotated[str | None, arg(aliases=["--compare"])] = None,
    data: str | None = None,
    windows: Form | None = None,
    samples: int | Literal["all"] | None = None,
    length: int | None = None,
    stride: int | None = None,
    tasks: str | None = None,
    fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    chat: bool = False,
    task_folder: Path | None = None,
    forward: Way = "auto",
    to: Annotated[Path | None, arg(name="json")] = None,
) -> None:
    """Measure how well a model predicts held-out text, or does lm-eval's tasks, and how far it is from a float model.

    Without --tasks it is perplexity and, with --reference, KL and top-1 agreement, over predicted tokens. What stands behind ±
    is a standard error, of samples or of documents; of differences it is that of the differences at the same tokens or documents.

    Args:
        model: A directory with a float or quantized checkpoint, or the name of a model on the hub.
        reference: The float model to compare with, a directory or a name on the hub.
        data: Held-out text: a text file, "pydoc", wikitext2, c4 or any hub dataset with a "text" column.
            "pydoc" is the default: the half of CPython's documentation that calibration never sees.
        windows: How the text is read.
            "samples" (the default): windows of --length tokens, each on its own, without special tokens.
            "strided": windows that begin --stride tokens apart, each scoring what is new in it, as in transformers' documentation.
            "chunks": windows of which the second half is scored, BOS first where the model wants it, as llama.cpp's perplexity does.
        samples: Number of windows, 32 unless told; "all" reads the whole text.
        length: Tokens of a window, 512 unless told; it is max_length in transformers' documentation, n_ctx (-c) in llama.cpp.
            With --tasks, the longest input, by default what the model was made for.
        stride: Tokens between the beginnings of strided windows, half of --length unless told.
        tasks: lm-eval's tasks or groups, with commas between, as hellaswag,arc_easy; needs pip install 'gptq-fn[hf,eval]'.
        fewshot: Examples before each question, where a task does not want none.
        limit: The most documents of each task.
        batch_size: Texts of tasks that go through the model at once, 1 unless told; more are faster on GPUs.
        chat: Put the model's chat template around the questions of tasks.
        task_folder: Further tasks for lm-eval, as YAML files.
        forward: How the model runs. "jax": this project's forward, weights dequantized to float32.
            "torch": transformers' forward, quantized weights packed. "auto": JAX for model types of the table, else torch.
        to: Also write the figures into this file; gptq-fn report shows MODEL/evaluation.json.
    """
    of_tasks = {"--fewshot": fewshot, "--limit": limit, "--batch-size": batch_size, "--chat": chat or None, "--task-folder": task_folder}
    of_text = {"--data": data, "--windows": windows, "--samples": samples, "--stride": stride}
    strays, instead = (of_tasks, "tasks; name some with --tasks") if tasks is None else (of_text, "perplexity; leave out that, or --tasks")
    if given := [name for name, value in strays.items() if value is not None]:
        raise ValueError(f"{', '.join(given)}: for {instead}.")
    if task_folder is not None and not task_folder.is_dir():
        raise ValueError(f"--task-folder {task_folder}: there is no such directory.")
    for name, value, least in (
        ("--samples", samples, 1),
        ("--length", length, 2),
        ("--limit", limit, 1),
        ("--batch-size", batch_size, 1),
        ("--fewshot", fewshot, 0),
    ):
        if isinstance(value, int) and value < least:
            raise ValueError(f"{name} is {least} or more, not {value}.")
    if to is not None:
        require_writable(to, "--json")
    directory, other = local(model), None if reference is None else local(reference)
    longest = positions(Checkpoint(directory).config)
    if length and longest and length > longest:
        raise ValueError(f"--length {length}: {model} was made for texts of up to {longest} tokens; ask for fewer.")
    if tasks is not None:
        size, options = batch_size or 1, {"shots": fewshot, "limit": limit, "chat": chat, "folder": task_folder}
        figures = _tasks(model, directory, other, tasks, size, length or longest or 2048, forward, options)
    else:
        found = _windows(data or "pydoc", directory, windows or "samples", samples or 32, length or min(512, longest or 512), stride)
        figures = _text(model, directory, other, data or "pydoc", found, forward, {"windows": windows or "samples"})
    if to is not None:
        to.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def _windows(data: str, directory: Path, form: Form, samples: int | Literal["all"], length: int, stride: int | None) -> Sequence[Window]:
    """What is read of the text. Raises ValueError where it is too short, or options contradict each other."""
    if stride is not None and form != "strided":
        raise ValueError(f"--stride is of strided windows, not of {form}; add --windows strided.")
    step = stride or max(1, length // 2)
    every = samples == "all"
    if form == "strided":
        text = text_tokens(data, directory, None if every else length + (samples - 1) * step)
        return strided(text, length, step)
    if form == "chunks":
        text = text_tokens(data, directory, None if every else samples * length)
        return chunks(text, length, prefix(directory))
    if every:
        text = text_tokens(data, directory)[len(prefix(directory)) :]
        return [Window(row) for row in text[: len(text) // length * length].reshape(-1, length)]
    return [Window(row) for row in tokens(data, directory, samples=samples, length=length, split="evaluation", seed=None)]


def _text(
    name: str, directory: Path, reference: Path | None, data: str, windows: Sequence[Window], way: Way, told: Mapping[str, Any]
) -> dict[str, Any]:
    """Measure on text, and tell."""
    model = load_predictor(directory, way).predict
    other = None if reference is None else load_predictor(reference, way).predict
    rows: list[evaluation.Scores] = []
    with progress("Evaluating windows") as advance:
        for row in evaluation.score(model, windows, other):
            rows.append(row)
            nll, _ = evaluation.mean([row.nll for row in rows])
            if not np.isfinite(nll):
                reason = "Its weights are not finite, or activations leave the range of their type."
                raise ValueError(f"{name}: the log likelihood of the text is {-nll}. {reason}")
            advance(len(rows), len(windows), f"Evaluating windows: perplexity {np.exp(nll):.3f}")
    found = evaluation.summary(rows)
    table = Table("measure", "value", title=f"{name} on {found.tokens} tokens of {data}")
    table.add_row("perplexity", f"{found.perplexity:.3f} ± {found.perplexity_error:.3f}")
    table.add_row("negative log likelihood, nats a token", f"{found.nll:.4f} ± {found.nll_error:.4f}")
    if found.reference_nll is not None:
        table.add_row("perplexity of the reference", f"{np.exp(found.reference_nll):.3f}")
        table.add_row("nats a token more than the reference", f"{found.nll - found.reference_nll:+.4f} ± {found.change_error:.4f}")
        table.add_row("KL from the reference, nats a token", f"{found.kl:.4f} ± {found.kl_error:.4f}")
        table.add_row("99% of tokens are below", f"{found.kl_99:.4f}")
        table.add_row("top-1 agreement", f"{found.agreement:.2%} ± {found.agreement_error:.2%}")
    out.print(table)
    length = max(len(window.tokens) for window in windows)
    told = {"model": name, "data": data, **told, "samples": len(windows), "length": length}
    figures = {"perplexity": found.perplexity, "perplexity_error": found.perplexity_error, **asdict(found)}
    return {**told, **_known(figures)}


def _tasks(
    name: str, directory: Path, reference: Path | None, tasks: str, batch_size: int, longest: int, way: Way, options: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Run tasks, and tell."""
    try:
        from transformers import AutoTokenizer

        from gptq_fn_interop.lm_eval_model import PredictorLM
        from gptq_fn_interop.lm_eval_tasks import compare, run_tasks
    except ImportError as error:
        raise ValueError(
            f"--tasks needs lm-eval and transformers, which are not all here ({error}): pip install 'gptq-fn[hf,eval]'."
        ) from None
    names = [task.strip() for task in tasks.split(",") if task.strip()]
    if not names:
        raise ValueError("--tasks names no task; give lm-eval's names with commas between, as in --tasks hellaswag,arc_easy.")

    def measured(directory: Path) -> list[Any]:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        if options["chat"] and not tokenizer.chat_template:
            raise ValueError(f"{directory} has no chat template; leave --chat out.")
        model = PredictorLM(load_predictor(directory, way), tokenizer, max_length=longest, batch_size=batch_size)
        return run_tasks(model, names, **options)

    found = measured(directory)
    theirs = {} if reference is None else {(x.task, x.metric): x for x in measured(reference)}
    columns = ("task", "metric", "value", *(("reference", "change", "changed documents") if theirs else ()))
    table, figures = Table(*columns, title=f"{name} on lm-eval's tasks"), []
    for x in found:
        row, figure = (
            [x.task, x.metric, _with_error(x.value, x.error)],
            {"task": x.task, "metric": x.metric, "value": x.value, "error": x.error},
        )
        if (other := theirs.get((x.task, x.metric))) is not None:
            change = compare(x, other)
            row += [
                _with_error(other.value, other.error),
                _with_error(change.value, change.error, "+") + ("" if change.paired or change.error is None else " (not paired)"),
                "" if change.changed is None or x.documents is None else f"{change.changed} of {len(x.documents)}",
            ]
            figure |= {"reference": other.value, **{f"change_{key}": value for key, value in asdict(change).items()}}
        table.add_row(*row)
        figures.append({"model": name, **_known(figure)})
    out.print(table)
    return figures


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def _known(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What has a value; errors of a single sample have none."""
    return {key: value for key, value in figures.items() if value is not None and not (isinstance(value, float) and math.isnan(value))}
