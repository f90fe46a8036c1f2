"""Runs that are killed at random moments and continued write what a run that nobody kills writes.

python tests/kill_and_resume.py MODEL_DIRECTORY --kills 20
"""

import argparse
import filecmp
import json
import multiprocessing
import os
import random
import shutil
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gptq_fn import QuantConfig

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["gptq_fn_interop.stream"])  # so that not every process imports it


def work(source: Path, destination: Path, calib: Any, config: QuantConfig, programs: Path, die_after: int | None, options: Any) -> None:
    """A run in a process of its own, which kills itself once it has computed `die_after` blocks."""
    import jax
    from gptq_fn_interop.stream import quantize_checkpoint

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(programs))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    def progress(done: int, *_: Any) -> None:
        if done == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    quantize_checkpoint(source, destination, calib, config, progress=progress, resume=True, **options)


def run(*arguments: Any, die_after: int | None = None, kill_at: float | None = None, **options: Any) -> bool:
    """Whether a run ended well; one that did not was killed, `kill_at` seconds after its start or by itself."""
    process = PROCESSES.Process(target=work, args=(*arguments, die_after, options))
    process.start()
    process.join(kill_at)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode in (0, -signal.SIGKILL), f"The run failed with {process.exitcode}."
    return process.exitcode == 0


def differing(a: Path, b: Path) -> list[str]:
    """The files of two checkpoints that are not the same byte for byte, seconds in report.json aside."""
    names = {path.name for directory in (a, b) for path in directory.iterdir()}
    same = {name for name in names if (a / name).exists() and (b / name).exists() and filecmp.cmp(a / name, b / name, shallow=False)}
    if "report.json" not in same and timeless(a / "report.json") == timeless(b / "report.json"):
        same.add("report.json")
    return sorted(names - same)


def timeless(report: Path) -> str:
    """The text of a report without the seconds that the run took."""
    return json.dumps(json.loads(report.read_text(), object_hook=lambda part: {key: x for key, x in part.items() if key != "seconds"}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    calib = np.random.default_rng(options.seed).integers(0, vocabulary, (options.samples, options.length)).astype(np.int32)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        whole, cut = Path(scratch, "whole"), Path(scratch, "cut")
        common = (calib, QuantConfig(), Path(scratch, "programs"))
        assert run(options.model, whole, *common)
        began = time.perf_counter()
        assert run(options.model, cut, *common)
        seconds = time.perf_counter() - began
        print(f"Two runs that nobody killed differ in {differing(whole, cut) or 'nothing'}; the second took {seconds:.1f} s.", flush=True)
        shutil.rmtree(cut)
        kills = runs = 0
        while not runs or kills < options.kills:
            moment = chance.uniform(0, seconds) if kills < options.kills else None
            if run(options.model, cut, *common, kill_at=moment):
                runs += 1
                assert not (wrong := differing(whole, cut)), f"After {kills} kills, {wrong} are not those of the run that nobody killed."
                shutil.rmtree(cut)
            else:
                kills += 1
                left = sorted(path.name for path in Path(scratch).glob(".cut.unfinished/block-*.json"))
                print(f"kill {kills} after {moment:.1f} s: {len(left)} blocks complete", flush=True)
        print(f"{kills} kills; {runs} runs that were continued to their end are equal to the one that nobody killed, byte for byte.")


if __name__ == "__main__":
    main()
