"""lm-eval's tasks on our models: figures are those of lm-eval's own model around the same weights, and differences are paired."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from gptq_fn_interop import lm_eval_tasks
from gptq_fn_interop.cli import main
from gptq_fn_interop.lm_eval_model import PredictorLM
from gptq_fn_interop.lm_eval_tasks import Measure, compare, measures, run_tasks
from gptq_fn_interop.predictors import bucket, load_predictor
from gptq_fn_interop.stream import copy_companions, load_gptq, save_gptq
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_fn import QuantConfig, Quantized, Report, round_to_nearest

TASK = """
task: tiny_{name}
tag: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
{more}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: acc_norm, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
doc_to_text: ""
doc_to_target: "{{question}} {{question}} {{question}} {{choices}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
WRITTEN = """
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 20}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
GROUP = """
group: tiny_group
task: [tiny_choice, tiny_other]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""
NAMES = ["tiny_choice", "tiny_rolling", "tiny_written"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("lm") / "model", max_position_embeddings=64)


@pytest.fixture(scope="module")
def other(directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model rounded to nearest, which is quicker than solving."""
    config, destination = QuantConfig(bits=2, group_size=32), tmp_path_factory.mktemp("lm") / "quantized"
    params, spec = load_gptq(directory)
    roles = {linear.role for linear in spec.blocks[0].linears}
    blocks = [
        {role: round_to_nearest(leaf["weight"], config) if role in roles else leaf for role, leaf in p.items()} for p in params["blocks"]
    ]
    save_gptq(Quantized({**params, "blocks": blocks}, spec, Report(config, ())), destination)
    copy_companions(directory, destination)
    return destination


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm") / "tasks"
    folder.mkdir()
    draw = np.random.default_rng(0)
    rows = [
        {"question": f"The {'statement of ' * (i % 3)}number {i} is", "choices": ["a", "blue", "green for"], "gold": int(draw.integers(3))}
        for i in range(6)
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for name, kind, more in (
        ("choice", "multiple_choice", CHOICE),
        ("other", "multiple_choice", CHOICE),
        ("rolling", "loglikelihood_rolling", ROLLING),
        ("written", "generate_until", WRITTEN),
        ("drawn", "generate_until", WRITTEN.replace("until:", "do_sample: true, until:")),
    ):
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, kind=kind, more=more, file=file))
    return folder


def model(directory: Path, way: Any = "jax", **options: Any) -> PredictorLM:
    return PredictorLM(load_predictor(directory, way), AutoTokenizer.from_pretrained(directory), **{"max_length": 64, **options})


@pytest.fixture(scope="module")
def theirs(directory: Path, folder: Path) -> Any:
    """What lm-eval finds with its own model around the same weights."""
    lm = HFLM(pretrained=AutoModelForCausalLM.from_pretrained(directory), tokenizer=AutoTokenizer.from_pretrained(directory), batch_size=4)
    return evaluated(lm, folder)


def evaluated(lm: Any, folder: Path) -> Any:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(lm, tasks=NAMES, task_manager=manager, bootstrap_iters=0, num_fewshot=1)  # pyright: ignore


@pytest.mark.parametrize("way", ["jax", "torch"])
def test_figures_and_answers_are_those_of_lm_evals_own_model(directory: Path, folder: Path, theirs: Any, way: str) -> None:
    ours = evaluated(model(directory, way, batch_size=3), folder)
    for task in NAMES:
        assert len(ours["samples"][task]) == 6
        for mine, their in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for a, b in zip(
                np.ravel(np.asarray(mine["filtered_resps"], object)), np.ravel(np.asarray(their["filtered_resps"], object)), strict=True
            ):
                assert a == (pytest.approx(b, rel=1e-4) if isinstance(b, float) else b)
        for key, value in theirs["results"][task].items():
            assert ours["results"][task][key] == (pytest.approx(value, rel=1e-3) if isinstance(value, float) else value)


def test_changes_are_paired_by_document(directory: Path, other: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped = folder.parent / "grouped"
    shutil.copytree(folder, grouped)
    (grouped / "group.yaml").write_text(GROUP)
    manager = TaskManager(include_path=str(grouped), include_defaults=False)  # indexing lm-eval's own takes long
    monkeypatch.setattr(lm_eval_tasks, "TaskManager", lambda **_: manager)
    runs = [run_tasks(model(d), ["tiny_group", "tiny_rolling"], folder=grouped) for d in (other, directory)]
    for ours, theirs in zip(*runs, strict=True):
        change = compare(ours, theirs)
        assert (ours.task, ours.metric) == (theirs.task, theirs.metric)
        assert change.value == ours.value - theirs.value
        assert change.paired
        if ours.documents is not None and theirs.documents is not None:
            difference = ours.documents - theirs.documents
            assert change.value == pytest.approx(difference.mean())
            assert change.error == pytest.approx(difference.std(ddof=1) / math.sqrt(len(difference)))
            assert change.changed == np.count_nonzero(difference)
    assert [(x.task, x.metric, None if x.documents is None else len(x.documents)) for x in runs[0] if x.metric != "acc_norm"] == [
        ("tiny_choice", "acc", 6),
        ("tiny_other", "acc", 6),
        ("tiny_rolling", "word_perplexity", None),
        ("tiny_rolling", "bits_per_byte", None),
        ("tiny_group", "acc", 12),
    ]


def test_errors_of_perplexities_are_what_a_jackknife_gives() -> None:
    draw = np.random.default_rng(0)
    pairs = np.stack([-draw.uniform(20, 60, 200), draw.integers(10, 20, 200)], 1)
    for name, of in (
        ("word_perplexity", lambda rows: math.exp(-rows[:, 0].sum() / rows[:, 1].sum())),
        ("bits_per_byte", lambda rows: -rows[:, 0].sum() / rows[:, 1].sum() / math.log(2)),
    ):
        samples = [{"doc_id": i, "filter": "none", name: tuple(row)} for i, row in enumerate(pairs)]
        (found,) = measures({"results": {"t": {f"{name},none": of(pairs), f"{name}_stderr,none": "N/A"}}, "samples": {"t": samples}})
        left = np.asarray([of(np.delete(pairs, i, 0)) for i in range(200)])
        assert found.error == pytest.approx(math.sqrt(199 / 200 * np.square(left - left.mean()).sum()), rel=0.05)


def test_figures_without_documents_are_taken_for_independent() -> None:
    change = compare(Measure("t", "f1", 0.5, 0.03), Measure("t", "f1", 0.4, 0.04))
    assert (change.value, change.error, change.paired) == (pytest.approx(0.1), pytest.approx(0.05), False)
    assert compare(Measure("t", "f1", 0.5, None), Measure("t", "f1", 0.4, 0.04)).error is None


@pytest.mark.parametrize("way", ["jax", "torch"])
def test_continuations_are_the_likeliest_tokens(directory: Path, way: Any) -> None:
    ids = AutoTokenizer.from_pretrained(directory)("The for statement is used to")["input_ids"]
    torch_model, text = AutoModelForCausalLM.from_pretrained(directory, dtype="float32"), list(ids)
    with torch.no_grad():
        for _ in range(12):
            text.append(int(torch_model(torch.tensor([text])).logits[0, -1].argmax()))
    extend, written = load_predictor(directory, way).extend, text[len(ids) :]
    assert extend(ids, 12, []) == written
    assert extend(ids, 12, [written[4]]) == written[: written.index(written[4]) + 1]


def test_buckets_are_few_and_long_enough() -> None:
    sizes = [bucket(n, 1000) for n in range(1, 1001)]
    assert all(n <= size <= max(16, 1.5 * n) for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 13


def test_the_command_tells_changes_and_writes_them(
    directory: Path, other: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--tasks", "tiny_choice,tiny_other", "--task-folder", str(folder), "--limit", "5", "--batch-size", "4")
    main(["eval", str(other), "--compare", str(directory), *asked, "--json", str(tmp_path / "e.json")])
    assert "of 5" in capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())
    assert [(x["task"], x["metric"]) for x in found] == [(t, m) for t in ("tiny_choice", "tiny_other") for m in ("acc", "acc_norm")]
    assert all(x["change_value"] == x["value"] - x["reference"] and x["change_paired"] for x in found)


def test_the_command_fails_in_sentences(
    directory: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*options: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(directory), "--task-folder", str(folder), *options])
        assert stop.value.code == 1
        return " ".join(capsys.readouterr().err.split())

    looked = []

    def manager(**options: Any) -> TaskManager:
        looked.append(options.pop("include_defaults", True))
        return TaskManager(**options, include_defaults=False)  # indexing lm-eval's own takes ten seconds

    monkeypatch.setattr(lm_eval_tasks, "TaskManager", manager)
    assert "has no task 'nothing'" in said("--tasks", "tiny_choice,nothing")
    assert looked == [False, True]  # the folder alone, then all of lm-eval's, too
    assert "draws samples (do_sample)" in said("--tasks", "tiny_drawn")
    for name in [name for name in sys.modules if name.startswith(("lm_eval", "gptq_fn_interop.lm_eval"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'gptq-fn[hf,eval]'" in said("--tasks", "tiny_choice")
