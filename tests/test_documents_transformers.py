"""The code blocks of transformers' GPTQ page and of Qwen's, as their readers paste them, after one import of this package.

Models go by the names that the pages give them: a stand-in for the hub serves small ones. Substituted are the reader's
user name and what names a GPU. The blocks of a page share their variables, so a page is one process.
"""

import json
from pathlib import Path

import numpy as np
import torch
from gptq_writer import Scheme, quantization_config, random_linear, write
from hub_stand_in import USER, files_of, hub, run
from safetensors.torch import load as load_bytes
from tiny import tiny_tokenizer
from torch import nn
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TRANSFORMERS_PAGE = """
import gptq_fn.interop

from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

model_id = "facebook/opt-125m"
tokenizer = AutoTokenizer.from_pretrained(model_id)
gptq_config = GPTQConfig(bits=4, dataset="c4", tokenizer=tokenizer)

dataset = ["auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on GPTQ algorithm."]
gptq_config = GPTQConfig(bits=4, dataset=dataset, tokenizer=tokenizer)

quantized_model = AutoModelForCausalLM.from_pretrained(model_id, device_map="auto", quantization_config=gptq_config)

first = quantized_model  # not of the page
quantized_model = AutoModelForCausalLM.from_pretrained(
    model_id, device_map="auto", max_memory={"cpu": "30GiB"}, quantization_config=gptq_config
)

quantized_model.push_to_hub("opt-125m-gptq")
tokenizer.push_to_hub("opt-125m-gptq")

quantized_model.save_pretrained("opt-125m-gptq")
tokenizer.save_pretrained("opt-125m-gptq")

quantized_model.to("cpu")
quantized_model.save_pretrained("opt-125m-gptq")

from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("somebody/opt-125m-gptq", device_map="auto")
loaded = [first, quantized_model, model]  # not of the page

import torch
from transformers import AutoModelForCausalLM, GPTQConfig

gptq_config = GPTQConfig(bits=4, exllama_config={"version":2})
model = AutoModelForCausalLM.from_pretrained("somebody/opt-125m-gptq", device_map="auto", quantization_config=gptq_config)
loaded.append(model)  # not of the page

import torch
from transformers import AutoModelForCausalLM, GPTQConfig
gptq_config = GPTQConfig(bits=4, use_exllama=False)
model = AutoModelForCausalLM.from_pretrained("somebody/opt-125m-gptq", device_map="cpu", quantization_config=gptq_config)
loaded.append(model)  # not of the page

ids = tokenizer("Hello", return_tensors="pt")
with torch.no_grad():
    torch.save([m(ids.input_ids).logits for m in loaded], "logits")
"""


def test_the_page_of_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = OPTConfig(vocab_size=320, max_position_embeddings=128, **sizes)
    OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("</s>"), bos_token="</s>", eos_token="</s>").save_pretrained(tmp_path / "opt")
    with hub({"facebook/opt-125m": files_of(tmp_path / "opt")}) as server:
        run(TRANSFORMERS_PAGE, server.url, tmp_path)
        files = server.repositories[f"{USER}/opt-125m-gptq"]
    assert {"config.json", "quantize_config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(name.endswith(".qweight") for name in load_bytes(files["model.safetensors"])) == 6
    assert files_of(tmp_path / "opt-125m-gptq").items() <= files.items()
    first, *others = torch.load(tmp_path / "logits")
    assert first.isfinite().all()
    assert len(others) == 4
    assert all(torch.equal(first, other) for other in others)


QWENS_PAGE = """
import gptq_fn.interop

from transformers import AutoModelForCausalLM, AutoTokenizer


device = "cpu"
model = AutoModelForCausalLM.from_pretrained(
    "Qwen/Qwen2-7B-Instruct-GPTQ-Int8",
    device_map="auto"
)
tokenizer = AutoTokenizer.from_pretrained("Qwen/Qwen2-7B-Instruct-GPTQ-Int8")
prompt = "Give me a short introduction to large language model."
messages = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": prompt}
]
text = tokenizer.apply_chat_template(
    messages,
    tokenize=False,
    add_generation_prompt=True
)
model_inputs = tokenizer([text], return_tensors="pt").to(device)

generated_ids = model.generate(
    model_inputs.input_ids,
    max_new_tokens=512
)
generated_ids = [
    output_ids[len(input_ids):]
    for input_ids, output_ids in zip(model_inputs.input_ids, generated_ids)
]

response = tokenizer.batch_decode(
        generated_ids, skip_special_tokens=True
        )[0]

import json
json.dump([text, model_inputs.input_ids.tolist(), generated_ids[0].tolist(), response], open("found", "w"))
"""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_the_page_of_qwen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    dense = Qwen2ForCausalLM(Qwen2Config(vocab_size=320, **sizes, bos_token_id=0, eos_token_id=2, pad_token_id=0)).eval()
    tensors, scheme = dict(dense.state_dict()), Scheme(8, 32)
    for name, module in dense.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, nn.Linear):
            linear = random_linear(np.random.default_rng(len(name)), module.in_features, module.out_features, scheme)
            module.weight.data = torch.from_numpy(linear.weight).float()
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{leaf}": t for leaf, t in linear.tensors.items()}
    described = {**json.loads(dense.config.to_json_string()), "architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}
    write(tmp_path / "qwen", {**described, "quantization_config": quantization_config(scheme)}, tensors)
    dense.generation_config.save_pretrained(tmp_path / "qwen")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(*special), eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(tmp_path / "qwen")
    with hub({"Qwen/Qwen2-7B-Instruct-GPTQ-Int8": files_of(tmp_path / "qwen")}) as server:
        run(QWENS_PAGE, server.url, tmp_path)
    text, ids, generated, response = json.loads((tmp_path / "found").read_text())
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nGive me")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert ids[0].count(1) == 3  # <|im_start|> is one token
    assert response == tokenizer.decode(generated, skip_special_tokens=True)
    expected = dense.generate(torch.tensor(ids), max_new_tokens=32)[0, len(ids[0]) :].tolist()
    assert generated[: len(expected)] == expected
    assert len(generated) == 512 or generated[-1] == 2
