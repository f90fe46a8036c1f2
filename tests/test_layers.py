"""Who may import whom: the core stays free of frameworks and files, and the kernels stand alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "gptq_fn": ROOT / "gptq_fn",
    "gptq_fn_interop": ROOT / "interop/gptq_fn_interop",
    "gptq_fn_kernels": ROOT / "kernels/gptq_fn_kernels",
}

CORE = {"gptq_fn", "jax", "numpy", "jaxtyping"}
DOORS = {"interop.py": {"gptq_fn_interop"}, "kernels.py": {"gptq_fn_kernels"}, "testing.py": {"hypothesis"}}
"""Modules of the core that may import one thing more."""

FILES = {"builtins.open", "glob", "io", "os", "pathlib", "shutil", "socket", "tempfile", "urllib"}
"""Parts of the standard library that reach outside the program."""


def imports(path: Path) -> set[str]:
    """The top-level names that a module imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the package they reach"
            found.add(node.module or "")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "open":
            found.add("builtins.open")
    return {name if name == "builtins.open" else name.partition(".")[0] for name in found}


def modules(package: str) -> list[Path]:
    found = sorted(PACKAGES[package].rglob("*.py"))
    assert found
    return found


def identity(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", modules("gptq_fn"), ids=identity)
def test_the_core_imports_arrays_and_itself(path):
    extra = DOORS.get(str(path.relative_to(PACKAGES["gptq_fn"])), set())
    assert imports(path) - sys.stdlib_module_names - {"builtins.open"} <= CORE | extra
    assert not imports(path) & FILES


@pytest.mark.parametrize("path", modules("gptq_fn_kernels"), ids=identity)
def test_the_kernels_know_nothing_of_the_rest(path):
    assert not imports(path) & {"gptq_fn", "gptq_fn_interop", "transformers"}


@pytest.mark.parametrize("path", [p for name in PACKAGES for p in modules(name)], ids=identity)
def test_nothing_that_is_shipped_imports_tests(path):
    allowed = {"hypothesis"} if path.name == "testing.py" else set()
    assert not imports(path) & {"pytest", "hypothesis", "beartype", "tests"} - allowed


@pytest.mark.parametrize("path", [p for p in modules("gptq_fn_interop") if p.name != "tensors.py"], ids=identity)
def test_one_door_stands_between_torch_and_arrays(path):
    """What crosses elsewhere would share memory, or lose what the door keeps: bfloat16, gradients refused, 64 bits."""
    crossing = {"from_numpy", "from_dlpack", "to_dlpack", "__dlpack__", "numpy"}
    used = {node.attr for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Attribute)}
    assert not used & crossing


def test_the_outer_folders_are_no_packages():
    """A top-level `kernels` would hide the package of that name which transformers imports."""
    assert not [folder for folder in ("interop", "kernels") if (ROOT / folder / "__init__.py").exists()]


def run(program: str) -> str:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


def test_the_core_imports_where_nothing_else_is_installed():
    blocked = ("torch", "transformers", "triton", "safetensors", "gptq_fn_interop", "gptq_fn_kernels", "hypothesis")
    assert int(run(f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import gptq_fn; print(len(gptq_fn.__all__))")) > 0


def test_checkpoints_are_streamed_without_torch():
    assert run("import sys, gptq_fn_interop.stream; print([m for m in ('torch', 'transformers') if m in sys.modules])") == "[]"
    run("import sys; sys.modules.update(torch=None, transformers=None); import gptq_fn_interop.stream")
