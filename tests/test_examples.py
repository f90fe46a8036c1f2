"""The examples run as they are: one in a process of its own, the others in this one, where small models compile once for all of them."""

import importlib
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gptq_fn_interop.cli import main as gptq_fn
from gptq_fn_interop.inspection import inspect
from gptq_fn_interop.qlinear import QuantLinear
from tiny import save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
SMALL = ("--samples", "4", "--length", "64")
CHATML = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"

Run = Callable[..., str]


def in_its_own_process(*args: object) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Modules of the examples' folder can be imported, and are forgotten afterwards."""
    before = {*sys.modules}
    monkeypatch.syspath_prepend(EXAMPLES)
    yield
    for name in {*sys.modules} - before:
        if (EXAMPLES / f"{name}.py").exists():
            del sys.modules[name]


@pytest.fixture
def run(folder: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs an example as a script, and returns what it prints, on one line."""

    def script(name: str, *args: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return " ".join(capsys.readouterr().out.split())

    return script


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of sizes with which linears are solved in two shapes only, in groups of 128 that vLLM loads."""
    return save_tiny_llama(tmp_path_factory.mktemp("examples") / "tiny-llama", hidden_size=128, intermediate_size=128)


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("examples") / "tiny-llama-4bit"
    gptq_fn(["quantize", str(model), str(destination), *SMALL])
    return destination


def test_a_result_goes_where_nothing_is_nor_a_run_that_was_cut_off(folder: None, tmp_path: Path) -> None:
    fresh = importlib.import_module("models").fresh
    assert fresh(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "a").mkdir()
    (tmp_path / ".a-2.unfinished").mkdir()
    assert fresh(tmp_path / "a") == tmp_path / "a-3"


def linears(directory: Path) -> list[QuantLinear]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory)
    return [module for module in loaded.modules() if isinstance(module, QuantLinear)]


def test_own_model_in_a_process_of_its_own() -> None:
    said = in_its_own_process("examples/own_model.py")
    assert "layers.2.mlp.down" in said
    assert "continued:" in said


def test_laws_hold_for_the_right_quantizer_and_find_the_wrong_ones() -> None:
    said = in_its_own_process("-m", "pytest", "examples/test_own_quantizer.py", "-rx", "-v", "-p", "no:cacheprovider")
    assert "5 passed, 3 xfailed" in said


def test_quantize_and_generate(run: Run, model: Path, tmp_path: Path) -> None:
    said = run("quantize_and_generate.py", "--model", model, "--destination", tmp_path / "q", *SMALL)
    assert "14 linears at" in said
    assert said.count("Quantization is") == 2
    assert len(linears(tmp_path / "q")) == 14


def test_from_autogptq(run: Run, model: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "[0-9]+ of [0-9]+ linears saw fewer than")  # a sentence alone would not do
        said = run("from_autogptq.py", model, tmp_path / "q")
    assert said.count("auto") >= 2
    assert {layer.bits for layer in linears(tmp_path / "q")} == {4}


def test_from_autogptq_is_the_program_of_the_readme() -> None:
    """Each statement of AutoGPTQ's README stands there as it is, but for the import, the paths and the device."""
    said = "".join((EXAMPLES / "from_autogptq.py").read_text().split())
    for statement in README_OF_AUTOGPTQ.strip().splitlines():
        assert "".join(statement.split()) in said


README_OF_AUTOGPTQ = """
tokenizer = AutoTokenizer.from_pretrained(pretrained_model_dir, use_fast=True)
"auto-gptq is an easy-to-use model quantization library with user-friendly apis, based on GPTQ algorithm."
quantize_config = BaseQuantizeConfig(
bits=4,
group_size=128,
desc_act=False,
model = AutoGPTQForCausalLM.from_pretrained(pretrained_model_dir, quantize_config)
model.quantize(examples)
model.save_quantized(quantized_model_dir)
model.save_quantized(quantized_model_dir, use_safetensors=True)
print(tokenizer.decode(model.generate(**tokenizer("auto_gptq is", return_tensors="pt").to(model.device))[0]))
pipeline = TextGenerationPipeline(model=model, tokenizer=tokenizer)
print(pipeline("auto-gptq is")[0]["generated_text"])
"""


def test_disk_to_disk(run: Run, model: Path, tmp_path: Path) -> None:
    said = run("disk_to_disk.py", "--model", model, "--destination", tmp_path / "q", *SMALL)
    assert "12 linears: 4 bits" in said
    assert "2 linears: 8 bits" in said
    assert {x.name for x in inspect(tmp_path / "q").linears if x.bits == 8} == {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)}
    assert [path.name for path in tmp_path.iterdir()] == ["q"]  # no activations are left behind


def test_instructions(run: Run, model: Path, tmp_path: Path) -> None:
    said = run("instructions.py", "--model", model, "--destination", tmp_path / "q", "--samples", 4, "--length", 64)
    assert "4 conversations of" in said
    assert len(linears(tmp_path / "q")) == 14


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|system|>You are a helpful assistant.<|end|><|user|>Add.\n1, 2<|end|><|assistant|>3<|end|>"),
        (None, "### Instruction:\nAdd.\n1, 2\n\n### Response:\n3"),
    ],
)
def test_instructions_are_written_as_the_model_reads_them(folder: None, model: Path, template: str | None, expected: str) -> None:
    example = runpy.run_path(str(EXAMPLES / "instructions.py"))
    tokenizer = AutoTokenizer.from_pretrained(model, chat_template=template)
    messages = example["conversation"]({"instruction": "Add.", "input": "1, 2", "output": "3"})
    assert example["text_of"](messages, tokenizer) == expected
    assert example["conversation"](messages) is messages


def test_the_instructions_that_come_with_the_example_are_of_alpacas_form() -> None:
    records = json.loads((EXAMPLES / "data" / "instructions.json").read_text("utf-8"))
    assert len(records) >= 24
    assert all(record.keys() == {"instruction", "input", "output"} and record["instruction"] and record["output"] for record in records)


def test_research(run: Run, model: Path) -> None:
    said = run("research.py", "--model", model, "--bits", 3, *SMALL)
    found = [float(re.findall(rf"{way} │ ([0-9.]+),", said)[0]) for way in ("nearest", "GPTQ", "normal grid", "sparing")]
    assert found[1] < found[0]
    assert found[2] < found[0]
    assert all(0 < error < 1 for error in found)
    whole = [float(error) for error in re.findall(r"on a normal grid[^:]*: error ([^,]+),", said)]
    assert len(whole) == 2
    assert all(0 < error < 1 for error in whole)


@pytest.mark.parametrize("form", ["strided", "chunks"])
def test_perplexity(run: Run, model: Path, quantized: Path, form: str) -> None:
    said = run("perplexity.py", "--model", model, "--quantized", quantized, "--form", form, *SMALL)
    before, after = map(float, re.findall(r"perplexity │ ([0-9.]+) │ ([0-9.]+) ±", said)[0])
    assert f"on {255 if form == 'strided' else 4 * 31} tokens" in said
    assert before != after
    assert 0.5 < after / before < 2
    assert "KL from the float model" in said


def test_finetune(run: Run, quantized: Path, tmp_path: Path) -> None:
    said = run("finetune.py", quantized, "--steps", 2, "--length", 32, "--build", tmp_path)
    assert "trained parameters" in said
    assert (tmp_path / f"{quantized.name}-lora" / "adapter_model.safetensors").exists()


def test_serving_where_vllm_is_not_installed(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = run("serve.py", "--model", model, "--quantized", tmp_path / "q", *SMALL)
    assert "vllm loads" in said
    assert f"vllm serve {tmp_path / 'q'} --port 8000" in said
    assert {x.group_size for x in inspect(tmp_path / "q").linears} == {-1}  # one group a row of 128


STAND_IN = """#!{python}
import http.server, json, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = f"{{self.path}} {{asked['model']}} {{asked['messages'][-1]['role']}} {{asked['messages'][-1]['content']}}"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({{"choices": [{{"message": {{"role": "assistant", "content": said}}}}]}}).encode())

assert sys.argv[1] == "serve" and sys.argv[3] == "--port", sys.argv
http.server.HTTPServer(("localhost", int(sys.argv[4])), Answer).serve_forever()
"""
"""What answers as `vllm serve` does, as far as the example asks it."""


def test_serving_asks_the_server_that_it_starts(run: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "vllm"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    said = run("serve.py", "--quantized", quantized, "--question", "Who are you?", "--port", port)
    assert said.endswith(f"Who are you? /v1/chat/completions {quantized} user Who are you?")
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("localhost", port))  # the server has ended


def test_serving_tells_when_the_server_does_not_start(run: Run, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = tmp_path / "vllm"
    stand_in.write_text("#!/bin/sh\nexit 3\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(RuntimeError, match=r"did not start .exit status 3."):
        run("serve.py", "--quantized", quantized, "--port", 1)


def test_demo_on_a_small_model(run: Run, model: Path, tmp_path: Path) -> None:
    said = run("demo.py", "--model", model, "--build", tmp_path / "build", "--samples", "4")
    assert "perplexity on held-out text" in said
    assert (tmp_path / "build" / "tiny-llama-gptq-4bit" / "model.safetensors").exists()


@pytest.mark.slow
def test_sweep_draws_a_picture(run: Run, model: Path, tmp_path: Path) -> None:
    said = run("sweep.py", "--model", model, "--build", tmp_path, "--bits", "4", "--group-size", "128", "--samples", "2")
    assert "worst linears" in said
    assert (tmp_path / "tiny-llama-sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_every_example_stands_in_the_readme_of_examples() -> None:
    programs = {path.name for path in EXAMPLES.glob("*.py")} - {"models.py", "smollm2.py"}
    rows = re.findall(r"^\| `(\w+[.]py)` \|", (EXAMPLES / "README.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(programs)


def test_solver_benchmark() -> None:
    assert "times" in in_its_own_process("benchmarks/solver.py", "--shapes", "32x128", "--runs", "1")
