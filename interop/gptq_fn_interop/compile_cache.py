"""Compiled programs kept from one run of the command to the next."""

import hashlib
import os
import platform
from pathlib import Path

import jax


def keep_programs() -> None:
    """Have JAX keep the programs that it compiles in the user's cache directory.

    JAX_COMPILATION_CACHE_DIR names another directory, and JAX_ENABLE_COMPILATION_CACHE=false keeps none. Call it before the
    first program is compiled.
    """
    if jax.config.values["jax_compilation_cache_dir"] is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "gptq-fn" / _processor()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _processor() -> str:
    """A name for what this processor can do: programs for CPUs use all of it and crash elsewhere, and homes may be shared."""
    told = Path("/proc/cpuinfo")
    features = {line for line in told.read_text().splitlines() if line.startswith(("flags", "Features"))} if told.exists() else set()
    return hashlib.sha256("".join([platform.machine(), platform.processor(), *sorted(features)]).encode()).hexdigest()[:16]
