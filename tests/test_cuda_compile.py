"""CUDA sources compile without a GPU, and what was compiled is kept: once for each source, architecture and compiler, and whole."""

import itertools
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gptq_fn_interop.cli import main
from gptq_fn_kernels.cuda import compile as compiler
from gptq_fn_kernels.cuda import machine
from gptq_fn_kernels.cuda.compile import HERE, Variant, cache_directory, compiled, cubin_of, file_name, read, write
from gptq_fn_kernels.cuda.variants import variants

pytestmark = pytest.mark.skipif(compiler.missing() is not None, reason=f"the compiler {compiler.missing()}")

ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100", "sm_120")
SOURCE = """
#include "steps.cuh"
extern "C" __global__ void first(float* y) { y[threadIdx.x] += STEP * two; }
extern "C" __global__ void second(float* y) { __shared__ float kept[64]; kept[threadIdx.x] = y[0]; __syncthreads(); y[0] = kept[1]; }
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source with a header, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GPTQ_FN_CUBINS", raising=False)
    (tmp_path / "sources").mkdir()
    (tmp_path / "sources" / "steps.cuh").write_text("constexpr float two = 2;\n")
    path = tmp_path / "sources" / "steps.cu"
    path.write_text(SOURCE)
    return path


def step(source: Path, value: int = 1) -> Variant:
    return Variant(str(source), "first", (("STEP", value),))


def kept() -> set[str]:
    return {path.name for path in cache_directory().iterdir()}


# The package's own kernels


def every(arch: str) -> list[Variant]:
    """Every variant of the package for this architecture."""
    kinds = itertools.product((2, 3, 4, 8), (32, 64, 128, None), (torch.float16, torch.bfloat16), (True, False))
    return list(dict.fromkeys(variant for kind in kinds for variant in variants(arch, *kind)))


def chosen(arch: str) -> list[Variant]:
    """Of each kernel the first, the last and every 16th between them."""
    found = []
    for _, alike in itertools.groupby(sorted(every(arch), key=lambda v: (v.source, v.entry)), lambda v: (v.source, v.entry)):
        all_of_it = list(alike)
        found += dict.fromkeys([*all_of_it[::16], all_of_it[-1]])
    return found


def compiles(arch: str, variant: Variant) -> None:
    done = compiled(variant, arch)
    assert done.cubin.startswith(b"\x7fELF")
    assert done.warnings == ""
    assert done.resources(variant.entry).spilled == 0


def named(cases: list[tuple[str, Variant]]) -> list:
    return [pytest.param(a, v, id="-".join([a, v.source, v.entry, *(f"{k}={x}" for k, x in v.defines)])) for a, v in cases]


def test_every_source_is_used() -> None:
    assert {variant.source for arch in ARCHS for variant in every(arch)} == {path.name for path in HERE.glob("*.cu")}


@pytest.mark.parametrize(("arch", "variant"), named([(arch, variant) for arch in ARCHS for variant in chosen(arch)]))
def test_the_packages_kernels_compile(arch: str, variant: Variant) -> None:
    compiles(arch, variant)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "variant"), named([(a, v) for a in ARCHS for v in every(a) if v not in chosen(a)]))
def test_every_variant_compiles(arch: str, variant: Variant) -> None:
    compiles(arch, variant)


# The compiler


@pytest.mark.parametrize("arch", ARCHS)
def test_a_cubin_is_for_its_architecture(arch: str, source: Path) -> None:
    cubin = compiled(step(source), arch).cubin
    assert cubin[:4] == b"\x7fELF"
    assert int.from_bytes(cubin[18:20], "little") == 190  # EM_CUDA
    flags = int.from_bytes(cubin[48:52], "little")  # the architecture is the lowest byte, or the next one since CUDA 13
    assert int("".join(filter(str.isdigit, arch))) in (flags & 0xFF, flags >> 8 & 0xFF)


def test_resources_are_those_of_the_kernel_that_is_asked_for(source: Path) -> None:
    done = compiled(step(source), "sm_80")
    first, second = done.resources("first"), done.resources("second")
    assert (first.shared, second.shared) == (0, 64 * 4)
    assert 0 < first.registers < 32
    assert done.warnings == ""
    with pytest.raises(KeyError, match="third"):
        done.resources("third")
    source.write_text(SOURCE + 'extern "C" __global__ void third(int* y) { int unused; y[0] = 1; }\n')
    assert '"unused" was declared but never referenced' in compiled(step(source), "sm_80").warnings


def test_spills_are_counted(source: Path) -> None:
    """64 values that are all needed until the last do not fit the 32 registers that 2,048 threads leave each."""
    loops = "for (int i = 0; i < 64; ++i) v[i] = y[i * 7]; __syncthreads(); for (int i = 0; i < 64; ++i) y[i] = v[i] * v[63 - i];"
    source.write_text(f'extern "C" __global__ void __launch_bounds__(1024, 2) first(float* y) {{ float v[64]; {loops} }}')
    assert compiled(step(source), "sm_80").resources("first").spilled > 0


def test_what_ptxas_gave_up_is_a_warning(source: Path) -> None:
    """A sum that is changed while a product may still add to it: the products can no longer follow one another."""
    sums = ", ".join(f"%{i}" for i in range(8))
    product = f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {{{sums}}}, %8, %8, 1, 1, 1, 0, 0;"
    held = ", ".join(f'"+f"(d[{i}])' for i in range(8))
    steps = "".join(
        f"""asm volatile("wgmma.fence.sync.aligned;\\n{product}\\nwgmma.commit_group.sync.aligned;" : {held} : "l"(x)); d[{i}] += 1;\n"""
        for i in range(4)
    )
    wait = """asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); for (int i = 0; i < 8; ++i) y[i] = d[i];"""
    source.write_text(f'extern "C" __global__ void first(float* y, unsigned long long x) {{ float d[8] = {{}}; {steps} {wait} }}')
    assert "(C7" in compiled(step(source), "sm_90a").warnings


def test_what_does_not_compile_is_told_with_the_log(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match=r'does not compile for sm_80 with no defines(.|\n)*identifier "STEP" is undefined'):
        cubin_of(Variant(str(source), "first"), "sm_80")
    assert capsys.readouterr().err == "gptq_fn: compiling steps.cu for sm_80 ... failed\n"
    assert kept() == set()
    for arch in ("sm_31", "compute_80", "sm_90b", ""):
        with pytest.raises(ValueError, match=r"no architecture that NVRTC 1\d\.\d+ knows. It knows sm_75, sm_80"):
            cubin_of(step(source), arch)


# The cache


def test_one_compilation_serves_all_later_calls(source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    variant = step(source)
    cubin = cubin_of(variant, "sm_80")
    assert cubin == compiled(variant, "sm_80").cubin
    assert capsys.readouterr().err.startswith("gptq_fn: compiling steps.cu for sm_80 ... 0.")
    assert kept() == {file_name(variant, "sm_80")}
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "compiled", lambda *_: pytest.fail("compiled again"))
        assert cubin_of(variant, "sm_80") == cubin
        assert cubin_of(Variant(str(source), "second", variant.defines), "sm_80") == cubin  # it holds all kernels of the source
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", ["source", "header", "define", "arch", "compiler"])
def test_what_a_cubin_is_made_of_makes_its_name(change: str, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, arch, value = file_name(step(source), "sm_80"), "sm_80", 1
    assert file_name(step(source), "sm_80") == before
    if change == "source":
        source.write_text(SOURCE + "\n")
    elif change == "header":
        (source.parent / "steps.cuh").write_text("constexpr float two = 3;\n")
    elif change == "define":
        value = 2
    elif change == "arch":
        arch = "sm_86"
    else:
        monkeypatch.setattr(compiler, "nvrtc_version", lambda: (12, 9))
    assert file_name(step(source, value), arch) != before


def test_a_changed_define_is_compiled_and_both_are_kept(source: Path) -> None:
    assert cubin_of(step(source, 1), "sm_80") != cubin_of(step(source, 3), "sm_80")
    assert len(kept()) == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:100] + b"x" + b[101:]])
def test_a_damaged_cubin_is_compiled_again(damage, source: Path) -> None:
    cubin, path = cubin_of(step(source), "sm_80"), cache_directory() / file_name(step(source), "sm_80")
    path.write_bytes(damage(path.read_bytes()))
    assert read(path) is None
    assert cubin_of(step(source), "sm_80") == cubin
    assert read(path) == cubin


def test_processes_that_want_the_same_compile_it_once(source: Path) -> None:
    """They start together; whoever comes second finds the first at work, for it is made to take its time."""
    program = f"""
import time
from pathlib import Path
from gptq_fn_kernels.cuda import compile as compiler
slowly = compiler.compiled
compiler.compiled = lambda *of: (time.sleep(1), slowly(*of))[1]
while not Path({str(source.parent / "go")!r}).exists(): time.sleep(.01)
print(len(compiler.cubin_of(compiler.Variant({str(source)!r}, "first", (("STEP", 1),)), "sm_80")))
"""
    command = [sys.executable, "-c", program]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    time.sleep(0.5)
    (source.parent / "go").touch()
    said = [process.communicate(timeout=60) for process in started]
    assert {out for out, _ in said} == {f"{len(cubin_of(step(source), 'sm_80'))}\n"}
    assert sum("compiling" in err for _, err in said) == 1
    assert kept() == {file_name(step(source), "sm_80")}


def test_a_cache_that_cannot_be_written_is_done_without(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source.parent / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(source.parent / "file"))  # nobody, not even root, makes directories in a file
    with pytest.warns(UserWarning, match=r"is not kept, for the cache cannot be written: .*Not a directory.*XDG_CACHE_HOME"):
        assert cubin_of(step(source), "sm_80") == compiled(step(source), "sm_80").cubin


def test_nothing_half_written_is_left(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.warns(UserWarning, match="full"):
        cubin_of(step(source), "sm_80")
    assert kept() == set()


def test_cubins_built_before_come_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever compiled them, and those of the same generation's older GPUs, too; a damaged one is passed over."""
    ready, variant = tmp_path / "ready", step(source)
    monkeypatch.setenv("GPTQ_FN_CUBINS", str(ready))
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "nvrtc_version", lambda: (12, 9))
        names = {arch: file_name(variant, arch) for arch in ("sm_80", "sm_86", "sm_90a")}
    for arch, name in names.items():
        write(ready / name, arch.encode())
    monkeypatch.setattr(compiler, "_nvrtc", lambda: pytest.fail("no compiler is needed"))
    assert [cubin_of(variant, arch) for arch in ("sm_80", "sm_86", "sm_89", "sm_90a")] == [b"sm_80", b"sm_86", b"sm_86", b"sm_90a"]
    (ready / names["sm_86"]).write_bytes(b"sm_86")
    assert cubin_of(variant, "sm_89") == b"sm_80"
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("GPTQ_FN_CUBINS", str(ready))
    assert cubin_of(variant, "sm_90").startswith(b"\x7fELF")  # 9.0a's own instructions are no part of 9.0
    assert {path.name for path in ready.iterdir()} == set(names.values())


# Whether the tier is there


def test_the_tier_tells_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTQ_FN_CUDA", raising=False)
    assert machine.unavailable() is None
    monkeypatch.setenv("GPTQ_FN_CUDA", "1")
    assert machine.unavailable() is None
    monkeypatch.setenv("GPTQ_FN_CUDA", "0")
    assert machine.unavailable() == "is left out, for the environment has GPTQ_FN_CUDA=0"
    monkeypatch.delenv("GPTQ_FN_CUDA")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert machine.unavailable() == "runs on NVIDIA's GPUs, not on AMD's"


@pytest.mark.parametrize("absent", ["cuda.pathfinder", "cuda.bindings.nvrtc"])
def test_without_the_bindings_the_tier_says_what_to_install(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, absent, None)
    assert compiler.missing.__wrapped__() == "needs cuda-bindings, which is not installed: pip install 'gptq-fn[cuda]'"
    monkeypatch.setattr(machine, "missing", compiler.missing.__wrapped__)
    monkeypatch.delenv("GPTQ_FN_CUDA", raising=False)
    monkeypatch.delenv("GPTQ_FN_CUBINS", raising=False)
    assert machine.unavailable() == compiler.missing.__wrapped__()
    monkeypatch.setenv("GPTQ_FN_CUBINS", "/somewhere")  # where all is built, nothing compiles
    assert machine.unavailable() is None


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120")])
def test_hopper_is_compiled_for_with_its_own_instructions(capability: tuple[int, int], arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert machine.arch_of(torch.device("cuda", 0)) == arch


def test_without_nvrtc_the_tier_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda import pathfinder

    def nowhere(name: str) -> None:
        raise pathfinder.DynamicLibNotFoundError(name)

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", nowhere)
    assert compiler.missing.__wrapped__() == "needs NVRTC, which is not installed: pip install 'gptq-fn[cuda]'"
    monkeypatch.setattr(compiler, "missing", compiler.missing.__wrapped__)
    with pytest.raises(ModuleNotFoundError, match="needs NVRTC, which is not installed"):
        compiler._nvrtc.__wrapped__()


# The command


@pytest.fixture
def two_variants(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Kernels for 4 bits: one for Ampere and later, two for Hopper, none for Turing."""
    one, another = step(source, 1), step(source, 2)

    def few(arch: str, bits: int, *_: object) -> tuple[Variant, ...]:
        return () if bits != 4 or arch == "sm_75" else (one, another) if arch == "sm_90a" else (one,)

    monkeypatch.setattr("gptq_fn_kernels.cuda.variants.variants", few)
    return source


def test_build_compiles_what_is_not_there(two_variants: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "image"
    main(["kernels", "build", "--arch", "sm_80,sm_90a", "--bits", "4", "8", "--out", str(directory)])
    assert f"3 cubins in {directory}, of which 0 were there." in capsys.readouterr().out
    assert len(list(directory.iterdir())) == 3
    assert not cache_directory().exists()
    assert read(directory / file_name(step(two_variants, 2), "sm_90a")) == compiled(step(two_variants, 2), "sm_90a").cubin
    main(["kernels", "build", "--arch", "sm_75,sm_86,sm_90a", "--out", str(directory)])
    said = capsys.readouterr()
    assert f"3 cubins in {directory}, of which 2 were there." in said.out
    assert "No CUDA kernel serves such a weight on sm_75." in said.err


def test_list_tells_the_backends_and_what_is_kept(
    two_variants: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["kernels", "build", "--arch", "sm_80,sm_90a"])
    main(["kernels", "build", "--arch", "sm_120", "--out", str(tmp_path / "ready")])
    (tmp_path / "ready" / "anothers.cubin").touch()
    monkeypatch.setenv("GPTQ_FN_CUBINS", str(tmp_path / "ready"))
    capsys.readouterr()
    main(["kernels", "list"])
    said = capsys.readouterr().out
    assert "reference" in said
    assert f"Compiled CUDA kernels in {tmp_path / 'ready'}: 1\n" in said
    assert f"Compiled CUDA kernels in {cache_directory()}: 3\n" in said
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.splitlines() if "steps" in line]
    assert [(source, arch, count) for source, arch, _, count, _ in rows] == [
        ("steps", "sm_120", "1"),
        ("steps", "sm_80", "1"),
        ("steps", "sm_90a", "2"),
    ]
    size = sum(path.stat().st_size for path in cache_directory().glob("*sm_90a*"))
    assert rows[2][4] == f"{size / 1e6:.2f}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--arch", "sm_80,sm_31"], "'sm_31' is no architecture that NVRTC"),
        (["--arch", "sm_90a,sm_31"], "'sm_31' is no architecture that NVRTC"),
        (["--arch", "sm_75,sm_80", "--bits", "3"], "No CUDA kernel serves such a weight on sm_75 or sm_80."),
    ],
)
def test_build_refuses_before_it_compiles(args: list[str], said: str, two_variants: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["kernels", "build", *args])
    assert stopped.value.code == 1
    assert said in " ".join(capsys.readouterr().err.split())
    assert not cache_directory().exists()


def test_build_without_a_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compiler, "missing", lambda: "needs NVRTC, which is not installed: pip install it")
    with pytest.raises(SystemExit):
        main(["kernels", "build", "--arch", "sm_80"])
    assert "Building kernels needs NVRTC, which is not installed" in capsys.readouterr().err
