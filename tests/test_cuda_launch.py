"""What the driver is asked for when a kernel is loaded and launched, seen by a stand-in; on a GPU, what the kernel then does."""

import ctypes
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gptq_fn_kernels.cuda import launch
from gptq_fn_kernels.cuda.compile import Variant, cubin_of
from gptq_fn_kernels.cuda.launch import Kernel, Launch, TensorMap, capture_of, load, load_cubin
from gptq_fn_kernels.cuda.machine import arch_of

FUNCTION, CONTEXT = 0x7F00_0000_6000, 0x7F00_0000_7000


class Driver:
    """Notes what it is asked; a name in `failing` is answered with its error, as often as told."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.failing: dict[str, list[int]] = {}

    def __getattr__(self, name: str) -> Callable[..., int]:
        def ask(*arguments: Any) -> int:
            told = getattr(type(self), f"_{name}", lambda *_: None)(self, *arguments)
            self.asked.append((name, told))
            return self.failing[name].pop(0) if self.failing.get(name) else 0

        return ask

    def _cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index
        return index

    def _cuDevicePrimaryCtxRetain(self, context: Any, handle: Any) -> int:
        context._obj.value = CONTEXT
        return handle.value

    def _cuCtxPushCurrent_v2(self, context: Any) -> int:
        return context.value

    def _cuThreadExchangeStreamCaptureMode(self, mode: Any) -> int:
        asked, mode._obj.value = mode._obj.value, 0
        return asked

    def _cuModuleLoadData(self, module: Any, cubin: bytes) -> bytes:
        module._obj.value = 5
        return cubin

    def _cuModuleGetFunction(self, function: Any, module: Any, name: bytes) -> bytes:
        function._obj.value = FUNCTION
        return name

    def _cuFuncSetAttribute(self, function: Any, attribute: int, value: int) -> tuple[int, int, int]:
        return function.value, attribute, value

    def _cuGetErrorName(self, status: int, name: Any) -> None:
        name._obj.value = b"CUDA_ERROR_NO"

    def _cuLaunchKernelEx(self, config: Any, function: Any, parameters: Any, extra: Any) -> SimpleNamespace:
        """Read as C reads it: CUlaunchConfig of 56 bytes, CUlaunchAttribute of 72, parameters from where the pointers point."""
        sizes = struct.unpack_from("7I4xQQI4x", ctypes.string_at(ctypes.addressof(config._obj), 56))
        attributes = [ctypes.string_at(sizes[8] + 72 * i, 72) for i in range(sizes[9])]
        kinds = {struct.unpack_from("I", each)[0]: struct.unpack_from("8x3I", each) for each in attributes}
        values = [ctypes.string_at(place, 8) for place in parameters]
        grid, block, shared, stream = sizes[:3], sizes[3:6], sizes[6], sizes[7]
        return SimpleNamespace(
            grid=grid, block=block, shared=shared, stream=stream, kinds=kinds, function=function.value, values=values, extra=extra
        )

    def _cuTensorMapEncodeTiled(self, place: Any, *rest: Any) -> tuple[Any, ...]:
        ctypes.memset(place.value, 1, 128)
        return (place.value, *(list(x) if isinstance(x, ctypes.Array) else getattr(x, "value", x) for x in rest))

    def _cuStreamGetCaptureInfo_v2(self, stream: Any, status: Any, number: Any, *rest: None) -> int:
        status._obj.value, number._obj.value = stream.value & 1, 77  # odd streams are captured
        return stream.value

    def last(self, name: str) -> Any:
        return [told for asked, told in self.asked if asked == name][-1]

    def names(self) -> list[str]:
        return [name for name, _ in self.asked]


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    stand_in = Driver()
    monkeypatch.setattr(launch, "driver", lambda: stand_in)
    return stand_in


@pytest.fixture
def kernel(driver: Driver) -> Kernel:
    return load_cubin(b"\x7fELF\0cubin", "multiply", 1, 200_000)


def test_a_kernel_is_loaded_on_its_device_even_while_a_graph_is_captured(driver: Driver, kernel: Kernel) -> None:
    assert driver.asked == [
        ("cuDeviceGet", 1),
        ("cuDevicePrimaryCtxRetain", 1),
        ("cuCtxPushCurrent_v2", CONTEXT),
        ("cuThreadExchangeStreamCaptureMode", 2),  # relaxed
        ("cuModuleLoadData", b"\x7fELF\0cubin"),
        ("cuModuleGetFunction", b"multiply"),
        ("cuFuncSetAttribute", (FUNCTION, 8, 200_000)),
        ("cuThreadExchangeStreamCaptureMode", 0),  # what it was before
        ("cuCtxPopCurrent_v2", None),
    ]
    assert (kernel.name, kernel.function.value, kernel.shared) == ("multiply", FUNCTION, 200_000)


@pytest.mark.parametrize("failing", ["cuDeviceGet", "cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"])
def test_what_cannot_be_loaded_is_told_and_the_thread_left_as_it_was(failing: str, driver: Driver) -> None:
    driver.failing[failing] = [1]
    with pytest.raises(RuntimeError, match=r"^CUDA: .*: CUDA_ERROR_NO \(1\)\.$"):
        load_cubin(b"cubin", "multiply", 0, 10**6)
    names = driver.names()
    assert names.count("cuCtxPushCurrent_v2") == names.count("cuCtxPopCurrent_v2")
    assert names.count("cuThreadExchangeStreamCaptureMode") in (0, 2)


def test_a_launch_hands_over_what_it_was_made_with_and_its_arguments(driver: Driver, kernel: Kernel) -> None:
    ready = Launch(kernel, (132, 2), (384,), 3, cluster=(2,), overlap=True)
    for stream, arguments in ((0, (0x7F12_3456_7890, 1, -5)), (0x5555_5000, (0, 2**31 - 1, 7))):
        ready(stream, *arguments)
        told = driver.last("cuLaunchKernelEx")
        assert (told.grid, told.block, told.shared, told.stream) == ((132, 2, 1), (384, 1, 1), 200_000, stream)
        assert told.kinds == {4: (2, 1, 1), 6: (1, 0, 0)}  # the cluster's dimensions; launched before the one before has ended
        assert (told.function, told.extra) == (FUNCTION, None)
        pointer, *numbers = told.values
        assert struct.unpack("Q", pointer) == arguments[:1]
        assert [struct.unpack_from("i", number)[0] for number in numbers] == list(arguments[1:])


@pytest.mark.parametrize(("options", "kinds"), [({}, {}), ({"cluster": (4, 1, 1)}, {4: (4, 1, 1)}), ({"overlap": True}, {6: (1, 0, 0)})])
def test_attributes_are_told_where_they_are_wanted(options: dict[str, Any], kinds: dict[int, Any], driver: Driver, kernel: Kernel) -> None:
    Launch(kernel, (1,), (32,), 0, **options)(0)
    assert driver.last("cuLaunchKernelEx").kinds == kinds


def test_as_many_arguments_as_agreed(kernel: Kernel) -> None:
    ready = Launch(kernel, (1,), (32,), 2)
    for arguments in ((1,), (1, 2, 3)):
        with pytest.raises(struct.error):
            ready(0, *arguments)
    ready(0, 1, 2)  # nothing is locked


@pytest.mark.parametrize("status", [201, 400])
def test_a_thread_without_the_context_gets_it(status: int, driver: Driver, kernel: Kernel) -> None:
    ready = Launch(kernel, (1,), (32,), 0)
    driver.asked.clear()
    driver.failing["cuLaunchKernelEx"] = [status]
    ready(0)
    assert driver.names() == ["cuLaunchKernelEx", "cuCtxPushCurrent_v2", "cuLaunchKernelEx", "cuCtxPopCurrent_v2"]
    driver.failing["cuLaunchKernelEx"] = [status, status]
    with pytest.raises(RuntimeError, match="multiply cannot be launched: CUDA_ERROR_NO"):
        ready(0)


def test_a_refused_launch_is_told(driver: Driver, kernel: Kernel) -> None:
    ready = Launch(kernel, (1,), (2048,), 0)
    driver.failing["cuLaunchKernelEx"] = [1]
    with pytest.raises(RuntimeError, match=r"CUDA: multiply cannot be launched: CUDA_ERROR_NO \(1\)"):
        ready(0)
    ready(0)


def test_threads_do_not_mix_their_arguments(driver: Driver, kernel: Kernel) -> None:
    ready = Launch(kernel, (1,), (32,), 8)

    def work(of: int) -> None:
        for _ in range(300):
            ready(of, *[of] * 8)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    told = [what for name, what in driver.asked if name == "cuLaunchKernelEx"]
    assert len(told) == 1200
    assert all({struct.unpack("q", value)[0] for value in each.values} == {each.stream} for each in told)


def test_a_tensor_map_is_made_where_its_tensor_is_another(driver: Driver, kernel: Kernel) -> None:
    described = TensorMap(torch.bfloat16, (3, 4096), (8192,), (64, 32), swizzle=64)
    ready = Launch(kernel, (1,), (32,), 2, maps={1: described})
    ready(0, 7, 0x1000)
    place, kind, axes, address, sizes, strides, box, steps, *rest = driver.last("cuTensorMapEncodeTiled")
    assert (place, kind, axes, address) == (described.place_of(0x1000), 9, 2, 0x1000)
    assert place % 64 == 0
    assert (sizes, strides, box, steps) == ([4096, 3], [8192], [32, 64], [1, 1])  # CUDA counts from the innermost
    assert rest == [0, 2, 2, 0]
    values = driver.last("cuLaunchKernelEx").values
    assert values == [struct.pack("q", 7), b"\1" * 8]  # the map itself
    ready(0, 7, 0x1000)
    assert driver.names().count("cuTensorMapEncodeTiled") == 1
    for address in (0x2000, 0x1000, 0x2000):  # tensors that come again find theirs
        ready(0, 7, address)
        assert driver.names().count("cuTensorMapEncodeTiled") == 2
    assert driver.last("cuTensorMapEncodeTiled")[3] == 0x2000
    for address in range(0x3000, 0x3000 + 16 * 40, 16):  # few are kept
        ready(0, 7, address)
    ready(0, 7, 0x1000)
    assert driver.names().count("cuTensorMapEncodeTiled") == 43
    driver.failing["cuTensorMapEncodeTiled"] = [1, 1]
    for _ in range(2):  # a map that was refused is not taken for made
        with pytest.raises(RuntimeError, match="a tensor map cannot be made"):
            ready(0, 7, 0x3001)


def test_a_capture_has_a_number(driver: Driver) -> None:
    assert [capture_of(stream) for stream in (0x10, 0x11)] == [0, 77]
    driver.failing["cuStreamGetCaptureInfo_v2"] = [1]
    with pytest.raises(RuntimeError, match="does not tell whether it is captured"):
        capture_of(0x10)


def test_without_a_driver_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open")

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(RuntimeError, match=r"NVIDIA's driver is not installed: libcuda.so.1: cannot open"):
        launch.driver.__wrapped__()


# On a GPU

SOURCE = """
struct alignas(64) TensorMap { unsigned long long opaque[16]; };
extern "C" __global__ void add(float* y, const float* x, int n, int times) {
    extern __shared__ float part[];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    part[threadIdx.x] = i < n ? x[i] : 0;
    if (i < n) y[i] += part[threadIdx.x] * times;
}
extern "C" __global__ void box(const __grid_constant__ TensorMap map, float* y, int row, int column) {
#if __CUDA_ARCH__ >= 900
    __shared__ alignas(128) float found[8 * 32];
    __shared__ alignas(8) unsigned long long barrier;
    unsigned b = (unsigned)__cvta_generic_to_shared(&barrier), to = (unsigned)__cvta_generic_to_shared(found);
    if (threadIdx.x == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;\\nfence.proxy.async.shared::cta;" ::"r"(b) : "memory");
        asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], 1024;" ::"r"(b) : "memory");
        asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
                     ::"r"(to), "l"(&map), "r"(column), "r"(row), "r"(b) : "memory");
    }
    __syncthreads();
    asm volatile("{\\n.reg .pred done;\\nagain:\\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\\n"
                 "@done bra over;\\nbra again;\\nover:\\n}" ::"r"(b) : "memory");
    y[threadIdx.x] = found[threadIdx.x];
#endif
}
"""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "add.cu").write_text(SOURCE)
    return tmp_path / "add.cu"


def stream() -> int:
    return torch.cuda.current_stream().cuda_stream


@pytest.mark.gpu
def test_a_kernel_runs_on_the_current_stream_and_in_a_graph(source: Path) -> None:
    device, n = torch.device("cuda"), 1000
    arch, x, y = arch_of(device), torch.randn(n, device="cuda"), torch.zeros(n, device="cuda")
    hopper = torch.cuda.get_device_capability() >= (9, 0)
    added = load(Variant(str(source), "add"), arch, 0, 60_000)
    for options in ({}, {"overlap": hopper}, {"cluster": (2,) if hopper else None}):
        with torch.cuda.stream(torch.cuda.Stream()):
            y.zero_()
            Launch(added, (4,), (256,), 4, **options)(stream(), y.data_ptr(), x.data_ptr(), n, -3)
        torch.cuda.synchronize()
        assert torch.equal(y, -3 * x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # compiled and loaded while it is captured
        again = load_cubin(cubin_of(Variant(str(source), "add", (("OTHER", 1),)), arch), "add", 0, 1024)
        Launch(again, (4,), (256,), 4, overlap=hopper)(stream(), y.data_ptr(), x.data_ptr(), n, 5)
    y.zero_()
    graph.replay()
    graph.replay()
    torch.testing.assert_close(y, 10 * x)


@pytest.mark.gpu
def test_a_thread_that_never_used_the_device_launches(source: Path) -> None:
    x, y = torch.randn(256, device="cuda"), torch.zeros(256, device="cuda")
    ready = Launch(load(Variant(str(source), "add"), arch_of(torch.device("cuda")), 0, 1024), (1,), (256,), 4)
    arguments = (y.data_ptr(), x.data_ptr(), 256, 2)
    torch.cuda.synchronize()
    thread = threading.Thread(target=lambda: ready(0, *arguments))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(y, 2 * x)


@pytest.mark.gpu
def test_refusals_of_the_real_driver_are_sentences(source: Path) -> None:
    variant, arch = Variant(str(source), "add"), arch_of(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="cannot have 1000000 bytes of shared memory: CUDA_ERROR_INVALID_VALUE"):
        load(variant, arch, 0, 10**6)
    with pytest.raises(RuntimeError, match="add cannot be launched: CUDA_ERROR_INVALID_VALUE"):
        Launch(load(variant, arch, 0, 1024), (1,), (2048,), 4)(stream(), 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match="there is no kernel subtract: CUDA_ERROR_NOT_FOUND"):
        load_cubin(cubin_of(variant, arch), "subtract", 0, 0)
    with pytest.raises(RuntimeError, match="cannot be loaded on device 0: CUDA_ERROR"):
        load_cubin(b"\x7fELF", "add", 0, 0)


@pytest.mark.gpu
def test_a_tensor_map_follows_its_tensor(source: Path) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor maps are Hopper's")
    tensors, found = [torch.randn(64, 128, device="cuda") for _ in range(2)], torch.empty(8, 32, device="cuda")
    described = TensorMap(torch.float32, (64, 128), (512,), (8, 32))
    ready = Launch(load(Variant(str(source), "box"), arch_of(torch.device("cuda")), 0, 0), (1,), (256,), 4, maps={0: described})
    for x in (*tensors, tensors[0]):
        ready(stream(), x.data_ptr(), found.data_ptr(), 60, 64)
        assert torch.equal(found[:4], x[60:, 64:96])
        assert not found[4:].any()
