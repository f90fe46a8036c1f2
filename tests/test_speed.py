"""The programs that measure speed, run small on a CPU: what they measure is right, whatever the figures are."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def program(path: str) -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_every_way_to_generate_gives_the_same_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--max-new-tokens", "8", "--prompt", "16", "--group-size", "32", "--num-beams", "1", "--dtype", "float32"]
    run = program("examples/generation_speed.py")
    model = ["--shape", "tiny", "--weights", "int", "--backend", "reference", "--device", "cpu"]
    run([*model, "--json", str(tmp_path / "f.json"), *sizes])
    found = json.loads((tmp_path / "f.json").read_text())
    assert [row["path"] for row in found] == ["captured", "generate", "jax"]
    captured, plain, ours = (row["tokens"] for row in found)
    assert len(set(captured[0][-8:])) > 2  # a text that repeats itself would hide a cache that is not read
    assert captured == plain == ours
    assert all(row["tokens_per_second"] == pytest.approx(8 / row["seconds"][0]) for row in found)
    assert "4 bits" in capsys.readouterr().out


def test_matmuls_are_checked_while_they_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--shapes", "192x64", "--rows", "1", "5", "--bits", "3", "4", "--groups", "64", "0", "--dtypes", "bfloat16"]
    small = ["--device", "cpu", "--budget", "0.001", "--only", "cuBLAS", "reference", "gemlite"]
    program("benchmarks/matmul.py")([*small, "--json", str(tmp_path / "f.json"), *shape])
    results = json.loads((tmp_path / "f.json").read_text())["results"]
    assert [(r["bits"], r["group"]) for r in results] == [(3, 64), (3, 192), (4, 64), (4, 192)]
    for result in results:
        rows = result["rows"]
        assert "needs a GPU" in rows["gemlite"]["reason"]
        assert set(rows["floor"]["times"]) == {"1", "5"}
        measured = {name: row for name, row in rows.items() if "error" in row}
        assert list(measured) == ["dense (cuBLAS)", "gptq_fn reference"]
        for row in measured.values():
            assert not row["failed"]
            assert all(1e-4 < error < 1e-2 for error in row["error"].values())  # of bfloat16
            assert all(t["min"] <= t["median"] <= t["max"] for t in row["times"].values())
    assert "microseconds" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("weights", ["dense", "int"])
def test_a_captured_step_gives_the_tokens_of_generate(tmp_path: Path, weights: str) -> None:
    sizes = ["--max-new-tokens", "32", "--prompt", "16", "--group-size", "32", "--num-beams", "1", "--dtype", "float32"]
    model = ["--shape", "tiny", "--weights", weights, "--device", "cuda", "--paths", "captured", "generate"]
    program("examples/generation_speed.py")([*model, "--profile", "--json", str(tmp_path / "f.json"), *sizes])
    captured, plain = (row["tokens"] for row in json.loads((tmp_path / "f.json").read_text()))
    assert len(set(captured[0][-32:])) > 4
    assert captured == plain


@pytest.mark.gpu
def test_matmuls_are_checked_while_a_gpu_is_timed(tmp_path: Path) -> None:
    shape = ["--shapes", "4096x2048", "--rows", "1", "17", "--bits", "3", "4", "--groups", "64", "0", "--dtypes", "float16", "bfloat16"]
    program("benchmarks/matmul.py")(["--device", "cuda", "--budget", "0.01", "--json", str(tmp_path / "f.json"), *shape])
    for result in json.loads((tmp_path / "f.json").read_text())["results"]:
        measured = {name: row for name, row in result["rows"].items() if "error" in row}
        assert {"dense (cuBLAS)", "gptq_fn triton", "gptq_fn reference"} <= measured.keys()
        for row in measured.values():
            assert not row["failed"]
            assert row["copies"] > 1
            assert all(error < 1e-2 for error in row["error"].values())
