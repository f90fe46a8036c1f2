"""AutoGPTQ's evaluation tasks: perplexity of answers, classification by generated text, summaries scored by ROUGE.

They take models of transformers, float or quantized, and those of `gptq_fn_interop.auto_gptq`.
"""

from gptq_fn_interop.eval_tasks.classification import SequenceClassificationTask
from gptq_fn_interop.eval_tasks.language_modeling import LanguageModelingTask
from gptq_fn_interop.eval_tasks.summarization import TextSummarizationTask

__all__ = ["LanguageModelingTask", "SequenceClassificationTask", "TextSummarizationTask"]
