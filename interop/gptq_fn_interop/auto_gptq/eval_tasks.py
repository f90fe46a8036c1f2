"""AutoGPTQ's evaluation tasks, where its scripts look for them."""

from gptq_fn_interop.eval_tasks import LanguageModelingTask, SequenceClassificationTask, TextSummarizationTask

__all__ = ["LanguageModelingTask", "SequenceClassificationTask", "TextSummarizationTask"]
