"""AutoGPTQ's tasks: its README's program runs, and results are those of plain loops, a sample at a time."""

import json
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from gptq_fn_interop.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from gptq_fn_interop.auto_gptq.eval_tasks import LanguageModelingTask, SequenceClassificationTask, TextSummarizationTask
from gptq_fn_interop.eval_tasks.classification import vote
from gptq_fn_interop.eval_tasks.data import Sample, blocks
from rouge_score.rouge_scorer import RougeScorer
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

TEMPLATE = "Question:What's the sentiment of the given text? Choices are {labels}.\nText: {text}\nAnswer:"
LABELS = ["negative", "neutral", "positive"]
WORDS = ("for", "statement", "the", "assert", "an expression", "loops")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Any:
    return AutoTokenizer.from_pretrained(directory)


@pytest.fixture(scope="module")
def model(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(WORDS, k=draw.randint(1, 12))), "label": draw.randrange(3)} for _ in range(12)]
    rows = [{**row, "summary": row["text"].split()[0] + " an expression"} for row in rows]
    path = tmp_path_factory.mktemp("tasks") / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def ds_refactor_fn(samples: dict[str, list[Any]]) -> dict[str, list[str]]:
    prompts = [TEMPLATE.format(labels=LABELS, text=text) for text in samples["text"]]
    return {"prompt": prompts, "label": [LABELS[label] for label in samples["label"]]}


def quantized(directory: Path, tokenizer: Any) -> Any:
    model = AutoGPTQForCausalLM.from_pretrained(directory, BaseQuantizeConfig(group_size=32, desc_act=False), torch_dtype="float32")
    model.quantize([tokenizer(TEMPLATE.format(labels=LABELS, text=" ".join(WORDS)))])
    return model


@torch.no_grad()
def test_perplexity_is_that_of_a_loop_whatever_the_blocks(directory: Path, tokenizer: Any, file: Path) -> None:
    for model in (AutoModelForCausalLM.from_pretrained(directory, dtype="float32"), quantized(directory, tokenizer)):
        total, count = 0.0, 0
        for line in file.read_text().splitlines():
            row = json.loads(line)
            before, after = (tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("text", "summary"))
            logits = model(input_ids=torch.tensor([before + after])).logits[0].double()
            for i, token in enumerate(after):
                total -= float(logits[len(before) + i - 1].log_softmax(-1)[token])
                count += 1
        for most in (1, 60, 2048):
            task = LanguageModelingTask(model, tokenizer, str(file), "text", "summary", block_max_len=most)
            assert task.run() == {"ppl": pytest.approx(math.exp(total / count), rel=1e-5)}


def distance(a: str, b: str) -> int:
    """Levenshtein's, by its definition."""
    if not a or not b:
        return len(a) + len(b)
    return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))


def test_votes_go_to_the_nearest_class() -> None:
    texts = ["pos", "nega", "Nega ", "positve", "", "itive"]
    for text in texts:
        assert vote([text], ["neg", "posit"]) == min(["neg", "posit"], key=lambda name: distance(text.lower().strip(), name))
    assert vote(["yess", "no", "yes"], ["no", "yes"]) == "yes"
    assert vote(["yes", "no"], ["no", "yes"]) == "yes"  # the earlier sequence is the likelier
    assert vote(["x"], ["a", "b"]) == "a"


@torch.no_grad()
def test_the_readme_of_autogptq_classifies(model: Any, tokenizer: Any, file: Path) -> None:
    def load(name: str) -> datasets.Dataset:
        return partial(datasets.load_dataset, split="train")("json", data_files=name)

    task = SequenceClassificationTask(
        model=model,
        tokenizer=tokenizer,
        classes=LABELS,
        data_name_or_path=str(file),
        prompt_col_name="prompt",
        label_col_name="label",
        **{
            "num_samples": 1000,
            "sample_max_len": 1024,
            "block_max_len": 600,
            "load_fn": load,
            "preprocess_fn": ds_refactor_fn,
            "truncate_prompt": False,
        },
    )
    new = max(len(tokenizer(prefix + label)["input_ids"]) for label in LABELS for prefix in ("", " "))
    beams = GenerationConfig(num_beams=3, num_return_sequences=3)
    right = {"greedy": 0, "beams": 0}
    rows = ds_refactor_fn(datasets.load_dataset("json", data_files=str(file), split="train").to_dict())
    for prompt, label in zip(rows["prompt"], rows["label"], strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        for name, config in (("greedy", {"do_sample": False}), ("beams", {"generation_config": beams})):
            out = model.generate(**ids, max_new_tokens=new, pad_token_id=0, **config)[:, ids["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(out, skip_special_tokens=True)
            found = Counter(vote([text], [x.lower() for x in LABELS]) for text in texts).most_common(1)[0][0]
            right[name] += found == label
    assert task.run() == {"acc": right["greedy"] / 12}
    assert task.run(generation_config=beams) == {"acc": right["beams"] / 12}
    assert beams.max_new_tokens is None  # what a caller gave stays as it was
    torch.manual_seed(0)
    voted = task.run(generation_config=GenerationConfig(num_beams=3, num_return_sequences=3, do_sample=True))
    assert 0 <= voted["acc"] <= 1


@torch.no_grad()
def test_summaries_are_scored_one_by_one(directory: Path, tokenizer: Any, file: Path) -> None:
    model = quantized(directory, tokenizer)
    task = TextSummarizationTask(model, tokenizer, str(file), "text", "summary", num_samples=6, block_max_len=60)
    found = task.run(generation_config=GenerationConfig(max_new_tokens=16, do_sample=False))
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    scores = []
    for i in random.Random(0).sample(range(12), 6):
        ids = tokenizer(rows[i]["text"], return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=16, do_sample=False, pad_token_id=0)[0, ids["input_ids"].shape[1] :]
        scores.append(RougeScorer(["rouge2", "rougeL"]).score(rows[i]["summary"], tokenizer.decode(out, skip_special_tokens=True)))
    for name, key in (("rouge-2", "rouge2"), ("rouge-l", "rougeL")):
        expected = [sum(getattr(x[key], part) for x in scores) / 6 for part in ("recall", "precision", "fmeasure")]
        assert list(found[name].values()) == pytest.approx(expected)
    assert set(found) == {"rouge-1", "rouge-2", "rouge-l"}


def test_blocks_hold_every_sample_once_and_no_more_tokens_than_allowed() -> None:
    draw = random.Random(0)
    samples = [Sample("", tuple(range(draw.randint(1, 30))), (1,)) for _ in range(50)]
    found = list(blocks(samples, lambda sample: len(sample.prompt), 64))
    assert sorted(map(len, (s.prompt for block in found for s in block))) == sorted(len(s.prompt) for s in samples)
    assert all(len(block) * max(len(s.prompt) for s in block) <= 64 for block in found)
    assert len(found) < 25


def test_long_samples_are_cut_where_the_options_say(model: Any, tokenizer: Any, file: Path) -> None:
    made = partial(LanguageModelingTask, model, tokenizer, str(file), "text", "summary")
    whole = made().samples
    for cut, kept in ((True, [s.prompt[max(0, len(s.prompt) + len(s.label) - 12) :] for s in whole]), (False, [s.prompt for s in whole])):
        found = made(sample_max_len=12, truncate_prompt=cut).samples
        if cut:
            assert [s.prompt for s in found] == kept
        else:
            assert all(s.prompt in kept and len(s.prompt) + len(s.label) <= 12 for s in found)
            assert len(found) < len(whole)  # those whose label is gone are not there
    assert all(s.label[-1] == tokenizer.eos_token_id for s in made(add_eos_token=True).samples)


def test_data_comes_from_directories_and_what_is_wrong_is_told(model: Any, tokenizer: Any, file: Path, tmp_path: Path) -> None:
    rows = datasets.load_dataset("json", data_files=str(file), split="train")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(3))}).save_to_disk(str(tmp_path / "saved"))
    made = partial(LanguageModelingTask, model, tokenizer)
    assert len(made(str(tmp_path / "saved"), "text", "summary").samples) == 3
    with pytest.raises(ValueError, match="no column 'prompt' among text, label, summary"):
        made(str(file), "prompt", "summary")
    (tmp_path / "x.yaml").write_text("")
    with pytest.raises(ValueError, match=r"ends in '\.yaml'"):
        made(str(tmp_path / "x.yaml"), "text", "summary")
    with pytest.raises(TypeError, match="no option sample_len; it has load_fn"):
        made(str(file), "text", "summary", sample_len=3)
    with pytest.raises(ValueError, match="not among the classes good, bad"):
        SequenceClassificationTask(model, tokenizer, ["good", "bad"], str(file), "text", "summary")
