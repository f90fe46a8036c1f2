"""What AutoGPTQ's tasks have in common: a model, a tokenizer, and samples of prompt and label."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import GenerationConfig

from gptq_fn_interop.console import progress
from gptq_fn_interop.eval_tasks.data import DataOptions, Sample, blocks, load_samples

LOADER = frozenset({"batch_size", "shuffle", "collate_fn", "num_workers", "pin_memory", "drop_last", "merge_prompt_label"})
"""What AutoGPTQ handed to torch's DataLoader, or overrode. It is taken and changes nothing."""


class BaseTask:
    """A task on a model of transformers, or one of `gptq_fn_interop.auto_gptq`; both attributes may be replaced between runs.

    `kwargs` are the fields of `DataOptions`. Raises TypeError for others, ValueError in a sentence where there is no such data.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        data_name_or_path: str,
        prompt_col_name: str,
        label_col_name: str,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ):
        """Load and tokenize the data."""
        known = [field.name for field in fields(DataOptions)]
        if stray := sorted(kwargs.keys() - LOADER - {*known}):
            raise TypeError(f"A task has no option {', '.join(stray)}; it has {', '.join(known)}.")
        self.model, self.tokenizer = model, tokenizer
        self.device = torch.device(model.device if device is None else device)
        self.options = DataOptions(**{name: value for name, value in kwargs.items() if name not in LOADER})
        self.samples = load_samples(str(data_name_or_path), prompt_col_name, label_col_name, tokenizer, self.options)

    @property
    def pad(self) -> int:
        """What fills texts up; masks keep it from being seen."""
        ids = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((token for token in ids if token is not None), 0)

    def tensor(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """int64 on the task's device."""
        return torch.tensor([list(row) for row in rows], dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def generate(self, config: GenerationConfig | None, **usual: Any) -> list[tuple[Sample, list[str]]]:
        """Each sample with the texts that the model wrote behind its prompt, without special tokens.

        `usual` goes before what `config` says. Samples without a prompt token raise ValueError.
        """
        if not all(sample.prompt for sample in self.samples):
            raise ValueError("A prompt has no tokens left; allow a longer sample_max_len, or fill the prompt.")
        done: list[tuple[Sample, list[str]]] = []
        with progress(type(self).__name__) as advance:
            for block in blocks(self.samples, lambda sample: len(sample.prompt), self.options.block_max_len):
                width = max(len(sample.prompt) for sample in block)
                ids = self.tensor([[self.pad] * (width - len(sample.prompt)) + list(sample.prompt) for sample in block])
                seen = self.tensor([[0] * (width - len(sample.prompt)) + [1] * len(sample.prompt) for sample in block])
                out = self.model.generate(input_ids=ids, attention_mask=seen, generation_config=config, pad_token_id=self.pad, **usual)
                texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in out[:, width:]]
                each = len(texts) // len(block)
                done += [(sample, texts[i * each : (i + 1) * each]) for i, sample in enumerate(block)]
                advance(len(done), len(self.samples))
        return done
