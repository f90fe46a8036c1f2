"""How much of reference summaries a model's summaries hold."""

from statistics import fmean

from transformers import GenerationConfig

from gptq_fn_interop.eval_tasks.task import BaseTask

MEASURES = {"rouge-1": "rouge1", "rouge-2": "rouge2", "rouge-l": "rougeL"}
"""AutoGPTQ's names, and rouge-score's."""

PARTS = {"r": "recall", "p": "precision", "f": "fmeasure"}


class TextSummarizationTask(BaseTask):
    """ROUGE of generated summaries."""

    def run(self, generation_config: GenerationConfig | None = None) -> dict[str, dict[str, float]]:
        """{"rouge-1": {"r": recall, "p": precision, "f": F1}, "rouge-2": ..., "rouge-l": ...}: means over samples, by rouge-score.

        One sequence is generated for each prompt; without a `generation_config` greedily, up to 128 tokens. Raises ImportError
        in a sentence where rouge-score is missing.
        """
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ImportError as error:
            raise ImportError("Summarization tasks need rouge-score: pip install 'gptq-fn[eval]'.") from error
        usual = {"do_sample": False, "num_beams": 1, "max_new_tokens": 128} if generation_config is None else {}
        found = self.generate(generation_config, num_return_sequences=1, **usual)
        scorer = RougeScorer(list(MEASURES.values()))
        scores = [scorer.score(sample.text.strip(), texts[0].strip()) for sample, texts in found]
        return {
            ours: {short: fmean(getattr(x[name], part) for x in scores) for short, part in PARTS.items()} for ours, name in MEASURES.items()
        }
