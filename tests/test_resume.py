"""Runs that are cut off: what they leave, what continues them, and that the result is that of a run which was not."""

import errno
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import kill_and_resume
import numpy as np
import pytest
import torch
import transformers
from gptq_fn_interop import tensor_files
from gptq_fn_interop.activations import on_disk
from gptq_fn_interop.cli import main
from gptq_fn_interop.compile_cache import keep_programs
from gptq_fn_interop.gptq_format import tensors_on_device, to_tensors
from gptq_fn_interop.overlap import ahead, behind
from gptq_fn_interop.runtime import default_runtime
from gptq_fn_interop.shards import assemble, write_parts
from gptq_fn_interop.staging import claimed, staged
from gptq_fn_interop.stream import quantize_checkpoint
from kill_and_resume import differing
from safetensors import safe_open
from safetensors.numpy import load_file
from tiny import save_tiny_llama

from gptq_fn import QuantConfig, QuantizedLinear, Rule, Runtime

TOKENS = np.random.default_rng(0).integers(0, 300, (6, 24)).astype(np.int32)
CONFIG = QuantConfig(4, 32, sym=False, grid="minmax", order="natural")
CONFIG = replace(CONFIG, rules=(Rule("lm_head", replace(CONFIG, bits=8)), Rule("model.layers.1.mlp.down_proj")))
OPTIONS = ("--group-size", "32", "--no-sym", "--grid", "minmax", "--order", "natural", "--samples", "6", "--length", "24")
BLOCKS = 4


@pytest.fixture(scope="module", autouse=True)
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where compiled programs are kept, so that the processes that are killed need not compile them."""
    directory = tmp_path_factory.mktemp("programs")
    values = {"jax_enable_compilation_cache": True, "jax_compilation_cache_dir": str(directory)}
    before = {name: jax.config.values[name] for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    yield directory
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights of one shape: few programs to compile."""
    sizes = {"num_hidden_layers": BLOCKS, "num_key_value_heads": 4, "intermediate_size": 64}
    return save_tiny_llama(tmp_path_factory.mktemp("float") / "tiny", **sizes)


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    quantize_checkpoint(source, source.parent / "whole", TOKENS, CONFIG)
    return source.parent / "whole"


def stop_after(block: int, stop: BaseException | None = None) -> Callable[..., None]:
    def progress(done: int, *_: Any) -> None:
        if done == block:
            raise stop or KeyboardInterrupt

    return progress


def interrupted(source: Path, destination: Path, block: int, **changes: Any) -> str:
    """Stop a run once this block is computed. What it told then."""
    with pytest.raises(KeyboardInterrupt) as caught:
        quantize_checkpoint(source, destination, TOKENS, CONFIG, progress=stop_after(block), **changes)
    return " ".join(getattr(caught.value, "__notes__", ()))


def copied(source: Path, destination: Path) -> Path:
    return Path(shutil.copytree(source, destination))


def complete(destination: Path) -> int:
    return len(list(destination.parent.glob(f".{destination.name}.unfinished/block-*.json")))


def test_two_runs_write_the_same_bytes(source, whole, tmp_path):
    quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG)
    assert differing(whole, tmp_path / "out") == []


def test_runs_that_were_killed_continue_to_the_same_bytes(source, whole, tmp_path, programs):
    chance, cut = random.Random(0), tmp_path / "cut"
    arguments = (source, cut, TOKENS, CONFIG, programs)
    for block in (1, 3):
        assert not kill_and_resume.run(*arguments, die_after=block)
        assert complete(cut) in (block - 1, block)  # the last one was being written
        assert not cut.exists()
    process = kill_and_resume.PROCESSES.Process(target=kill_and_resume.work, args=(*arguments, None, {}))
    process.start()
    while process.is_alive() and complete(cut) < BLOCKS:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.05))  # about when the head is solved and the files get their names
    process.kill()
    process.join()
    if not cut.exists():
        assert kill_and_resume.run(*arguments)
    assert differing(whole, cut) == []


@pytest.mark.slow
@pytest.mark.parametrize("block", range(1, BLOCKS + 1))
def test_a_run_continues_from_any_block(source, whole, tmp_path, block):
    told = interrupted(source, tmp_path / "out", block)
    assert told.startswith(f"{block} of {BLOCKS} blocks are complete")
    assert "--resume continues" in told
    seen = []
    quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, resume=True, progress=lambda *x: seen.append(x))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert differing(whole, tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_seconds_of_finished_blocks_are_those_of_their_run(source, tmp_path):
    interrupted(source, tmp_path / "out", 2)
    before = json.loads((tmp_path / ".out.unfinished/block-00001.json").read_text())["linears"]
    report = quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, resume=True)
    assert before == json.loads(json.dumps([vars(x) for x in report.linears if ".layers.1." in x.name]))


SHAPE: dict[str, Any] = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SIMPLE = QuantConfig(4, 16, grid="minmax", order="natural", min_rows=4)
MODELS: dict[str, tuple[Any, torch.dtype, QuantConfig]] = {
    "experts": (
        transformers.MixtralConfig(**SHAPE, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2),
        torch.bfloat16,
        SIMPLE,
    ),
    "conv1d, biases, tied": (
        transformers.GPT2Config(vocab_size=97, n_embd=32, n_inner=32, n_layer=2, n_head=2, n_positions=64),
        torch.float32,
        replace(SIMPLE, order="act", sequential=False),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_back_is_what_was_computed(name, tmp_path):
    described, dtype, config = MODELS[name]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(described, dtype=dtype).save_pretrained(tmp_path / "in")
    samples = np.random.default_rng(0).integers(0, 97, (6, 24)).astype(np.int32)
    quantize_checkpoint(tmp_path / "in", tmp_path / "whole", samples, config, shard_bytes=30_000)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tmp_path / "in", tmp_path / "cut", samples, config, shard_bytes=30_000, progress=stop_after(1))
    quantize_checkpoint(tmp_path / "in", tmp_path / "cut", samples, config, shard_bytes=30_000, resume=True)
    assert differing(tmp_path / "whole", tmp_path / "cut") == []


def test_without_resume_an_unfinished_run_is_told_and_kept(source, whole, tmp_path):
    interrupted(source, tmp_path / "out", 1)
    with pytest.raises(FileExistsError, match=r"\.out\.unfinished holds an unfinished run with 1 complete block\. .*resume=True"):
        quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG)
    with pytest.raises(FileExistsError, match="holds an unfinished run"), staged(tmp_path / "out"):
        pytest.fail("another writer may not take its place")
    quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, resume=True)
    assert differing(whole, tmp_path / "out") == []


def test_another_run_is_not_continued(source, tmp_path):
    interrupted(source, tmp_path / "out", 1)
    other = copied(source, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    first = min(tensors)
    tensor_files.write(other / "model.safetensors", {**tensors, first: tensors[first] + 1})
    few = Runtime(tokens_per_call=64)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((source, TOKENS + 1, CONFIG), {}, "its calibration tokens. Give what was given then, or remove that directory"),
        ((source, TOKENS, replace(CONFIG, bits=3)), {}, "its config (bits 4 then, 3 now)"),
        ((other, TOKENS, CONFIG), {}, "its source (files)"),
        ((source, TOKENS, CONFIG), {"runtime": few}, "its means (tokens_per_call 2048 then, 64 now)"),
    ]
    for (directory, tokens, config), means, sentence in cases:
        with pytest.raises(ValueError, match="cannot be continued") as caught:
            quantize_checkpoint(directory, tmp_path / "out", tokens, config, resume=True, **means)
        assert sentence in str(caught.value)
        assert not getattr(caught.value, "__notes__", ())
    assert complete(tmp_path / "out") == 1


def test_a_run_of_no_blocks_leaves_nothing_and_nothing_is_begun(source, whole, tmp_path):
    class Broken(Exception):
        pass

    def observe(*_: Any) -> None:
        raise Broken

    with pytest.raises(Broken):
        quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, runtime=Runtime(observe=observe))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.unfinished").mkdir()  # as a kill leaves it
    (tmp_path / ".out.unfinished/block-00000-0.safetensors").write_bytes(b"cut off")
    quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, resume=True)
    assert differing(whole, tmp_path / "out") == []
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_told_and_the_run_continues(source, whole, tmp_path, monkeypatch):
    put, written = tensor_files._put, []

    def full(file: Any, content: Any) -> None:
        written.append(len(content))
        if sum(written) > 45_000:
            raise OSError(errno.ENOSPC, "No space left on device", file.name)
        put(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "_put", full)
        with pytest.raises(OSError, match="No space left on device") as caught:
            quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG)
    assert 0 < complete(tmp_path / "out") < BLOCKS
    assert "--resume continues" in " ".join(caught.value.__notes__)
    quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, resume=True)
    assert differing(whole, tmp_path / "out") == []


@pytest.mark.slow
def test_a_source_that_shrinks_is_told_and_the_run_continues(source, whole, tmp_path):
    here = copied(source, tmp_path / source.name)  # the report tells the name
    content = (here / "model.safetensors").read_bytes()

    def truncate(done: int, *_: Any) -> None:
        if done == 1:
            (here / "model.safetensors").write_bytes(content[: len(content) // 8])

    with pytest.raises(ValueError, match=r"model\.safetensors ends before .* does: it was cut off since it was opened") as caught:
        quantize_checkpoint(here, tmp_path / "out", TOKENS, CONFIG, progress=truncate)
    assert "--resume continues" in " ".join(caught.value.__notes__)
    (here / "model.safetensors").write_bytes(content)
    quantize_checkpoint(here, tmp_path / "out", TOKENS, CONFIG, resume=True)
    assert differing(whole, tmp_path / "out") == []


def test_one_run_at_a_time(source, tmp_path):
    with claimed(tmp_path / "out"):
        for resume in (False, True):
            with pytest.raises(BlockingIOError, match=r"Another run is writing to .*/out;"):
                quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, resume=resume)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_command_continues(source, tmp_path, capsys, monkeypatch):
    command = ["quantize", str(source), str(tmp_path / "out"), *OPTIONS]

    def stop(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("gptq_fn_interop.stream.assemble", stop)
        with pytest.raises(SystemExit, match="1"):
            main([*command, "--activations", "disk"])
    said = " ".join(capsys.readouterr().err.split())
    assert "No space left on device. 4 of 4 blocks are complete" in said
    with pytest.raises(SystemExit, match="1"):
        main(command)
    assert "Continue it with --resume" in " ".join(capsys.readouterr().err.split())
    main([*command, "--resume"])
    assert (tmp_path / "out/model.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_activations_that_wait_on_disk_change_nothing(source, whole, tmp_path):
    store, seen = on_disk(tmp_path / "waiting"), []

    def get(waiting: Any) -> Any:
        arrays = store.get(waiting)
        seen.append(len(list((tmp_path / "waiting").iterdir())))
        return arrays

    runtime = replace(default_runtime(), store=store._replace(get=get))
    quantize_checkpoint(source, tmp_path / "out", TOKENS, CONFIG, runtime=runtime)
    assert differing(whole, tmp_path / "out") == []
    assert 0 < max(seen) <= 3
    until = time.monotonic() + 10
    while list((tmp_path / "waiting").iterdir()) and time.monotonic() < until:
        time.sleep(0.01)  # the last file goes when the thread that writes it is done
    assert list((tmp_path / "waiting").iterdir()) == []


def test_what_waits_on_disk_comes_back_and_is_let_go(tmp_path):
    store = on_disk(tmp_path / "waiting")
    arrays = {"a": jnp.arange(12, dtype=jnp.bfloat16).reshape(3, 4), "b": (jnp.asarray([True, False]), jnp.float32(2.5)), "c": ()}
    waiting = store.put(arrays)
    for _ in range(2):
        found = store.get(waiting)
        assert jax.tree.structure(found) == jax.tree.structure(arrays)
        for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(arrays), strict=True):
            assert (mine.dtype, mine.sharding) == (other.dtype, other.sharding)
            np.testing.assert_array_equal(mine, other)
    (file,) = (tmp_path / "waiting").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(OSError, match="is shorter than what was written to it"):
        store.get(waiting)
    waiting = store.put(jnp.zeros(3))
    jax.block_until_ready(waiting)
    assert len(list((tmp_path / "waiting").iterdir())) == 1
    del waiting
    assert list((tmp_path / "waiting").iterdir()) == []
    del store
    assert not (tmp_path / "waiting").exists()
    (tmp_path / "full/activations-0").mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory"):
        jax.block_until_ready(on_disk(tmp_path / "full").put(jnp.zeros(3)))


def test_one_task_ahead_and_one_behind():
    log: list[str] = []

    def task(name: str) -> Callable[[], str]:
        return lambda: (log.append(name), name)[1]

    with ahead([task("0"), task("1"), task("2"), task("3")]) as results:
        assert next(results) == "0"
        assert next(results) == "1"
        time.sleep(0.05)
        assert log == ["0", "1", "2"]
    with behind() as later:
        for n in range(3):
            later(lambda n=n: (time.sleep(0.01), log.append(f"late {n}")))
            assert f"late {n - 2}" in log or n < 2
    assert log[-3:] == ["late 0", "late 1", "late 2"]

    def fail() -> None:
        raise OSError("as it was")

    with pytest.raises(OSError, match="as it was"), ahead([fail, task("4")]) as results:
        next(results)
    with behind() as later:
        later(fail)
        with pytest.raises(OSError, match="as it was"):
            later(task("5"))
    assert "5" not in log
    with pytest.raises(OSError, match="as it was"), behind() as later:
        later(fail)


@pytest.mark.parametrize("limit", [10**9, 500, 1])
def test_parts_become_shards_or_one_file(tmp_path, limit):
    rng = np.random.default_rng(0)
    kinds = ("int32", "float16", "bfloat16", "uint8", "float64", "bool", "int64")
    tensors = {f"t{n}": np.asarray(rng.integers(0, 2, (3, n)[: n % 3]), kinds[n % 7]) for n in range(20)}
    parts = [path for i in range(2) for path in write_parts(tmp_path, f"part{i}", [*tensors.items()][10 * i :][:10], limit)]
    assemble(parts, tmp_path, limit)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1 if limit > 10_000 else len(files) > 2
    found: dict[str, np.ndarray] = {}
    for file in files:
        with safe_open(file, "pt") as opened:  # torch refuses tensors that are not aligned
            for name in opened.keys():  # noqa: SIM118
                assert opened.get_tensor(name).shape == tensors[name].shape
        found |= load_file(file)
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("experts", [(), (3,)])
def test_a_device_packs_what_the_host_packs(bits, experts):
    rng = np.random.default_rng(bits)
    codes, zero = (jnp.asarray(rng.integers(1, 2**bits, (*experts, 32, n)), jnp.uint8) for n in (96, 6))
    q = QuantizedLinear(codes, zero.astype(jnp.float16), zero, jnp.broadcast_to(jnp.arange(96) // 16, (*experts, 96)), bits)
    for zeros in ("v1", "v2"):
        here, there = to_tensors(q, zeros), tensors_on_device({"a": q}, zeros)["a"]
        assert list(here) == list(there)
        for key, tensor in here.items():
            assert tensor.dtype == there[key].dtype
            np.testing.assert_array_equal(tensor, there[key])


def test_programs_are_kept_where_the_user_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    try:
        jax.config.update(names[0], None)
        keep_programs()
        chosen = jax.config.values[names[0]]
        assert Path(chosen).parent == tmp_path / "gptq-fn"
        jax.config.update(names[0], "/elsewhere")
        keep_programs()
        assert jax.config.values[names[0]] == "/elsewhere"
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
