"""What a model reads of a text to be measured on it: windows of tokens, and which of the tokens are scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptq_fn_interop.calib import Split, encoder, read_tokenizer, texts


@dataclass(frozen=True, eq=False)
class Window:
    """Token ids that a model reads at once, of which those from `first` on are scored, each after all that stand before it."""

    tokens: np.ndarray
    """int32 [time]."""
    first: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.first < len(self.tokens):
            raise ValueError(
                f"A window of {len(self.tokens)} tokens cannot be scored from token {self.first} on; the first has no context."
            )


def strided(tokens: np.ndarray, length: int, stride: int) -> list[Window]:
    """Windows of up to `length` tokens that begin `stride` tokens apart and score what no window before them has.

    This is the loop of transformers' page on perplexity: every token but the first is scored once, with at least
    `length - stride` tokens of context where there are so many; with stride = length the first of each window is not scored.
    Raises ValueError where the stride is not from 1 to `length`.
    """
    if not 1 <= stride <= length or length < 2:
        raise ValueError(f"The stride is from 1 to the length of a window, {length}, not {stride}; a window has 2 tokens or more.")
    found, done = [], 0
    for begin in range(0, len(tokens), stride):
        window = tokens[begin : begin + length]
        first = max(1, done - begin)
        if first < len(window):
            found.append(Window(window, first))
        done = begin + len(window)
        if done == len(tokens):
            break
    return found


def chunks(tokens: np.ndarray, length: int, prefix: Sequence[int] = ()) -> list[Window]:
    """Disjoint windows of `length` tokens, of which the second half is scored; what is left at the end of the text is not.

    This is what llama.cpp's perplexity does with n_ctx = length: the logits of positions length/2 to length - 2 are used, and
    where the model wants a `prefix` (BOS) it replaces the first token of each chunk. Raises ValueError below 4 tokens.
    """
    if length < 4:
        raise ValueError(f"A chunk of which the second half is scored has 4 tokens or more, not {length}.")
    cut = np.array(tokens[: len(tokens) // length * length]).reshape(-1, length)
    cut[:, : len(prefix)] = prefix
    return [Window(chunk, length // 2 + 1) for chunk in cut]


def text_tokens(data: str, tokenizer: Any, count: int | None = None, split: Split = "evaluation") -> np.ndarray:
    """int32 [time]: a named source as one text, behind the special tokens that the tokenizer puts before a text.

    `data` and `tokenizer` are as in `calib.tokens`; the texts of a hub dataset are joined by blank lines, empty ones included,
    as transformers' page on perplexity joins WikiText's. At most `count` tokens, all if it is None. Raises ValueError where
    there are fewer than `count`, and what `calib.tokens` raises where there is no such data.
    """
    encode, before = encoder(tokenizer), prefix(tokenizer)
    if count is None:
        return np.asarray([*before, *encode("\n\n".join(texts(data, split)))], np.int32)
    ids: list[int] = []
    for text in _growing(texts(data, split), 8 * count):
        ids = [*before, *encode(text)]
        if len(ids) > count + 16:  # the last tokens of a part may be others than in the whole
            return np.asarray(ids[:count], np.int32)
    if len(ids) < count:
        raise ValueError(f"The {split} text has {len(ids)} tokens, but {count} were asked for; give more text, or ask for fewer windows.")
    return np.asarray(ids[:count], np.int32)


def _growing(parts: Iterator[str], characters: int) -> Iterator[str]:
    """The first parts joined, at least so many characters of them, then twice as many, and so on; in the end all."""
    taken: list[str] = []
    size = 0
    for part in parts:
        taken.append(part)
        size += len(part) + 2
        if size >= characters:
            yield "\n\n".join(taken)
            characters *= 2
    yield "\n\n".join(taken)


def prefix(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text: BOS, where the model wants it. `tokenizer` is as in `calib.tokens`."""
    plain = list(encoder(tokenizer)("a"))
    if not isinstance(tokenizer, str | Path):
        whole = tokenizer("a")["input_ids"]
    elif (path := Path(tokenizer) / "tokenizer.json").exists():
        whole = read_tokenizer(path).encode("a").ids
    else:
        from transformers import AutoTokenizer  # only checkpoints without tokenizer.json need it

        whole = AutoTokenizer.from_pretrained(str(tokenizer))("a")["input_ids"]
    before = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return list(whole[:before])
