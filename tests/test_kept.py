"""Hessians on disk: what is solved from them is what the run solved, and damage is told."""

import csv
import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import gptq_fn_interop.kept as kept
import gptq_fn_interop.sweep as sweeping
import numpy as np
import pytest
from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.cli import main
from gptq_fn_interop.gptq_format import to_tensors
from gptq_fn_interop.kept import KeptHessians, fold, keep_hessians, unfold
from gptq_fn_interop.stream import open_source, quantize_checkpoint
from gptq_fn_interop.sweep import plan_of, solve_kept, sweep
from hypothesis import given
from hypothesis import strategies as st
from tiny import save_tiny_llama

from gptq_fn import QuantConfig, Report, Rule

CALIB = np.random.default_rng(0).integers(2, 97, (8, 32)).astype(np.int32)
CONFIG = QuantConfig(4, 32, grid="minmax", rules=(Rule(".*(v|o|gate|up)_proj"), Rule("lm_head", QuantConfig(8, None, grid="minmax"))))


def run(source: Path, folder: Path, config: QuantConfig) -> Report:
    """The report of a run, whose Hessians are in the folder "kept" and whose result is in "run"."""
    return quantize_checkpoint(source, folder / "run", CALIB, config, hessians=folder / "kept")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("kept") / "model")


@pytest.fixture(scope="module")
def done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("kept")
    return folder, run(source, folder, CONFIG)


@pytest.fixture
def copied(done: tuple[Path, Report], tmp_path: Path) -> Path:
    return shutil.copytree(done[0] / "kept", tmp_path / "kept")


def assert_same(found: Report, expected: Report, tolerance: float = 1e-4) -> None:
    """Equal, floats up to rounding."""
    assert found.config == expected.config
    assert [x.name for x in found.linears] == [x.name for x in expected.linears]
    for a, b in zip(found.linears, expected.linears, strict=True):
        mine, other = asdict(a), asdict(b)
        for key in ("error", "rtn_error", "energy", "damp"):
            assert mine.pop(key) == pytest.approx(other.pop(key), rel=tolerance), (a.name, key)
        assert mine == other


@given(st.sampled_from([1, 2, 7, 8]), st.integers(0, 2**32 - 1))
def test_a_folded_hessian_unfolds_to_its_symmetric_part(n: int, seed: int) -> None:
    xx = np.random.default_rng(seed).standard_normal((n, n)).astype(np.float32)
    folded = fold(xx)
    assert folded.shape == ((n + 1) // 2, n + 1)
    np.testing.assert_array_equal(unfold(folded), (xx + xx.T) / 2)


def test_a_sweep_finds_what_the_run_found(source: Path, done: tuple[Path, Report]) -> None:
    (found,) = sweep(source, done[0] / "kept", [CONFIG])
    assert_same(found, done[1])
    assert found.error == pytest.approx(done[1].error, rel=1e-4)


def test_codes_are_those_of_the_run(source: Path, done: tuple[Path, Report]) -> None:
    checkpoint, spec = open_source(source, CONFIG)
    written = Checkpoint(done[0] / "run")
    names = set()
    for name, _, q, _ in solve_kept(spec, checkpoint, KeptHessians(done[0] / "kept"), [plan_of(spec, CONFIG)]):
        names.add(name)
        for leaf, array in to_tensors(q, "v1").items():
            np.testing.assert_array_equal(array, written[f"{name}.{leaf}"])
    assert names == {name.removesuffix(".qweight") for name in written if name.endswith(".qweight")}


def test_hessians_are_kept_by_the_linears_that_share_them(done: tuple[Path, Report]) -> None:
    hessians = KeptHessians(done[0] / "kept")
    attention = "model.layers.1.self_attn"
    assert len(hessians) == 5
    assert (f"{attention}.q_proj", f"{attention}.k_proj") in hessians
    h = hessians[hessians.of("model.layers.0.mlp.down_proj")]
    assert (h.xx.shape, h.xx.dtype, int(h.rows)) == ((96, 96), np.float32, CALIB.size)
    assert not list((done[0] / "kept").glob("*.unfinished"))


@pytest.mark.slow
def test_several_settings_share_what_they_can(source: Path, done: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch) -> None:
    eight = Rule(".*[.]0[.]mlp", QuantConfig(8, 32, grid="minmax", damp=0.5))
    rules = (Rule("(?!.*down_proj)"), eight)
    variants = [
        {"group_size": 16},
        {"group_size": 16, "bits": 2},
        {"order": "act", "group_size": 16},
        {"damp": 0.5},
    ]
    configs = [QuantConfig(**{"bits": 4, "group_size": 32, "grid": "minmax", **changes}, rules=rules) for changes in variants]
    alone = [sweep(source, done[0] / "kept", [config])[0] for config in configs[:2]]
    factored, read, told = [], [], []
    real, get = sweeping.factor, KeptHessians.__getitem__
    monkeypatch.setattr(sweeping, "factor", lambda h, config: factored.append(config) or real(h, config))
    monkeypatch.setattr(KeptHessians, "__getitem__", lambda self, names: read.append(names) or get(self, names))
    reports = sweep(source, done[0] / "kept", configs, progress=lambda *at: told.append(at))
    for found, expected in zip(reports, alone, strict=False):
        assert_same(found, expected, 0)
    assert len(read) == len(set(read)) == 2
    assert len(factored) == 1 + 3  # one for the rule; for the others groups of 16, importance alone, and the other damping
    assert told == [(1, 2), (2, 2)]
    assert reports[1].error > reports[0].error
    assert [x.damp for x in reports[3].linears] == [0.5, 0.5]


def test_hessians_of_another_model_are_refused(source: Path, done: tuple[Path, Report], tmp_path: Path) -> None:
    wider = save_tiny_llama(tmp_path / "wider", intermediate_size=128)
    with pytest.raises(ValueError, match=r"another model than .*wider: the configs differ in intermediate_size\.$"):
        sweep(wider, done[0] / "kept", [CONFIG])
    tuned = save_tiny_llama(tmp_path / "tuned")
    file = tuned / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-4 * 64] ^= 1  # the first value of the last tensor, a norm
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="the configs are equal, but the weights are not"):
        sweep(tuned, done[0] / "kept", [CONFIG])
    with pytest.raises(ValueError, match="another model"), keep_hessians(tuned, done[0] / "kept", resume=True):
        pass


def test_hessians_are_not_kept_where_the_model_shall_be(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Hessians in .*kept: .*q has to stay empty"):
        quantize_checkpoint(source, tmp_path / "q", CALIB, CONFIG, hessians=tmp_path / "q" / "kept")
    assert not list(tmp_path.iterdir())


def test_damage_is_told_in_sentences(source: Path, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no Hessians"):
        sweep(source, tmp_path, [CONFIG])
    everything = QuantConfig(4, 32)
    with pytest.raises(ValueError, match=r"no Hessian of model.layers.0.self_attn.v_proj: the run that kept them left it alone"):
        sweep(source, copied, [everything])
    down = copied / "model.layers.0.mlp.down_proj.safetensors"
    whole = down.read_bytes()
    down.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"down_proj.safetensors is not a readable safetensors file: .* It is damaged"):
        sweep(source, copied, [CONFIG])
    down.unlink()
    with pytest.raises(ValueError, match=r"no Hessian of model.layers.0.mlp.down_proj: .* or the file was lost"):
        sweep(source, copied, [CONFIG])
    shutil.copy(source / "model.safetensors", down)
    with pytest.raises(ValueError, match="something else wrote it"):
        sweep(source, copied, [CONFIG])
    down.write_bytes(whole)
    (copied / "hessians.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(ValueError, match="version 2; version 1 can be read"):
        sweep(source, copied, [CONFIG])


def test_a_directory_is_not_written_over_unless_a_run_goes_on(source: Path, copied: Path) -> None:
    with pytest.raises(FileExistsError, match="choose another directory for Hessians"), keep_hessians(source, copied):
        pass
    with pytest.raises(FileExistsError, match="is a file"), keep_hessians(source, copied / "hessians.json"):
        pass
    with keep_hessians(source, copied, resume=True):
        pass
    assert len(KeptHessians(copied)) == 5


@pytest.mark.slow
def test_a_run_that_is_cut_off_leaves_the_hessians_of_its_complete_blocks(source: Path, tmp_path: Path) -> None:
    def stop(done: int, *_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    again = partial(quantize_checkpoint, source, tmp_path / "run", CALIB, CONFIG, hessians=tmp_path / "kept")
    with pytest.raises(KeyboardInterrupt):
        again(progress=stop)
    lost = tmp_path / "kept" / "model.layers.0.mlp.down_proj.safetensors"
    whole = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=r"no Hessian of model.layers.0.mlp.down_proj"):
        again(resume=True)
    lost.write_bytes(whole)
    with pytest.raises(FileExistsError, match="unfinished run"):
        again()
    expected = again(resume=True)
    assert_same(sweep(source, tmp_path / "kept", [CONFIG])[0], expected)


@pytest.mark.slow
def test_the_command_keeps_and_sweeps(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept, rules = str(tmp_path / "kept"), ("--rule", ".*(v|o|gate|up)_proj => skip")
    options = ("--preset", "fast", "--group-size", "32", "--grid", "minmax", *rules, "--samples", "8", "--length", "32")
    main(["quantize", str(source), str(tmp_path / "run"), "--keep-hessians", kept, *options])
    settings = ("--bits", "2", "4", "--group-size", "32", "--grid", "minmax", *rules)
    main(["sweep", str(source), "--hessians", kept, *settings, "--out", str(tmp_path / "sweep.json")])
    said = capsys.readouterr().out
    assert "worst linears" in said
    two, four = json.loads((tmp_path / "sweep.json").read_text())["settings"]
    assert two["error"] > four["error"] > 0
    expected = {x["name"]: x for x in json.loads((tmp_path / "run" / "report.json").read_text())["linears"]}
    assert {x["name"]: x["error"] for x in four["linears"]} == pytest.approx({name: x["error"] for name, x in expected.items()}, rel=1e-4)
    main(["sweep", str(source), "--hessians", kept, *settings, "--out", str(tmp_path / "sweep.csv")])
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [row["linear"] for row in rows] == [x["name"] for x in (*two["linears"], *four["linears"])]
    assert [float(row["error"]) for row in rows] == pytest.approx([x["error"] for x in (*two["linears"], *four["linears"])])
    assert {row["bits_per_weight"] for row in rows} == {str(two["bits_per_weight"]), str(four["bits_per_weight"])}
    for args, sentence in ((("--out", "sweep.txt"), "ends in .json or .csv"), (("--group-size", "0"), "must be positive")):
        with pytest.raises(SystemExit):
            main(["sweep", str(source), "--hessians", kept, *args])
        assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_disk_that_is_full_is_told(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept, "write", full)
    with pytest.raises(OSError, match=r"Hessian of model.layers.0.\S+ cannot be written to .*: No space left on device\."):
        run(source, tmp_path, CONFIG)
    assert not (tmp_path / "run").exists()
