"""Cubins of CUDA sources: compiled by NVRTC when they are first needed, and kept for every process of the user.

NVRTC is a library of 100 MB, in a wheel; neither a compiler nor CUDA's toolkit is needed, and no GPU. It has no headers of CUDA's
or C++'s, so the sources include none but their own.

GPTQ_FN_CUBINS names a directory of cubins that were built before (`gptq-fn kernels build`); it is read first and never written to.
"""

import hashlib
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from filelock import FileLock

HERE = Path(__file__).parent

_OPTIONS = ("-std=c++17", "--ptxas-options=-v")

_PATIENCE = 120
"""Seconds to wait for another process that compiles the same, before it is taken for stuck."""


@dataclass(frozen=True)
class Variant:
    """One way to compile a source."""

    source: str
    """A file's name in this directory, or an absolute path."""
    entry: str
    """The kernel's name, declared extern "C"."""
    defines: tuple[tuple[str, str | int], ...] = ()


@dataclass(frozen=True)
class Resources:
    """What a kernel takes of a GPU, as ptxas tells."""

    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of a thread that have no register: stores and loads."""
    shared: int
    """Bytes of static shared memory of a block."""


@dataclass(frozen=True)
class Compiled:
    """A cubin, the PTX that it was made from, what the compiler said, and how long it took."""

    cubin: bytes
    ptx: str
    log: str
    seconds: float

    def resources(self, entry: str) -> Resources:
        """Of this kernel. Raises KeyError where the log has none of this name."""
        for part in self.log.split("Compiling entry function ")[1:]:
            if part.startswith(f"'{entry}'"):
                spilled = sum(map(int, re.findall(r"(\d+) bytes spill", part)))
                registers, shared = re.search(r"Used (\d+) registers", part), re.search(r"(\d+) bytes smem", part)
                return Resources(int(registers[1]) if registers else 0, spilled, int(shared[1]) if shared else 0)
        raise KeyError(f"{entry}: the log tells of no such kernel:\n{self.log}")

    @property
    def warnings(self) -> str:
        """What the log says beside the resources; empty for sources in order.

        What ptxas changed or gave up, such as products that it made wait for one another, is numbered: "(C7510)".
        """
        usual = re.compile(r"ptxas info    : (?!\(C\d)|ptxas         \.|\s*$")
        return "\n".join(line for line in self.log.splitlines() if not usual.match(line))


def cubin_of(variant: Variant, arch: str) -> bytes:
    """The cubin for GPUs of this architecture ("sm_90a"), from a directory of cubins, the user's cache, or the compiler.

    A line on stderr tells of each compilation. Processes that want the same one wait for the first. Where the cache cannot be
    written, a warning says so and nothing is kept. Raises as `compiled` does.
    """
    if ready := os.environ.get("GPTQ_FN_CUBINS"):
        for at in _candidates(Path(ready), variant, arch):
            if (cubin := read(at)) is not None:
                return cubin
    path = cache_directory() / file_name(variant, arch)
    if (cubin := read(path)) is not None:
        return cubin
    check_arch(arch)
    with _alone(path):
        if (cubin := read(path)) is not None:
            return cubin
        what = f"gptq_fn: compiling {Path(variant.source).name} for {arch}"
        print(f"{what} ...", end="", file=sys.stderr, flush=True)
        try:
            done = compiled(variant, arch)
        except Exception:
            print(" failed", file=sys.stderr, flush=True)
            raise
        print(f" {done.seconds:.1f} s", file=sys.stderr, flush=True)
        try:
            write(path, done.cubin)
        except OSError as error:
            hint = "XDG_CACHE_HOME names another directory"
            warnings.warn(f"The compiled kernel is not kept, for the cache cannot be written: {error}. {hint}.", stacklevel=2)
    return done.cubin


def compiled(variant: Variant, arch: str) -> Compiled:
    """The variant, compiled here and now. Needs no GPU.

    Raises ValueError for an architecture that NVRTC does not know, RuntimeError with the compiler's log for a source that does not
    compile, OSError for one that is not there, and ModuleNotFoundError where NVRTC is not installed.
    """
    check_arch(arch)
    nvrtc, path = _nvrtc(), HERE / variant.source
    options = [*_OPTIONS, f"-arch={arch}", f"-I{path.parent}", f"-I{HERE}", *(f"-D{name}={value}" for name, value in variant.defines)]
    program = _told(nvrtc.nvrtcCreateProgram(path.read_bytes(), path.name.encode(), 0, [], []))
    start = perf_counter()
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        seconds, log = perf_counter() - start, _bytes(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        said = log.rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            defines = " ".join(f"{name}={value}" for name, value in variant.defines) or "no defines"
            raise RuntimeError(f"{path} does not compile for {arch} with {defines} ({status.name}):\n{said}")
        ptx = _bytes(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program).rstrip(b"\0").decode()
        return Compiled(_bytes(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), ptx, said, seconds)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def file_name(variant: Variant, arch: str) -> str:
    """The name under which the cubin is kept: what it was made from, the architecture, and the compiler's version."""
    major, minor = nvrtc_version()
    return f"{_stem(variant, arch)}.nvrtc{major}_{minor}.cubin"


def write(path: Path, cubin: bytes) -> None:
    """The cubin with its checksum behind it, which readers of ELF files ignore; whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        part.write_bytes(cubin + hashlib.sha256(cubin).digest())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def cache_directory() -> Path:
    """Where this user's cubins are kept; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gptq-fn" / "cubins"


@cache
def missing() -> str | None:
    """None, or which part of the compiler is not installed."""
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib

        import_module("cuda.bindings.nvrtc")
    except ModuleNotFoundError:
        return "needs cuda-bindings, which is not installed: pip install 'gptq-fn[cuda]'"
    try:
        load_nvidia_dynamic_lib("nvrtc")
    except DynamicLibNotFoundError:
        return "needs NVRTC, which is not installed: pip install 'gptq-fn[cuda]'"
    return None


@cache
def nvrtc_version() -> tuple[int, int]:
    """Of the NVRTC that is installed. Raises ModuleNotFoundError where there is none."""
    return _told(_nvrtc().nvrtcVersion())


def check_arch(arch: str) -> None:
    """Raises ValueError for an architecture that the installed NVRTC does not compile for."""
    known = _told(_nvrtc().nvrtcGetSupportedArchs())
    if not (named := re.fullmatch(r"sm_(\d+)[af]?", arch)) or int(named[1]) not in known:
        names, (major, minor) = ", ".join(f"sm_{number}" for number in known), nvrtc_version()
        raise ValueError(f"{arch!r} is no architecture that NVRTC {major}.{minor} knows. It knows {names}, and sm_90a.")


def _stem(variant: Variant, arch: str) -> str:
    """The part of the name that does not depend on the compiler."""
    path = HERE / variant.source
    headers = sorted({*HERE.glob("*.cuh"), *path.parent.glob("*.cuh")})
    texts = [path.read_bytes(), *(header.read_bytes() for header in headers), repr((path.name, variant.defines, _OPTIONS)).encode()]
    digest = hashlib.sha256(b"".join(hashlib.sha256(text).digest() for text in texts)).hexdigest()
    return f"{path.stem}.{digest[:24]}.{arch}"


def _candidates(directory: Path, variant: Variant, arch: str) -> Iterator[Path]:
    """Cubins of the variant that GPUs of this architecture run: its own, then those of older ones of the same generation."""
    generation = [arch]
    if arch[-1].isdigit():
        generation += [f"{arch[:-1]}{minor}" for minor in range(int(arch[-1]) - 1, -1, -1)]
    for each in generation:
        yield from sorted(directory.glob(f"{_stem(variant, each)}.*.cubin"), reverse=True)


def read(path: Path) -> bytes | None:
    """The cubin, or None where there is none or it is damaged."""
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    cubin = kept[:-32]
    return cubin if cubin and hashlib.sha256(cubin).digest() == kept[-32:] else None


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keeps other processes that compile the same waiting, where the directory allows it; two that compile do no harm."""
    lock = FileLock(f"{path}.lock", timeout=_PATIENCE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError):  # a timeout is an OSError, too
        yield
        return
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


@cache
def _nvrtc() -> Any:
    if reason := missing():
        raise ModuleNotFoundError(f"This {reason}.", name="nvidia-cuda-nvrtc")
    return import_module("cuda.bindings.nvrtc")


def _told(result: tuple[Any, ...]) -> Any:
    """The values behind the status that every function of NVRTC's returns."""
    status, *values = result
    if status.value:
        raise RuntimeError(f"NVRTC failed: {status.name}.")
    return values[0] if len(values) == 1 else tuple(values)


def _bytes(size_of: Any, get: Any, program: Any) -> bytes:
    size = _told(size_of(program))
    buffer = bytes(bytearray(size))  # a new object, for it is written to
    get(program, buffer)
    return buffer
