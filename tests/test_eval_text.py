"""Perplexity in the forms that people compare, held against their own loops; KL and errors against their definitions."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from gptq_fn_interop.calib import tokens
from gptq_fn_interop.cli import main
from gptq_fn_interop.evaluation import evaluate, mean
from gptq_fn_interop.predictors import load_predictor
from gptq_fn_interop.stream import load_gptq
from gptq_fn_interop.windows import Window, chunks, prefix, strided, text_tokens
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny_llama
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = topics["while"] + topics["with"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("text") / "model")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_tiny_llama(tmp_path_factory.mktemp("text") / "other")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def torch_model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


@torch.no_grad()
def documented(model: Any, ids: torch.Tensor, max_length: int, stride: int, shifted: int) -> float:
    """The loop of transformers' page on perplexity; it counts `shifted` tokens less in each window than have labels."""
    total, count, before = 0.0, 0, 0
    for begin in range(0, ids.size(1), stride):
        end = min(begin + max_length, ids.size(1))
        input_ids = ids[:, begin:end]
        target_ids = input_ids.clone()
        target_ids[:, : -(end - before)] = -100
        loss = model(input_ids, labels=target_ids).loss
        valid = int((target_ids[:, 1:] != -100).sum()) if not shifted else int((target_ids != -100).sum()) - shifted
        total, count, before = total + loss.item() * valid, count + valid, end
        if end == ids.size(1):
            break
    return math.exp(total / count)


def test_strided_windows_give_what_transformers_documents(directory: Path, file: Path) -> None:
    ids = text_tokens(str(file), directory, 300)
    model = torch_model(directory)
    for length, stride in ((32, 12), (32, 32)):
        found = evaluate(load_gptq(directory), strided(ids, length, stride))
        batch = torch.tensor(np.asarray(ids)[None], dtype=torch.long)
        assert found.perplexity == pytest.approx(documented(model, batch, length, stride, 0), rel=1e-5)
        # the page weighs each window as if one token less were predicted in it
        assert found.perplexity == pytest.approx(documented(model, batch, length, stride, 1), rel=2e-2)


@torch.no_grad()
def test_chunks_give_what_llama_cpp_computes(directory: Path, file: Path) -> None:
    length, bos, model = 32, 5, torch_model(directory)
    ids = text_tokens(str(file), directory, 300)
    nlls = []
    for i in range(len(ids) // length):  # as in llama.cpp's tools/perplexity/perplexity.cpp, with n_ctx = length
        chunk = torch.tensor(ids[i * length : (i + 1) * length], dtype=torch.long)
        seen = chunk.clone()
        seen[0] = bos
        logits = model(seen[None]).logits[0].double()
        first = length // 2
        nlls.append([-float(logits[j].log_softmax(-1)[chunk[j + 1]]) for j in range(first, length - 1)])
    found = evaluate(load_gptq(directory), chunks(ids, length, [bos]))
    assert found.tokens == sum(map(len, nlls))
    assert found.nll == pytest.approx(np.mean(nlls), rel=1e-5)
    assert found.nll_error == pytest.approx(np.mean(nlls, axis=1).std(ddof=1) / math.sqrt(len(nlls)), rel=1e-4)
    assert evaluate(load_gptq(directory), chunks(ids, length)).nll != pytest.approx(found.nll, rel=1e-5)


@given(st.integers(2, 200), st.integers(2, 40), st.data())
def test_strided_windows_score_each_token_once(count: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length))
    scored = [token for w in strided(np.arange(count), length, stride) for token in w.tokens[w.first :]]
    missing = set(range(count)) - set(scored)
    assert len(scored) == len(set(scored))
    assert missing == ({0} if stride < length else set(range(0, count, length)))


@torch.no_grad()
def test_kl_and_agreement_are_those_of_the_definition(directory: Path, other: Path) -> None:
    ids = tokens("pydoc", directory, samples=4, length=24, split="evaluation", seed=None)
    p, q = (torch_model(d)(torch.tensor(ids, dtype=torch.long)).logits[:, :-1].double().log_softmax(-1) for d in (directory, other))
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double()
    targets = torch.tensor(ids[:, 1:, None], dtype=torch.long)
    change = (p - q).gather(-1, targets)[..., 0]
    for way in ("jax", "torch"):
        found = evaluate(load_predictor(other, way).predict, ids, load_predictor(directory, way).predict)
        assert found.kl == pytest.approx(float(kl.mean()), rel=1e-3)
        assert found.kl_error == pytest.approx(float(kl.mean(1).std() / 2), rel=1e-3)
        assert found.kl_99 == pytest.approx(float(kl.flatten().quantile(0.99)), rel=1e-3)
        assert found.agreement == pytest.approx(float(same.mean()))
        assert found.agreement_error == pytest.approx(float(same.mean(1).std() / 2))
        assert found.reference_nll is not None
        assert found.nll - found.reference_nll == pytest.approx(float(change.mean()), rel=1e-3)
        assert found.change_error == pytest.approx(float(change.mean(1).std() / 2), rel=1e-3)


def test_an_error_is_what_repetition_shows() -> None:
    draw = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(300):
        groups = [draw.normal(draw.normal(), 1.0, size=n) for n in draw.integers(5, 15, 60)]
        value, error = mean(groups)
        means.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.15)
    assert math.isnan(mean([np.ones(3)])[1])


def test_a_text_is_read_whole_behind_its_special_tokens(directory: Path, file: Path, tmp_path: Path) -> None:
    plain = AutoTokenizer.from_pretrained(directory)(TEXT)["input_ids"]
    assert text_tokens(str(file), directory).tolist() == plain
    assert text_tokens(str(file), directory, 200).tolist() == plain[:200]
    assert prefix(directory) == []
    fast = Tokenizer.from_file(str(directory / "tokenizer.json"))
    fast.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    fast.save(str(tmp_path / "tokenizer.json"))
    assert prefix(tmp_path) == [0]
    assert text_tokens(str(file), tmp_path, 200).tolist() == [0, *plain[:199]]
    with pytest.raises(ValueError, match=f"has {len(plain)} tokens, but {len(plain) + 1} were asked for"):
        text_tokens(str(file), directory, len(plain) + 1)


def test_windows_that_cannot_be_are_refused(directory: Path) -> None:
    refusals: dict[str, Callable[[], Any]] = {
        "from token 0 on": lambda: Window(np.arange(4), 0),
        "not 9; a window": lambda: strided(np.arange(20), 8, 9),
        "has 4 tokens or more, not 3": lambda: chunks(np.arange(20), 3),
        "fills no window": lambda: evaluate(load_gptq(directory), strided(np.arange(1), 8, 4)),
        "another model's tokenizer": lambda: evaluate(load_gptq(directory), np.full((1, 4), 999)),
    }
    for words, call in refusals.items():
        with pytest.raises(ValueError, match=words):
            call()


def test_the_command_measures_in_each_form_and_writes_figures(
    directory: Path, other: Path, file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form, more in (("strided", ("--stride", "8")), ("chunks", ()), ("samples", ())):
        main(["eval", str(other), "--compare", str(directory), "--data", str(file), "--windows", form, "--length", "16", *more,
              "--samples", "5", "--json", str(tmp_path / "e.json")])  # fmt: skip
        assert "top-1 agreement" in capsys.readouterr().out
        found = json.loads((tmp_path / "e.json").read_text())
        text = text_tokens(str(file), directory, 80)
        windows = {"strided": strided(text[: 16 + 4 * 8], 16, 8), "chunks": chunks(text, 16), "samples": text.reshape(5, 16)}[form]
        expected = evaluate(load_gptq(other), windows, load_gptq(directory))
        assert found["kl"] == pytest.approx(expected.kl)
        assert found["perplexity"] == pytest.approx(expected.perplexity)
        assert (found["windows"], found["samples"], found["length"]) == (form, 5, 16)
    main(["eval", str(directory), "--data", str(file), "--samples", "all", "--length", "64", "--windows", "chunks"])
    assert f"{len(text_tokens(str(file), directory)) // 64 * 31} tokens" in " ".join(capsys.readouterr().out.split())


def test_the_command_fails_in_sentences(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xfe\x00")
    for words, options in {
        "--limit: for tasks; name some with --tasks": ("--limit", "3"),
        "--data: for perplexity; leave out that": ("--tasks", "x", "--data", "pydoc"),
        "--length is 2 or more, not 1": ("--length", "1"),
        "made for texts of up to 2048 tokens": ("--length", "4096"),
        "add --windows strided": ("--stride", "4"),
        "from 1 to the length of a window, 512, not 600": ("--windows", "strided", "--stride", "600"),
        "is not a text in UTF-8": ("--data", str(tmp_path / "picture")),
        "name a file in a directory": ("--json", str(tmp_path / "no" / "x.json")),
        "names no task": ("--tasks", ","),
        "there is no such directory": ("--tasks", "x", "--task-folder", str(tmp_path / "no")),
        "has no chat template": ("--tasks", "x", "--chat"),
    }.items():
        with pytest.raises(SystemExit) as stop:
            main(["eval", str(directory), *options])
        assert stop.value.code == 1
        said = " ".join(capsys.readouterr().err.split())
        assert words in said
        assert "Traceback" not in said
