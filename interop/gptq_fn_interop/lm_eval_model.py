"""A model as lm-eval asks for it: log likelihoods of continuations and of whole texts, and greedy continuations."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gptq_fn_interop.console import progress
from gptq_fn_interop.predictors import Predictor, bucket

PIECE = 32
"""Tokens that are generated between two looks for a stop string."""


class PredictorLM(TemplateLM):
    """lm-eval's language model around a Predictor and a transformers tokenizer.

    Texts go through the model `batch_size` at a time, longest first, and equal inputs once: the answers of a question that are
    one token long cost one forward. What is longer than `max_length` loses its beginning. Raises ValueError where the tokenizer
    has neither a BOS nor an EOS token, with which lm-eval begins texts that have no context.
    """

    def __init__(self, model: Predictor, tokenizer: Any, *, max_length: int, batch_size: int = 1):
        """Around a model that is in memory."""
        super().__init__()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError("The tokenizer has neither a BOS nor an EOS token; lm-eval needs one to begin texts that have no context.")
        self.model, self.tokenizer, self.max_length, self.batch_size = model, tokenizer, max_length, batch_size

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.prefix_token_id if self.tokenizer.eos_token_id is None else self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What begins a text that has no context."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval tells its caches of requests apart by."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model was trained to read it."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt, continue_final_message=not add_generation_prompt
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds by itself unless the text begins with one already."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode([self.prefix_token_id]))
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log likelihood of each whole text, in windows of up to max_length tokens that share none."""
        found: list[float] = [0.0] * len(requests)
        owners, pairs = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1)
            for window in windows:
                context, continuation = make_disjoint_window(window)
                owners.append(i)
                pairs.append((("", ""), context, continuation))
        for i, (value, _) in zip(owners, self._loglikelihood_tokens(pairs), strict=True):
            found[i] += value
        return found

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes behind each text, greedily, up to a stop string. Raises ValueError for tasks that draw samples."""
        found = []
        with progress("Generating") as advance:
            for request in requests:
                asked: Any = request.args
                context, wanted = asked
                if wanted.get("do_sample") and wanted.get("temperature", 1.0) > 0:
                    raise ValueError("This task draws samples (do_sample), but only greedy generation is served; choose another task.")
                until = wanted.get("until") or []
                found.append(self._continued(context, [until] if isinstance(until, str) else until, wanted.get("max_gen_toks", 256)))
                advance(len(found), len(requests))
        return found

    def _continued(self, context: str, until: Sequence[str], most: int) -> str:
        """Up to `most` tokens behind the context, cut at the first stop string."""
        if most >= self.max_length:
            raise ValueError(f"The task wants {most} tokens generated, but the model has room for {self.max_length} in all.")
        prompt = self.tok_encode(context)[-(self.max_length - most) :]
        written: list[int] = []
        while len(written) < most:
            piece = self.model.extend([*prompt, *written], min(PIECE, most - len(written)), [self.eot_token_id])
            written += piece
            text = self.tokenizer.decode(written, skip_special_tokens=True)
            if self.eot_token_id in piece or any(stop in text for stop in until if stop):
                break
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        return text

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked: dict[tuple[int, ...], list[tuple[int, int]]] = defaultdict(list)  # input: (request, tokens to score) of those that share it
        tokens = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in requests]
        for i, (_, _, continuation) in enumerate(requests):
            asked[tuple(tokens[i][:-1])].append((i, len(continuation)))
        inputs = sorted(asked, key=len, reverse=True)
        found: dict[int, tuple[float, bool]] = {}
        with progress("Scoring texts") as advance:
            for begin in range(0, len(inputs), self.batch_size):
                batch = inputs[begin : begin + self.batch_size]
                rows = np.zeros((len(batch), bucket(len(batch[0]), self.max_length)), np.int32)  # nothing before the padding sees it
                for row, ids in zip(rows, batch, strict=True):
                    row[: len(ids)] = ids
                logits = self.model.predict(jnp.asarray(rows))
                for turn in range(max(len(asked[ids]) for ids in batch)):
                    served = [(k, *asked[ids][turn]) for k, ids in enumerate(batch) if turn < len(asked[ids])]
                    targets = np.zeros_like(rows)
                    for k, i, _ in served:
                        targets[k, : len(tokens[i]) - 1] = tokens[i][1:]
                    log_p, greedy = (np.asarray(a) for a in _score(logits, jnp.asarray(targets)))
                    for k, i, count in served:
                        scored = slice(len(tokens[i]) - 1 - count, len(tokens[i]) - 1)
                        found[i] = float(log_p[k, scored].sum(dtype=np.float64)), bool(greedy[k, scored].all())
                advance(min(begin + self.batch_size, len(inputs)), len(inputs))
        return [found[i] for i in range(len(requests))]


@jax.jit
def _score(logits: Float[Array, "batch time vocab"], targets: Int[Array, "batch time"]) -> tuple[Float[Array, "batch time"], Array]:
    """The log probability of each target, and whether it is the likeliest token."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0], logits.argmax(-1) == targets
