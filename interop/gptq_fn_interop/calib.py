"""Text into tokens: full-length samples for calibration, windows for evaluation, the same ones for the same seed."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

Split = Literal["calibration", "evaluation"]
Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True)
class HubData:
    """A dataset on the Hugging Face hub: where it is, and the column that holds text or chat messages."""

    path: str
    column: str
    calibration: str
    evaluation: str
    name: str | None = None
    files: dict[str, str] | None = None


HUB: dict[str, HubData] = {
    "c4": HubData(
        "allenai/c4",
        "text",
        "train",
        "validation",
        files={"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    ),
    "wikitext2": HubData("Salesforce/wikitext", "text", "train", "test", name="wikitext-2-raw-v1"),
    "ultrachat": HubData("HuggingFaceH4/ultrachat_200k", "messages", "train_sft", "test_sft"),
}
"""Short names of the calibration sets that people use."""

_LINE = 80
"""Characters up to which a paragraph is a heading or a common phrase, in which texts may agree."""

FILES = (".json", ".jsonl", ".md", ".rst", ".text", ".txt")
"""How names end that are not looked for on the hub."""


def tokens(
    data: str | Iterable[str], tokenizer: Any, *, samples: int, length: int, split: Split = "calibration", seed: int | None = 0
) -> np.ndarray:
    """int32 [samples, length]: text cut into windows of `length` tokens, of which `seed` chooses; the first ones if it is None.

    `data` is an iterable of texts, the path of a text file or pipe, "pydoc" (CPython's own documentation, half of it for each
    split), a name in HUB, or the name of any hub dataset with a "text" column. `tokenizer` is the directory of a
    checkpoint or a transformers tokenizer. No special tokens are added and no global random state is touched. Raises
    ValueError where the text is too short, and OSError or ValueError where there is no such data.
    """
    if samples < 1 or length < 1:
        raise ValueError(f"{samples} samples of {length} tokens were asked for; both numbers are 1 or more.")
    encode = encoder(tokenizer)
    stream: list[int] = []
    wanted = samples * length
    texts = documents(data, split) if isinstance(data, str) else iter(data)
    for text in texts:
        stream.extend(encode(text + "\n\n"))
        if len(stream) >= 4 * wanted:  # enough to choose from: hub datasets are far larger
            break
    windows = np.asarray(stream[: len(stream) // length * length], np.int32).reshape(-1, length)
    if len(windows) < samples:
        raise ValueError(
            f"The {split} text fills {len(windows)} windows of {length} tokens, but {samples} were asked for; "
            "give more text, or ask for fewer or shorter samples."
        )
    chosen = range(samples) if seed is None else random.Random(seed).sample(range(len(windows)), samples)
    return windows[list(chosen)]


def encoder(tokenizer: Any) -> Encode:
    """Text to token ids, without special tokens. Reading tokenizer.json needs neither torch nor transformers."""
    if not isinstance(tokenizer, str | Path):
        return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
    path = Path(tokenizer) / "tokenizer.json"
    if path.exists():
        fast = read_tokenizer(path)
        return lambda text: fast.encode(text, add_special_tokens=False).ids
    from transformers import AutoTokenizer  # only checkpoints without tokenizer.json need it

    try:
        return encoder(AutoTokenizer.from_pretrained(str(tokenizer)))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(
            f"{tokenizer} has no tokenizer.json, and no other tokenizer in it can be read; copy the model's there. transformers says: "
            f"{' '.join(str(error).split())}"
        ) from error


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json, without the truncation and padding that may have been saved with it.

    Raises ValueError for a damaged file.
    """
    try:
        found = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no kinds of its own
        raise ValueError(f"{path} is not a readable tokenizer: {error}. It is damaged, or not copied completely.") from error
    found.no_truncation()
    found.no_padding()
    return found


def documents(data: str, split: Split = "calibration") -> Iterator[str]:
    """The texts of a named source that are not blank: "pydoc", a file, or a hub dataset. The two splits share no text."""
    return filter(str.strip, texts(data, split))


def texts(data: str, split: Split) -> Iterator[str]:
    """The same with blank ones."""
    if data == "pydoc":
        yield from _pydoc(split)
    elif Path(data).exists() and not Path(data).is_dir():  # also a pipe
        try:
            yield Path(data).read_text("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{data} is not a text in UTF-8: {error}. Convert it, as with iconv -f UTF-16 -t UTF-8, or give another text."
            ) from error
    else:
        yield from _hub(data, split)


def _pydoc(split: Split) -> Iterator[str]:
    """CPython's documentation by topic, alphabetically; the first topics, up to half of the text, are for calibration.

    Some topics are others put together, so the second half is without the paragraphs that the first half has.
    """
    total, read, seen = sum(map(len, topics.values())), 0, set[str]()
    for key in sorted(topics):
        paragraphs = topics[key].split("\n\n")
        read += len(topics[key])
        if 2 * read <= total:
            seen |= {_words(each) for each in paragraphs if len(each) > _LINE}
            if split == "calibration":
                yield topics[key]
        elif split == "evaluation":
            yield "\n\n".join(each for each in paragraphs if _words(each) not in seen)


def _words(text: str) -> str:
    """The text without its layout."""
    return " ".join(text.split())


def _hub(data: str, split: Split) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"{data!r} is neither 'pydoc' nor a file; for hub datasets, pip install datasets.") from None
    if not Path(data).exists() and (data.startswith((".", "/", "~")) or Path(data).suffix in FILES):
        raise ValueError(f"There is no file {data!r}; give a text file, 'pydoc', or the name of a hub dataset.")
    known = HUB.get(data, HubData(data, "text", "train", "test"))
    part = known.calibration if split == "calibration" else known.evaluation
    try:
        rows = datasets.load_dataset(known.path, known.name, data_files=known.files, split=part, streaming=True)
    except Exception as error:  # the library raises errors of many kinds, its own and its HTTP client's
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"There is no file {data!r}, and no hub dataset of this name could be loaded: {reason}") from error
    for row in rows:
        if known.column not in row:
            raise ValueError(f"The dataset {data!r} has no column {known.column!r}, but {', '.join(row)}; write its texts into a file.")
        value = row[known.column]
        if isinstance(value, str):
            yield value
        else:
            yield "\n".join(f"{message['role']}: {message['content']}" for message in value)
