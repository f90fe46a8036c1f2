"""Text into tokens: full windows, chosen by a seed, from splits that share nothing."""

import json
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from gptq_fn_interop.calib import documents, encoder, tokens
from gptq_fn_interop.windows import prefix
from tiny import save_tiny_llama
from tokenizers import Tokenizer
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("calib") / "model")


def test_windows_are_full_and_the_seed_alone_decides(model: Path) -> None:
    state = random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002 - the global state is what must not move
    first = tokens("pydoc", model, samples=8, length=64, seed=3)
    assert first.shape == (8, 64)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, tokens("pydoc", model, samples=8, length=64, seed=3))
    assert (first != tokens("pydoc", model, samples=8, length=64, seed=4)).any()
    assert random.getstate() == state[0]
    np.testing.assert_array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002


def test_windows_are_consecutive_text(model: Path) -> None:
    text = "one two three four five six seven eight nine ten " * 20
    ids = encoder(model)(text + "\n\n")
    windows = tokens([text], model, samples=4, length=16, seed=None)
    np.testing.assert_array_equal(windows.reshape(-1), ids[:64])


def test_directories_and_transformers_tokenizers_agree(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    np.testing.assert_array_equal(tokens("pydoc", model, samples=2, length=32), tokens("pydoc", tokenizer, samples=2, length=32))


def test_splits_of_the_documentation_share_no_text() -> None:
    calibration, evaluation = set(documents("pydoc")), set(documents("pydoc", "evaluation"))
    assert calibration
    assert evaluation
    assert not calibration & evaluation
    lengths = sum(map(len, calibration)), sum(map(len, evaluation))
    assert 0.8 < lengths[0] / lengths[1] < 1.25
    runs, judged = runs_of(calibration), runs_of(evaluation)
    assert len(runs & judged) < 0.001 * len(judged)


def runs_of(texts: set[str]) -> set[tuple[str, ...]]:
    """All that has twenty words in a row."""
    return {tuple(words[i : i + 20]) for words in map(str.split, texts) for i in range(len(words) - 19)}


def test_too_little_text_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"fills 0 windows of 512 tokens, but 4 were asked for"):
        tokens(["short"], model, samples=4, length=512)


@pytest.mark.parametrize("data", ["words.txt", "./words", "~/words", "no/such/words.jsonl"])
def test_a_file_that_is_not_there_is_not_looked_for_on_the_hub(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", None)
    with pytest.raises(ValueError, match=f"There is no file '{data}'; give a text file"):
        next(documents(data))


@pytest.mark.parametrize(("samples", "length"), [(0, 8), (2, 0)])
def test_no_samples_and_no_tokens_are_refused(model: Path, samples: int, length: int) -> None:
    with pytest.raises(ValueError, match=f"{samples} samples of {length} tokens were asked for"):
        tokens("pydoc", model, samples=samples, length=length)


@pytest.mark.parametrize("text", ["", "{}", "version https://git-lfs.github.com/spec/v1"])
def test_a_damaged_tokenizer_is_told_in_a_sentence(model: Path, tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer: .*not copied completely"):
        tokens("pydoc", tmp_path, samples=2, length=32)


def test_a_directory_without_a_tokenizer_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"no tokenizer\.json, .* transformers says: .*\w"):
        tokens("pydoc", tmp_path, samples=2, length=32)


def test_a_tokenizer_that_was_saved_with_truncation_and_padding_cuts_and_pads_nothing(model: Path, tmp_path: Path) -> None:
    saved = Tokenizer.from_file(str(model / "tokenizer.json"))
    saved.enable_truncation(16)
    saved.enable_padding(length=24)
    saved.save(str(tmp_path / "tokenizer.json"))
    np.testing.assert_array_equal(tokens("pydoc", tmp_path, samples=4, length=64), tokens("pydoc", model, samples=4, length=64))
    assert prefix(tmp_path) == prefix(model)


def test_pipes_are_read_as_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writing = threading.Thread(target=(tmp_path / "pipe").write_text, args=("words",), daemon=True)
    writing.start()
    assert [*documents(str(tmp_path / "pipe"))] == ["words"]
    writing.join()


def test_a_mark_of_the_byte_order_is_no_text_and_other_encodings_are_told(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("words", "utf-8-sig")
    assert [*documents(str(tmp_path / "text"))] == ["words"]
    (tmp_path / "text").write_text("words", "utf-16")
    with pytest.raises(ValueError, match=r"not a text in UTF-8.*iconv"):
        next(documents(str(tmp_path / "text")))


def test_files_and_datasets_by_path(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and more words " * 100, "utf-8")
    assert tokens(str(text), model, samples=2, length=32).shape == (2, 32)
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps({"text": f"{split} {i} " * 50}) + "\n" for i in range(8)), "utf-8")
    assert next(documents(str(data))).startswith("train 0")
    assert next(documents(str(data), "evaluation")).startswith("test 0")
