"""The first program of AutoGPTQ's README with an import changed, the model's name and the device, and with text to calibrate on.

    python examples/from_autogptq.py [MODEL [DESTINATION]]

Without MODEL, which is a directory or a name on the hub such as facebook/opt-125m, SmolLM2-135M-Instruct is taken. The README
calibrates on one sentence, which shows the interface but no quality: fewer than 32 tokens would reach each linear, so that all were
rounded to nearest, and a warning would say so. Here samples of CPython's own documentation stand beside the sentence. transformers'
pipeline warns that it does not know the class, as it did of AutoGPTQ's; it works.
"""

import sys

import torch
from gptq_fn_interop.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig  # was: from auto_gptq import ...
from models import BUILD, float_model, fresh
from transformers import AutoTokenizer, TextGenerationPipeline

from gptq_fn import interop

pretrained_model_dir = float_model(sys.argv[1] if len(sys.argv) > 1 else None)
quantized_model_dir = sys.argv[2] if len(sys.argv) > 2 else fresh(BUILD / f"{pretrained_model_dir.name}-autogptq-4bit")

tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
examples = [tokenizer("auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on GPTQ algorithm.")]
examples += [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in interop.tokens("pydoc", tokenizer, samples=32, length=512)]

quantize_config = BaseQuantizeConfig(
    bits=4,  # quantize model to 4-bit
    group_size=128,  # it is recommended to set the value to 128
    desc_act=False,  # set to False can significantly speed up inference but the perplexity may slightly bad
)

# load un-quantized model, by default, the model will always be loaded into CPU memory
model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)

# quantize model, the examples should be list of dict whose keys can only be "input_ids" and "attention_mask"
model.quantize(examples)

# save quantized model
model.save_quantized(quantized_model_dir)

# save quantized model using safetensors
model.save_quantized(quantized_model_dir, use_safetensors=True)

# load quantized model to the first GPU
model = AutoGPTQForCausalLM.from_quantized(quantized_model_dir, device="cuda:0" if torch.cuda.is_available() else "cpu")

# inference with model.generate
print(tokenizer.decode(model.generate(**tokenizer("auto_gptq is", return_tensors="pt").to(model.device))[0]))

# or you can also use pipeline
pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
print(pipeline("auto-gptq is")[0]["generated_text"])
