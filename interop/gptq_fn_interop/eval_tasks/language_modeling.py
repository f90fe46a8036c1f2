"""How well a model predicts the labels that stand behind prompts."""

import math

import torch
from torch.nn.functional import cross_entropy

from gptq_fn_interop.console import progress
from gptq_fn_interop.eval_tasks.data import Sample, blocks
from gptq_fn_interop.eval_tasks.task import BaseTask


class LanguageModelingTask(BaseTask):
    """The perplexity of labels, given their prompts."""

    @torch.inference_mode()
    def run(self) -> dict[str, float]:
        """{"ppl": exp of the mean negative log likelihood of all label tokens}.

        AutoGPTQ took the mean of blocks' means, which depends on how samples fall into blocks.
        """
        total, count, done = 0.0, 0, 0
        with progress(type(self).__name__) as advance:
            for block in blocks(self.samples, lambda sample: len(sample.prompt) + len(sample.label), self.options.block_max_len):
                loss, tokens = self._loss(block)
                total, count, done = total + loss, count + tokens, done + len(block)
                advance(done, len(self.samples))
        if not count:
            raise ValueError("There is no label token behind another token, so there is nothing to predict.")
        return {"ppl": math.exp(total / count)}

    def _loss(self, block: list[Sample]) -> tuple[float, int]:
        """The sum of label tokens' negative log likelihoods, and their number; a first token of all is not predicted."""
        width = max(len(sample.prompt) + len(sample.label) for sample in block)
        rows = [[*sample.prompt, *sample.label] for sample in block]
        ids = self.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        seen = self.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        targets = self.tensor(
            [[-100] * len(s.prompt) + list(s.label) + [-100] * (width - len(row)) for s, row in zip(block, rows, strict=True)]
        )
        logits = self.model(input_ids=ids, attention_mask=seen).logits[:, :-1].float()
        wanted = targets[:, 1:]
        return cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item(), int((wanted != -100).sum())
