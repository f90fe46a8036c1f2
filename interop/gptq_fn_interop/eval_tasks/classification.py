"""How often a model writes the right class behind a prompt."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from transformers import GenerationConfig

from gptq_fn_interop.eval_tasks.task import BaseTask


class SequenceClassificationTask(BaseTask):
    """The accuracy of generated classes: what is written counts as the class that is nearest to it in edits.

    Raises ValueError for a label that is not among the `classes`; capitals and outer spaces do not matter.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        classes: Sequence[str],
        data_name_or_path: str,
        prompt_col_name: str,
        label_col_name: str,
        device: Any = None,
        **kwargs: Any,
    ):
        """Load and tokenize the data."""
        super().__init__(model, tokenizer, data_name_or_path, prompt_col_name, label_col_name, device, **kwargs)
        self.classes = [_plain(name) for name in classes]
        if strays := {sample.text for sample in self.samples if _plain(sample.text) not in self.classes}:
            raise ValueError(f"The label {min(strays)!r} is not among the classes {', '.join(classes)}.")
        written = [text for name in classes for text in (name, f" {name}")]
        self.max_new_tokens = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in written)

    def run(self, generation_config: GenerationConfig | None = None) -> dict[str, float]:
        """{"acc": how many of the samples are classified rightly}, from 0 to 1.

        Without a `generation_config` decoding is greedy. With one that returns several sequences they vote (self-consistency),
        and of classes with as many votes that of the earlier sequence wins. As many tokens are generated as a class has.
        """
        greedy = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1} if generation_config is None else {}
        found = self.generate(generation_config, max_new_tokens=self.max_new_tokens, **greedy)
        right = [vote(texts, self.classes) == _plain(sample.text) for sample, texts in found]
        return {"acc": sum(right) / len(right)}


def vote(texts: Sequence[str], classes: Sequence[str]) -> str:
    """The class to which most of the texts are nearest in edits; of as many, the earlier in both lists.

    Raises ImportError in a sentence where nltk is missing.
    """
    try:
        from nltk.metrics.distance import edit_distance
    except ImportError as error:
        raise ImportError("Classification tasks need nltk: pip install 'gptq-fn[eval]'.") from error
    nearest = [min(classes, key=lambda name: edit_distance(_plain(text), name)) for text in texts]
    return Counter(nearest).most_common(1)[0][0]


def _plain(text: str) -> str:
    return text.lower().strip()
