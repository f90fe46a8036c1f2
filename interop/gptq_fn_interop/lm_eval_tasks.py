"""lm-eval's tasks on a model, and what changed against another: differences with standard errors, document by document."""

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

SEED = 1234
"""Chooses the examples before questions, as lm-eval's own command does."""


@dataclass(frozen=True, eq=False)
class Measure:
    """One figure of a task or a group of tasks, with its standard error."""

    task: str
    metric: str
    value: float
    error: float | None
    """Of `influence` where there is one, else lm-eval's; None where neither tells."""
    influence: np.ndarray | None = None
    """How much each document moves the figure, [documents], where documents that lm-eval tells of make the figure up.

    Residuals of a mean or a ratio of sums, divided by the number or the sum: errors are sqrt(n / (n - 1)) times their norm, and
    those of a difference of two models the same of the differences.
    """
    documents: np.ndarray | None = None
    """The figure of each document, where the whole is their mean."""


@dataclass(frozen=True)
class Change:
    """What a figure of one model has more than that of another."""

    value: float
    error: float | None
    paired: bool
    """Whether the error is of differences at the same documents; else the two figures are taken for independent, which is too large."""
    changed: int | None
    """How many documents have another figure."""


def run_tasks(
    model: LM, tasks: Sequence[str], *, shots: int | None = None, limit: int | None = None, chat: bool = False, folder: Path | None = None
) -> list[Measure]:
    """The figures of lm-eval's tasks and groups for a model, in lm-eval's order.

    `shots` is the number of examples before each question where a task does not fix it, `limit` the most documents of a task;
    `chat` puts the model's chat template around questions; `folder` has further tasks, as YAML. Raises ValueError, in a
    sentence, for tasks that lm-eval does not know and for data that cannot be loaded.
    """
    loaded = _loaded(tasks, folder)
    for task in loaded["tasks"].values():
        usual = task.get_config("num_fewshot")
        if usual is None or (shots is not None and usual != 0):  # 0 means that the task wants none
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SEED)
    found: Any = evaluate(model, loaded, limit=limit, apply_chat_template=chat, fewshot_as_multiturn=chat)
    return list(measures(found))


def _loaded(tasks: Sequence[str], folder: Path | None) -> Any:
    """The tasks with their data. Where the folder has them all, lm-eval's own, which are thousands of files, are not looked at."""
    random.seed(SEED)  # some tasks shuffle answers when they are loaded: the same way for each model
    np.random.seed(SEED)  # noqa: NPY002
    manager = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or _unknown(tasks, manager) or manager.all_groups:  # a group may name tasks of lm-eval's
        manager = TaskManager(include_path=None if folder is None else str(folder))
    if unknown := _unknown(tasks, manager):
        raise ValueError(f"lm-eval {lm_eval.__version__} has no task {', '.join(map(repr, unknown))}; `lm-eval ls tasks` lists them.")
    try:
        return manager.load(sorted(manager.match_tasks(list(tasks))))
    except Exception as error:  # of many kinds: of datasets, its HTTP client and the code of tasks
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{', '.join(tasks)} cannot be loaded: {reason}") from error


def _unknown(tasks: Sequence[str], manager: TaskManager) -> list[str]:
    return [task for task in tasks if not manager.match_tasks([task])]


def measures(found: Mapping[str, Any]) -> Iterator[Measure]:
    """The figures in what lm-eval's simple_evaluate returns."""
    for task, row in found["results"].items():
        for key, value in row.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            rows = list(_documents(found, task, metric, name))
            error = row.get(f"{metric}_stderr,{name}")
            influence = _influence(rows, value)
            if influence is not None:
                error = _norm(influence)
            plain = np.asarray(rows, np.float64) if influence is not None and np.ndim(rows) == 1 else None
            label = metric if name == "none" else f"{metric}, {name}"
            yield Measure(task, label, float(value), error if isinstance(error, float) else None, influence, plain)


def compare(measure: Measure, reference: Measure) -> Change:
    """How far a figure is from the same one of another model."""
    value = measure.value - reference.value
    ours, theirs = measure.influence, reference.influence
    if ours is not None and theirs is not None and ours.shape == theirs.shape:
        changed = None
        if measure.documents is not None and reference.documents is not None:
            changed = int((measure.documents != reference.documents).sum())
        return Change(value, _norm(ours - theirs), True, changed)
    known = measure.error is not None and reference.error is not None
    return Change(value, math.hypot(measure.error or 0, reference.error or 0) if known else None, False, None)


def _documents(found: Mapping[str, Any], task: str, metric: str, name: str) -> Iterator[Any]:
    """What lm-eval tells of the documents of a task, or of all tasks in a group."""
    for part in found.get("group_subtasks", {}).get(task, ()):
        yield from _documents(found, part, metric, name)
    for row in sorted(found.get("samples", {}).get(task, ()), key=lambda row: row["doc_id"]):
        if row["filter"] == name and metric in row:
            yield row[metric]


def _influence(rows: Sequence[Any], value: float) -> np.ndarray | None:
    """`Measure.influence` where these rows make up the value: as their mean, or as a perplexity or bits of (log likelihood, weight)."""
    try:
        array = np.asarray(rows, np.float64)
    except (TypeError, ValueError):
        return None
    if array.ndim == 1 and len(array) > 1 and math.isclose(array.mean(), value, rel_tol=1e-6, abs_tol=1e-9):
        return (array - array.mean()) / len(array)
    if array.ndim == 2 and array.shape[1] == 2 and len(array) > 1:
        total, weight = array.sum(0)
        ratio = -total / weight
        residuals = (-array[:, 0] - ratio * array[:, 1]) / weight
        for whole, slope in ((math.exp(ratio), math.exp(ratio)), (ratio / math.log(2), 1 / math.log(2))):
            if math.isclose(whole, value, rel_tol=1e-6):
                return slope * residuals
    return None


def _norm(influence: np.ndarray) -> float:
    return math.sqrt(len(influence) / (len(influence) - 1) * np.square(influence).sum())
