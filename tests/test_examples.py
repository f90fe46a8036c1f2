"""The examples run as they are."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny import save_tiny_llama

ROOT = Path(__file__).parent.parent


def run(*args: object) -> str:
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_own_model() -> None:
    said = run("examples/own_model.py")
    assert "layers.2.mlp.down" in said
    assert "continued:" in said


def test_demo_on_a_small_model(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny-llama")
    said = run("examples/demo.py", "--model", model, "--build", tmp_path / "build", "--group-size", "32", "--samples", "4")
    assert "perplexity on held-out text" in said
    assert (tmp_path / "build" / "tiny-llama-gptq-4bit" / "model.safetensors").exists()


@pytest.mark.slow
def test_sweep_draws_a_picture(tmp_path: Path) -> None:
    model = save_tiny_llama(tmp_path / "tiny-llama")
    said = run("examples/sweep.py", "--model", model, "--build", tmp_path, "--bits", "4", "--group-size", "128", "--samples", "2")
    assert "worst linears" in said
    assert (tmp_path / "tiny-llama-sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_solver_benchmark() -> None:
    assert "times" in run("benchmarks/solver.py", "--shapes", "32x128", "--runs", "1")
