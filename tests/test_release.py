"""What is published: a wheel with three packages and nothing else, and a source archive with what one needs to change them."""

import re
import shutil
import subprocess
import sys
import tarfile
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest
from gptq_fn_interop.cli import main
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import gptq_fn

ROOT = Path(__file__).parent.parent
PACKAGES = ("gptq_fn/", "interop/gptq_fn_interop/", "kernels/gptq_fn_kernels/")
SOURCES = ("kernels/gptq_fn_kernels/cuda/probe.cu", "kernels/gptq_fn_kernels/cuda/probe.cuh")
"""Kernel sources that need no Python to be noticed."""
NOT_FOR_ALL = {"all", "cuda", "dev", "docs", "release"}
"""Extras that `all` does not hold: dev, docs and release are for this repository, cuda is for machines with a GPU."""


def tracked() -> set[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("what is tracked is asked of git, and this is no clone")
    return {name for name in listed.stdout.splitlines() if (ROOT / name).exists()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], Path, Path]:
    """The files of a tree, and the wheel and the source archive made of it and of files that do not belong there."""
    tree, dist = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    names = tracked() | set(SOURCES)
    for name in (*names, "notes.txt", "scratch/model.safetensors"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree / name)
        else:
            (tree / name).write_text("// a kernel\n")
    wheel, archive = (next(builder(str(tree)).build(directory=str(dist))) for builder in (WheelBuilder, SdistBuilder))
    return names, Path(wheel), Path(archive)


def test_the_wheel_holds_three_packages_with_their_kernel_sources(built: tuple[set[str], Path, Path]) -> None:
    names, wheel, _ = built
    held = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {re.sub("^(interop|kernels)/", "", name) for name in names if name.startswith(PACKAGES)}
    assert held == expected
    assert {name.removeprefix("kernels/") for name in SOURCES} <= held


def test_the_source_archive_holds_the_tree_and_nothing_else(built: tuple[set[str], Path, Path]) -> None:
    names, _, archive = built
    with tarfile.open(archive) as tar:
        held = {name.partition("/")[2] for name in tar.getnames()}
    assert held - names == {"PKG-INFO"}
    assert names - held == {name for name in names if name.startswith((".ci/", ".pre-commit"))}


def test_the_core_asks_for_no_framework(built: tuple[set[str], Path, Path]) -> None:
    *_, wheel, _ = built
    file = ZipFile(wheel)
    metadata = Parser().parsestr(file.read(next(n for n in file.namelist() if n.endswith("METADATA"))).decode())
    assert metadata["Version"] == gptq_fn.__version__
    needs = [need for need in metadata.get_all("Requires-Dist", []) if "extra ==" not in need]
    assert len(needs) > 5
    assert not [need for need in needs if re.match("torch|transformers|triton|flax|datasets|accelerate", need)]
    extras = metadata.get_all("Provides-Extra", [])
    wanted = {extra: {need for need in metadata.get_all("Requires-Dist", []) if f"extra == '{extra}'" in need} for extra in extras}
    assert all(wanted.values())
    everything = {need.replace("'all'", "") for need in wanted["all"]}
    assert everything == {need.replace(f"'{extra}'", "") for extra in {*extras} - NOT_FOR_ALL for need in wanted[extra]}


def test_one_version_everywhere() -> None:
    assert f"\nversion: {gptq_fn.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    newest = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if re.match(r"## \d", line))
    assert newest.split()[1] == gptq_fn.__version__


def test_the_command_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out.split() == ["gptq-fn", gptq_fn.__version__]


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import gptq_fn.interop", "gptq_fn.interop needs transformers, which is not installed: pip install 'gptq-fn[hf]'"),
        ("import gptq_fn_interop.cli as cli; cli.main(['kernels'])", "this needs torch, which is not installed: pip install"),
    ],
)
def test_what_needs_torch_says_how_to_get_it(program: str, said: str) -> None:
    without = "import sys; sys.modules.update(torch=None, transformers=None); "
    done = subprocess.run([sys.executable, "-c", without + program], capture_output=True, text=True)
    assert done.returncode == 1
    assert said in " ".join(done.stderr.split())
