"""Several devices, and several processes, find what one finds."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from gptq_fn_interop import processes
from tiny import save_tiny_llama

from gptq_fn import Runtime, data_mesh

HERE = Path(__file__).parent


def test_eight_devices_find_what_one_finds() -> None:
    """Up to ties: a Hessian is summed in another order."""
    done = subprocess.run([sys.executable, HERE / "mesh_runs.py"], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    batches = found.pop("layout")
    assert {name: len(runs) for name, runs in found.items()} == {"dense": 1, "at_once": 1, "refined": 1, "experts": 2}
    for run in (run for runs in found.values() for run in runs):
        assert run["told"]
        assert run["codes"] < 1e-3
        assert run["error"] < 1e-4
        assert run.get("hessians", 0) < 1e-5
    assert sorted(n for batch in batches for n in batch["samples"]) == list(range(63))
    assert sum(batch["kept"] for batch in batches) == 9 * (9 + 12 + 10 + 12 + 11 + 9 + 10)
    for batch in batches:
        samples, time, width = batch["shape"]
        assert batch["devices"] == 8
        assert batch["parts"] == [[samples // 8, time, width]]
        assert samples // 8 * time <= 24
        assert 0 <= samples - len(batch["samples"]) < 8


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    source = save_tiny_llama(tmp_path / "source")
    flags = os.environ["XLA_FLAGS"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def start(name: str, changes: dict[str, str]) -> subprocess.Popen[str]:
        options = [
            "--group-size",
            "32",
            "--samples",
            "3",
            "--length",
            "16",
            "--mesh",
            "all",
            "--rule",
            ".*(k|v|q|gate|up|down)_proj => skip",
        ]
        command = [sys.executable, "-m", "gptq_fn_interop.cli", "quantize", str(source), str(tmp_path / name), *options]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", **changes}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": "2"}
    started = [
        start("two", {**together, "JAX_PROCESS_ID": "0"}),
        start("two", {**together, "JAX_PROCESS_ID": "1"}),
        start("one", {"XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=2"}),
    ]
    said = [process.communicate(timeout=300) for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert ["linears at" in out for out, _ in said] == [True, False, True]
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")]
    reports = [json.loads(mine.pop("report.json")) for mine in files]
    assert files[0] == files[1]
    assert [report["run"].pop("seconds") > 0 for report in reports] == [True, True]
    assert reports[0] == reports[1]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_meshes_that_do_not_fit_are_refused() -> None:
    Runtime(mesh=data_mesh())
    for mesh in (jax.make_mesh((1,), ("data",)), jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("rows",))):
        with pytest.raises(ValueError, match="A run's mesh has one axis, 'data', of type Auto"):
            Runtime(mesh=mesh)
    with pytest.raises(ValueError, match=r"--mesh 99: there (are|is) "):
        processes.join(99)
