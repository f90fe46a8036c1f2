"""Data sets as samples of prompt and label, and samples as blocks that go through a model at once."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

SPLITS = ("evaluation", "test", "validation", "train")
"""Which split of a data set is taken: the first that it has."""

BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""What reads local files, by the ending of their names."""


@dataclass(frozen=True)
class DataOptions:
    """AutoGPTQ's options of a task's data, with its defaults."""

    load_fn: Callable[..., Any] | None = None
    """Loads the data from `data_name_or_path`; `datasets.load_dataset` or, for a local file, what its ending says, if it is None."""
    preprocess_fn: Callable[..., Mapping[str, Sequence[Any]]] | None = None
    """Makes columns of prompts and labels of all columns of the chosen samples; without it the data has them."""
    num_samples: int = 128
    """The most samples; of more, the same are drawn each time."""
    sample_max_len: int = 1024
    """Tokens of a sample's prompt and label together."""
    block_max_len: int = 2048
    """Tokens of a block, padding included; a longer sample is a block of its own."""
    add_eos_token: bool = False
    """Whether labels end with the EOS token."""
    truncate_prompt: bool = True
    """Of a sample that is too long, the prompt loses its beginning; else the label loses its end, and a sample without a label goes."""
    load_fn_kwargs: Mapping[str, Any] | None = None
    preprocess_fn_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if min(self.num_samples, self.sample_max_len, self.block_max_len) < 1:
            raise ValueError("num_samples, sample_max_len and block_max_len are 1 or more.")


@dataclass(frozen=True)
class Sample:
    """A prompt and its label: the label's text, and both as token ids."""

    text: str
    prompt: tuple[int, ...]
    label: tuple[int, ...]


def load_samples(source: str, prompt_column: str, label_column: str, tokenizer: Any, options: DataOptions) -> list[Sample]:
    """The samples of a data set, shortened to what the options allow.

    The tokenizer's special tokens are put around prompts, none around labels. Raises ValueError, in a sentence, where there
    is no such data or column, or nothing is left.
    """
    rows = _chosen(_split(_loaded(source, options)), options.num_samples)
    columns: Any = rows.to_dict()
    if options.preprocess_fn is not None:
        columns = options.preprocess_fn(columns, **(options.preprocess_fn_kwargs or {}))
    if missing := [name for name in (prompt_column, label_column) if name not in columns]:
        raise ValueError(
            f"There is no column {' or '.join(map(repr, missing))} among {', '.join(columns)}; name them as the data does, or make them "
            "with preprocess_fn."
        )
    if not columns[prompt_column]:
        raise ValueError(f"{source} has no samples.")
    end = [tokenizer.eos_token_id] if options.add_eos_token else []
    found = []
    for prompt, label in zip(columns[prompt_column], columns[label_column], strict=True):
        ids = [*tokenizer(str(label), add_special_tokens=False)["input_ids"], *end]
        found.append(_shortened(str(label), tokenizer(prompt)["input_ids"], ids, options))
    if not (kept := [sample for sample in found if sample.label]):
        raise ValueError(f"No label is left in samples of {options.sample_max_len} tokens; allow a longer sample_max_len.")
    return kept


def blocks(samples: Sequence[Sample], length: Callable[[Sample], int], most: int) -> Iterator[list[Sample]]:
    """The samples by length, as many at once as have `most` tokens when they are padded to the longest; at least one."""
    block: list[Sample] = []
    for sample in sorted(samples, key=length):
        if block and (len(block) + 1) * length(sample) > most:
            yield block
            block = []
        block.append(sample)
    if block:
        yield block


def _loaded(source: str, options: DataOptions) -> Any:
    more = dict(options.load_fn_kwargs or {})
    try:
        if options.load_fn is not None:
            return options.load_fn(source, **more)
        if Path(source).is_file():
            ending = Path(source).suffix.lower()
            if ending not in BUILDERS:
                raise ValueError(f"files that end in {', '.join(BUILDERS)} can be read, and this ends in {ending!r}")
            return datasets.load_dataset(BUILDERS[ending], data_files=source, **more)
        if any((Path(source) / name).exists() for name in ("state.json", "dataset_dict.json")):
            return datasets.load_from_disk(source, **more)
        return datasets.load_dataset(source, **more)
    except Exception as error:  # of many kinds: the library's own, its HTTP client's, those of load_fn
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"The data {source!r} could not be loaded: {reason}") from error


def _split(data: Any) -> datasets.Dataset:
    """One split of what was loaded."""
    if isinstance(data, Mapping):
        data = data[next((split for split in SPLITS if split in data), next(iter(data)))]
    if not isinstance(data, datasets.Dataset):
        raise ValueError(f"load_fn gave a {type(data).__name__}; it has to give a datasets.Dataset or DatasetDict, not a stream.")
    return data


def _chosen(rows: datasets.Dataset, most: int) -> datasets.Dataset:
    return rows if len(rows) <= most else rows.select(random.Random(0).sample(range(len(rows)), most))


def _shortened(text: str, prompt: Sequence[int], label: Sequence[int], options: DataOptions) -> Sample:
    excess = max(0, len(prompt) + len(label) - options.sample_max_len)
    from_prompt = min(excess, len(prompt)) if options.truncate_prompt else 0
    left = max(0, len(label) - (excess - from_prompt))
    return Sample(text, tuple(prompt[from_prompt:]), tuple(label[:left]))
