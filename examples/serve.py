"""Serve a quantized model with vLLM: quantize it so that vLLM loads it, check that, start the server, ask it something.

    python examples/serve.py
    python examples/serve.py --model Qwen/Qwen2-7B-Instruct --bits 8 --question "Tell me something about large language models."

Quantizing and checking run anywhere. Where vLLM is installed (`pip install vllm`, on a GPU) the server is started, asked as any
server with OpenAI's interface is, and stopped; elsewhere the commands are told.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal
from urllib.error import URLError
from urllib.request import Request, urlopen

import tyro
from gptq_fn_interop.cli import main as gptq_fn
from models import BUILD, float_model, fresh


def main(
    model: str | None = None,
    quantized: Path | None = None,
    bits: Literal[4, 8] = 4,
    samples: int = 32,
    length: int = 512,
    question: str = "What is the capital of France?",
    port: int = 8000,
) -> None:
    """Quantize a model for vLLM, serve it there and ask it.

    Args:
        model: A directory or a model on the hub; SmolLM2-135M-Instruct by default.
        quantized: The directory of a model that is quantized already, or where to put it; a new one by default.
        bits: Bits of a code; vLLM reads 4 and 8.
        samples: How many calibration samples.
        length: Tokens of a calibration sample.
        question: What the model is asked.
        port: The server's.
    """
    if quantized is None or not quantized.exists():
        source = float_model(model)
        quantized = quantized or fresh(BUILD / f"{source.name}-vllm-{bits}bit")
        sizes = ["--bits", str(bits), "--samples", str(samples), "--length", str(length)]
        gptq_fn(["quantize", str(source), str(quantized), "--for", "vllm", *sizes])
    gptq_fn(["inspect", str(quantized), "--for", "vllm"])  # exits with every reason where vLLM would not load it

    if shutil.which("vllm") is None:
        body = json.dumps(body_of(str(quantized), question))
        print(f"vLLM is not installed here. Where it is:\n  vllm serve {quantized} --port {port}")
        print(f"  curl http://localhost:{port}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'")
        return
    with served(quantized, port) as url:
        print(f"{question} {ask(url, str(quantized), question)}")


@contextmanager
def served(directory: Path, port: int, patience: float = 600.0) -> Iterator[str]:
    """The address of a vLLM server, which ends with the context. Raises RuntimeError where it does not start in so many seconds."""
    url = f"http://localhost:{port}"
    server = subprocess.Popen(["vllm", "serve", str(directory), "--port", str(port)])
    try:
        until = time.monotonic() + patience
        while not answers(f"{url}/health"):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"vLLM did not start (exit status {server.poll()}); what it says is above.")
            time.sleep(0.2)
        yield url
    finally:
        server.terminate()
        server.wait()


def answers(url: str) -> bool:
    try:
        return urlopen(url, timeout=5).status == 200
    except (URLError, OSError):
        return False


def body_of(model: str, question: str) -> dict[str, object]:
    return {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 64, "temperature": 0}


def ask(url: str, model: str, question: str) -> str:
    """What the model says. Raises HTTPError where the server refuses the request."""
    request = Request(f"{url}/v1/chat/completions", json.dumps(body_of(model, question)).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=600) as response:
        return json.load(response)["choices"][0]["message"]["content"]


if __name__ == "__main__":
    tyro.cli(main)
