"""The command as a user types it: results, sentences and exit statuses."""

import json
import re
import resource
import shutil
import signal
import time
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest
import torch
import transformers
from gptq_fn_interop.cli import main
from gptq_fn_interop.cli_quantize import parse_rule
from gptq_fn_interop.console import insisting
from gptq_fn_kernels import Problem, choose, explain
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import save_tiny_llama

from gptq_fn import QuantConfig

SMALL = ("--samples", "4", "--length", "32")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def quantized(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("cli") / "quantized"
    rules = ("--rule", ".*down_proj => bits=8,group_size=none", ".*layers[.]0[.].*q_proj => skip")
    main(["quantize", str(source), str(destination), "--group-size", "32", *rules, *SMALL])
    return destination


def failure(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(args)
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return " ".join(said.split())


def test_quantize_writes_what_was_asked_for(quantized: Path) -> None:
    described = json.loads((quantized / "config.json").read_text())["quantization_config"]
    assert (described["bits"], described["group_size"], described["sym"], described["desc_act"]) == (4, 32, True, False)
    assert list(described["dynamic"]) == ["+:.*down_proj", "-:.*layers[.]0[.].*q_proj"]
    with safe_open(quantized / "model.safetensors", "numpy") as file:
        names = set(file.keys())
        assert file.metadata() == {"format": "pt"}
        assert file.get_slice("model.layers.0.mlp.down_proj.qweight").get_shape() == [96 * 8 // 32, 64]
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert "model.layers.1.self_attn.q_proj.qweight" in names
    assert (quantized / "tokenizer.json").exists()
    assert len(json.loads((quantized / "report.json").read_text())["linears"]) == 13


def test_no_calibration_text_is_in_the_checkpoint(quantized: Path) -> None:
    for path in quantized.glob("*.json"):
        if not path.name.startswith("tokenizer"):
            assert "statement" not in path.read_text("utf-8")  # a word of every page of the documentation


def test_eval_measures_against_the_float_model(quantized: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["eval", str(quantized), "--reference", str(source), *SMALL])
    said = capsys.readouterr().out
    assert "perplexity" in said
    assert "KL from the reference" in said


def test_inspect_names_the_engines_and_their_reasons(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["inspect", str(quantized)])
    said = " ".join(capsys.readouterr().out.split())
    assert "11 linears: 4 bits, groups of 32, symmetric, float16 scales" in said
    assert "zero points: v1" in said
    assert "llama.cpp" in said


def test_names_are_told_as_they_are_whatever_the_terminal_takes(
    quantized: Path, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(quantized, tmp_path / "model[v2]")
    main(["inspect", str(tmp_path / "model[v2]"), "--for", "transformers"])
    assert "model[v2],asfaras" in "".join(capsys.readouterr().out.split())  # long paths are broken anywhere
    with TextIOWrapper(BytesIO(), "ascii") as narrow, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", narrow)
        main(["eval", str(source), "--samples", "2", "--length", "16"])  # its result holds a plus-minus sign
        narrow.flush()
        assert b"perplexity" in narrow.buffer.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_what_the_system_refuses_is_told_with_the_file(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    try:
        said = failure(capsys, "quantize", str(source), str(tmp_path / "q"), "--group-size", "32", *SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(r"(Quantizing.*)?gptq-fn:.*/\.q\.unfinished/.*\.safetensors:Filetoolarge\.", "".join(said.split()))
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_have_no_perplexity(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(source, tmp_path / "model")
    file = next((tmp_path / "model").glob("*.safetensors"))
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "down_proj" in name)[0] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    said = failure(capsys, "eval", str(tmp_path / "model"), "--samples", "2", "--length", "16", "--json", str(tmp_path / "figures.json"))
    assert "the log likelihood of the text is nan. Its weights are not finite" in said
    assert not (tmp_path / "figures.json").exists()


def test_an_interrupt_that_a_finalizer_swallows_comes_again() -> None:
    class Swallowing:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    def run() -> None:
        Swallowing()
        time.sleep(10)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, shells ignore it
    try:
        with pytest.raises(KeyboardInterrupt), insisting():
            run()
    finally:
        signal.signal(signal.SIGINT, before)


def test_kernels_tells_every_backend_its_reason_and_which_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    main(["kernels", "--bits", "3", "--no-sym", "--group-size", "None", "--k", "96", "--n", "64", "--dtype", "bfloat16", "--device", "cpu"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    problem = Problem(3, 96, 64, 96, False, torch.bfloat16, "cpu")
    for name, reason in explain(problem).items():
        assert f"{name} yes" in said if reason is None else f"{name} no {reason}" in said
    assert f"3 bits, one group a row, asymmetric, 96 x 64: {choose(problem).name} is taken." in said


def test_kernels_times_those_that_serve(capsys: pytest.CaptureFixture[str]) -> None:
    main(["kernels", "--act-order", "--group-size", "32", "--k", "64", "--n", "32", "--device", "cpu", "--time", "--rows", "1", "3"])
    said = capsys.readouterr().out
    assert "4 bits, act-order, symmetric, 64 x 32" in said
    figures = {cells[0].strip(): cells[1:] for line in said.splitlines() if "(" in line and (cells := line.split("│")[1:-1])}
    serving = [name for name, reason in explain(Problem(4, 64, 32, None, True, torch.float32, "cpu")).items() if reason is None]
    assert list(figures) == [*serving, "dense"]
    for cells in figures.values():
        assert [float(number) > 0 for cell in cells for number in cell.replace("(", "").replace(")", "").split()] == [True] * 4
    assert all("(1.00)" in cell for cell in figures["dense"])
    assert "how many times as fast" in said


def test_kernels_tells_of_each_kind_in_a_checkpoint(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["kernels", str(quantized), "--backend", "reference", "--device", "cpu"])
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert sorted(lines) == [
        ["2", "8 bits, one group a row, symmetric, 96 x 64", "reference"],
        ["3", "4 bits, groups of 32, symmetric, 64 x 64", "reference"],
        ["4", "4 bits, groups of 32, symmetric, 64 x 32", "reference"],
        ["4", "4 bits, groups of 32, symmetric, 64 x 96", "reference"],
    ]


def test_kernels_fails_in_sentences(source: Path, quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Backend 'triton' does not serve" in (said := failure(capsys, "kernels", "--device", "cpu", "--backend", "triton"))
    assert "reference: serves it" in said
    assert "There is no backend 'marlin'" in failure(capsys, "kernels", str(quantized), "--backend", "marlin")
    assert "leave out the options" in failure(capsys, "kernels", str(quantized), "--bits", "3")
    assert "positive numbers" in failure(capsys, "kernels", "--k", "0")
    assert "from 1 on, not 4 0" in failure(capsys, "kernels", "--rows", "4", "0")
    assert "float checkpoint" in failure(capsys, "kernels", str(source))
    if not torch.cuda.is_available():
        assert "no GPU here to measure on" in failure(capsys, "kernels", "--device", "cuda", "--time")


def test_help_names_what_a_command_takes_and_is_not_cut_into_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    said = {}
    for command, taken in {"quantize": "SOURCE DESTINATION", "eval": "MODEL", "report": "DIRECTORY", "sweep": "SOURCE"}.items():
        with pytest.raises(SystemExit):
            main([command, "--help"])
        said[command] = capsys.readouterr().out
        assert said[command].splitlines()[0].endswith(taken)
    assert "on the destination's disk they leave that of the device free." in said["quantize"]  # of the function
    assert "None means inputs / rows, from 0.01 to 1" in said["quantize"]  # of QuantConfig
    assert "128 or, with --for, the first of 128, 64 and 32 that" in said["quantize"]  # of what replaces it
    assert any(line.strip("│ ").startswith('"strided": windows') for line in said["eval"].splitlines())


def test_failures_are_sentences(source: Path, quantized: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = str(tmp_path / "new")
    assert "no config.json" in failure(capsys, "quantize", str(tmp_path), new)
    assert "is quantized already" in failure(capsys, "quantize", str(quantized), new, *SMALL)
    assert "exists already" in failure(capsys, "quantize", str(source), str(quantized), *SMALL)
    (tmp_path / "file").write_text("")
    assert "is a file; give the directory" in failure(capsys, "quantize", str(source / "config.json"), new, *SMALL)
    assert "cannot be made, since" in failure(capsys, "quantize", str(source), str(tmp_path / "file" / "new"), *SMALL)
    (tmp_path / "file").unlink()
    assert "A rule reads" in failure(capsys, "quantize", str(source), new, "--rule", "down", *SMALL)
    assert "must be positive" in failure(capsys, "quantize", str(source), new, "--rule", "x => group_size=0", *SMALL)
    for pattern in ("model.layer.0", "down_proj", "model.layers.0.mlp.down_proj.weight"):
        for command in (("quantize", str(source), new, *SMALL), ("sweep", str(source), "--hessians", str(tmp_path))):
            said = failure(capsys, *command, "--rule", f"{pattern} => skip")
            assert f"The rule for '{pattern}' matches no linear" in said
        assert "as model.layers.0.self_attn.q_proj and lm_head" in said
    assert "no file 'no/such/data'" in failure(capsys, "quantize", str(source), new, "--data", "no/such/data", *SMALL)
    assert "float checkpoint" in failure(capsys, "inspect", str(source))
    inside = str(Path(new) / "kept")  # after all the work, the destination would not be vacant
    assert "has to stay empty" in failure(capsys, "quantize", str(source), new, "--keep-hessians", inside, *SMALL)
    for option, place, sentence in (
        ("--measured", inside, "has to stay empty"),
        ("--plot", f"{inside}.png", "has to stay empty"),
        ("--measured", str(tmp_path), "name a file in a directory that is there"),
        ("--plot", str(tmp_path / "no" / "plot.png"), "name a file in a directory that is there"),
        ("--plot", str(tmp_path / "plot.doc"), "ends in .png, .pdf or .svg"),
    ):
        assert sentence in failure(capsys, "quantize", str(source), new, "--budget", "4", option, place, *SMALL)
    assert "name a file in a directory" in failure(
        capsys, "sweep", str(source), "--hessians", str(tmp_path), "--out", str(tmp_path / "no" / "table.csv")
    )
    assert not Path(new).exists()
    assert not list(tmp_path.iterdir())


def test_a_model_of_no_row_is_traced(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in source.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copy(path, tmp_path)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.Lfm2Config(vocab_size=320, layer_types=["conv", "full_attention"], bos_token_id=0, eos_token_id=0, **sizes)
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    main(["quantize", str(tmp_path), str(tmp_path / "q"), "--group-size", "32", *SMALL])
    said = capsys.readouterr().out
    assert "No row of the table describes lfm2 models" in said
    assert "linears at" in said
    main(["eval", str(tmp_path / "q"), "--reference", str(tmp_path), *SMALL])
    assert "top-1 agreement" in capsys.readouterr().out
    described = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**described, "num_hidden_layers": 3, "layer_types": ["conv", "conv", "full_attention"]})
    )
    for said in (failure(capsys, "quantize", str(tmp_path), str(tmp_path / "r"), *SMALL), failure(capsys, "eval", str(tmp_path), *SMALL)):
        assert "tensors of the Lfm2ForCausalLM that its config.json describes, for example model.layers.1.conv" in said
    (tmp_path / "config.json").write_text(json.dumps({**described, "intermediate_size": 128, "block_auto_adjust_ff_dim": False}))
    assert "is not what its config.json describes" in failure(capsys, "quantize", str(tmp_path), str(tmp_path / "r"), *SMALL)
    (tmp_path / "config.json").write_text(json.dumps({**described, "model_type": "bespoke", "auto_map": {"AutoModelForCausalLM": "x.Y"}}))
    assert "Code that comes with a checkpoint is never run" in failure(capsys, "quantize", str(tmp_path), str(tmp_path / "r"), *SMALL)


def test_rules_change_the_base() -> None:
    base = QuantConfig(bits=3, group_size=64)
    rule = parse_rule("mlp.* => bits=8, sym=false, group-size=none", base)
    assert rule.pattern == "mlp.*"
    assert rule.config == QuantConfig(bits=8, group_size=None, sym=False)
    assert parse_rule("x=>skip", base).config is None
    assert parse_rule("x => refine=descent+refit", base).config == QuantConfig(bits=3, group_size=64, refine=("descent", "refit"))
    with pytest.raises(ValueError, match="sets 'speed'"):
        parse_rule("x => speed=9", base)
