"""Strict JAX, shapes checked by beartype, and skipping of what the machine cannot run."""

import os
from importlib.metadata import version

# Test programs are small and many: LLVM's optimizations, and XLA's newer way to write fused loops for CPUs, would cost more time
# than they save. Set before JAX starts, which ends a process that sets a flag it does not know: jaxlib 0.11 has the newer way only.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_backend_optimization_level=0" + " --xla_cpu_use_fusion_emitters=false" * (version("jaxlib") < "0.11")
)
os.environ.setdefault("JAX_ENABLE_COMPILATION_CACHE", "false")  # the command keeps programs; tests leave the user's cache alone

import importlib.util
import pkgutil
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest
from jaxtyping import install_import_hook

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes and types of everything but values whose own sentences are tested, and strategies, in which beartype's sampling of
# containers would look like a hidden source of randomness.
_core = importlib.util.find_spec("gptq_fn")
assert _core is not None
_checked = {f"gptq_fn.{module.name}" for module in pkgutil.iter_modules(_core.submodule_search_locations)}
install_import_hook(sorted(_checked - {"gptq_fn._config", "gptq_fn._quantized", "gptq_fn.testing"}), "beartype.beartype")

hypothesis.settings.register_profile("here", deadline=None, max_examples=10, print_blob=True, report_multiple_bugs=False)
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("here"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if shutil.which("nvidia-smi") is None:
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(
                    pytest.mark.skip(reason="there is no NVIDIA GPU here (no nvidia-smi); run `make test-gpu` where there is one")
                )


MAPS = Path("/proc/self/maps")


@pytest.fixture(autouse=True)
def _room_for_programs() -> Iterator[None]:
    """Compiled programs hold memory maps, of which Linux allows a process 65,530: XLA crashes at the next one."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
