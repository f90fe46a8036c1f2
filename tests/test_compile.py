"""Layers in torch.compile, autocast, checkpointing and CUDA graphs: they compute what they compute eagerly, and wait for nothing."""

import copy
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from checkpoints import IDS, checkpoint, load
from gptq_fn_interop.experts import Experts
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_kernels import BACKENDS, Backend, problem_of
from gptq_writer import Scheme, quantization_config, random_linear
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as checkpointed
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts

USUAL, LARGER = Scheme(), Scheme(4, 128)
ODD = Scheme(3, sym=False, desc_act=True)
"""What only the most general backends serve."""


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(scheme: Scheme = USUAL, seed: int = 0, shape: tuple[int, int] = (64, 64), **kwargs: Any) -> QuantLinear:
    linear = random_linear(np.random.default_rng(seed), *shape, scheme)
    bias = torch.linspace(-1, 1, shape[1])
    return QuantLinear({**linear.tensors, "bias": bias}, scheme.bits, quantization_config(scheme), **kwargs)


def activations(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def compiled(module: Any, backend: Any = "aot_eager", **kwargs: Any) -> Any:
    return torch.compile(module, backend=backend, fullgraph=True, **kwargs)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def gradient(f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    x = x.detach().requires_grad_()
    f(x).float().square().sum().backward()
    assert x.grad is not None
    return x.grad


# compiled layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_one_graph_before_its_first_forward(dtype: torch.dtype) -> None:
    for scheme in (USUAL, ODD):
        layer, x = layer_of(scheme), activations(2, 3, 64, dtype=dtype)
        f = compiled(layer)
        assert f(x).dtype == dtype
        torch.testing.assert_close(f(x), layer(x))
        torch.testing.assert_close(gradient(f, x), gradient(layer, x))
    explained = torch._dynamo.explain(layer_of())(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_layer_that_was_compiled_without_gradients_has_them_afterwards(mode: Callable[[], AbstractContextManager]) -> None:
    layer, x = layer_of(), activations(3, 64)
    with mode():
        found = compiled(layer)(x)
    torch.testing.assert_close(found, layer(x))
    torch.testing.assert_close(gradient(compiled(layer), x), gradient(layer_of(), x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_inductor_compiles_a_layer_and_its_gradient() -> None:
    layer, x = layer_of(Scheme(8), backend="reference"), activations(3, 64).requires_grad_()
    found, expected = compiled(layer, "inductor")(x), layer(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(y, x, torch.ones_like(y)) for y in (found, expected)))


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_no_dequantized_weight_is_kept_for_the_gradient(backend: str | None) -> None:
    layer, x, kept = layer_of(shape=(64, 32)), activations(3, 64).requires_grad_(), []
    f = compiled(layer, backend) if backend else layer
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(set(t.shape)), t)[1], lambda t: t):
        f(x).square().sum().backward()
    assert {64, 32} not in kept
    assert x.grad is not None


def test_a_graph_sees_new_tensors_however_they_come() -> None:
    other, x = layer_of(seed=1), activations(3, 64)
    expected = other(x)

    def by_loading(layer: QuantLinear) -> None:
        layer.load_state_dict(other.state_dict())

    def by_attributes(layer: QuantLinear) -> None:
        layer.scales, layer.qzeros, layer.g_idx, layer.qweight = other.scales, other.qzeros, other.g_idx, other.qweight

    def as_accelerate_does(layer: QuantLinear) -> None:
        layer._buffers |= {name: getattr(other, name) for name in other._buffers}
        layer._parameters |= other._parameters

    for change in (by_loading, by_attributes, as_accelerate_does):
        torch._dynamo.reset()
        layer = layer_of()
        f = compiled(layer, "eager")
        assert not torch.allclose(f(x), expected)
        change(layer)
        torch.testing.assert_close(f(x), expected)
        torch.testing.assert_close(layer(x), expected)
        layer.scales = nn.Parameter(layer.scales.detach() * 2, requires_grad=False)
        torch.testing.assert_close(f(x), layer(x))
        assert not torch.allclose(f(x), expected)
        layer.bfloat16()
        torch.testing.assert_close(f(x), layer(x))


def test_equal_layers_share_a_graph() -> None:
    """Also where more of them are compiled one by one than Dynamo would compile anew."""
    layers, x, graphs = [layer_of(seed=seed) for seed in range(10)], activations(3, 64), CompileCounter()
    expected = [layer(x) for layer in layers]
    for layer in layers:
        layer.compile(backend=graphs, fullgraph=True)
    for layer, y in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(x), y)
    assert graphs.frame_count == 1


def test_a_copy_of_a_compiled_layer_is_a_layer_of_its_own() -> None:
    f, x = compiled(layer_of()), activations(3, 64)
    expected = f(x)
    other = copy.deepcopy(f)
    assert other._orig_mod._derived is None
    torch.testing.assert_close(other(x), expected)


def test_offloaded_layers_can_be_compiled() -> None:
    model, x = nn.Sequential(layer_of(), nn.ReLU()), activations(3, 64)
    expected = model(x)
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    f = torch.compile(model, backend="eager")  # accelerate's hooks are not traced
    for _ in range(2):
        torch.testing.assert_close(f(x), expected)


# compiled models


def test_a_quantized_model_is_one_graph_before_its_first_forward(tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "llama", Scheme()).directory)
    del model.model.layers[1]
    with torch.no_grad():
        found = compiled(model, "eager")(IDS).logits
        torch.testing.assert_close(found, model(IDS).logits)


def test_experts_are_one_graph_and_ask_no_values() -> None:
    config = MixtralConfig(hidden_size=64, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2)
    shapes = {"w1": (64, 32), "w3": (64, 32), "w2": (32, 64)}
    linears = {n: {name: layer_of(seed=8 * n + i, shape=shape) for i, (name, shape) in enumerate(shapes.items())} for n in range(3)}
    experts, x = Experts(MixtralExperts(config), linears), activations(5, 64)
    index, weights = torch.tensor([[0, 1], [1, 0], [0, 3], [1, 0], [0, 1]]), activations(5, 2).softmax(-1)  # 3 stands for no expert
    linears[2]["w2"].bias.data.fill_(torch.inf)  # no token asks this one
    expected = experts(x, index, weights)
    assert expected.isfinite().all()
    torch.testing.assert_close(compiled(experts, "eager")(x, index, weights), expected)


# what training and generation ask of a layer


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_autocast_does_to_it_what_it_does_to_a_linear(dtype: torch.dtype, backend: str | None) -> None:
    layer, x, dense = layer_of(), activations(3, 64, dtype=dtype), nn.Linear(64, 64)
    dense.load_state_dict({"weight": layer.weight.clone().float(), "bias": layer.bias.detach()})
    f = compiled(layer, backend) if backend else layer
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = f(x), dense(x)
        grads = gradient(f, x), gradient(dense, x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert grads[0].dtype == grads[1].dtype == dtype
    assert relative(*grads) < 0.02
    assert layer(x).dtype == dtype


def test_autocast_leaves_float64_alone() -> None:
    layer, x = layer_of(), activations(3, 64, dtype=torch.float64)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)


def test_activations_can_be_computed_again() -> None:
    layer, x = layer_of(), activations(3, 64)
    expected = gradient(layer, x)
    for reentrant in (False, True):
        torch.testing.assert_close(gradient(lambda x, how=reentrant: checkpointed(layer, x, use_reentrant=how), x), expected)


def test_moving_to_where_it_is_keeps_what_was_prepared() -> None:
    """A captured CUDA graph reads it."""
    layer, x = layer_of().half(), activations(3, 64)
    layer(x)
    derived = layer._derived
    assert derived is not None
    assert layer.to("cpu").half().eval().requires_grad_(False)._derived is derived
    assert layer.double()._derived is None


class NoValues(TorchDispatchMode):
    """Refuses operations whose result's shape, or whose caller's way, depends on values: a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.name() not in {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal"}, func
        return func(*args, **(kwargs or {}))


def serving(layer: QuantLinear, dtype: torch.dtype) -> list[Backend]:
    problem = problem_of(layer.packed, dtype)
    return [backend for backend in BACKENDS if backend.unsupported(problem) is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", [USUAL, ODD], ids=["usual", "odd"])
def test_a_prepared_layer_reads_no_values(scheme: Scheme, dtype: torch.dtype) -> None:
    for backend in serving(layer_of(scheme), dtype):
        layer, x = layer_of(scheme, backend=backend.name), activations(3, 64, dtype=dtype)
        for mode in (torch.no_grad, torch.inference_mode, nullcontext):
            with mode():
                layer(x)
                with NoValues():
                    layer(x)
        with NoValues():
            gradient(layer, x)
    with NoValues(), pytest.raises(AssertionError, match=r"local_scalar|equal"):
        layer_of()(x)


def test_every_backend_compiles() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, layer = activations(3, 64, dtype=dtype), layer_of()
        for backend in serving(layer, dtype):
            layer.backend = backend.name
            torch.testing.assert_close(compiled(layer, "eager")(x), layer(x))
            torch.testing.assert_close(gradient(compiled(layer, "eager"), x), gradient(layer, x))
            derived = layer._derived
            assert derived is not None
            assert derived.prepared[dtype].backend is backend


def test_the_operator_of_the_gradient_is_described_as_it_behaves() -> None:
    packed = layer_of(ODD).packed
    tensors = packed.qweight, packed.zeros, packed.scales, packed.g_idx
    for grad in (activations(3, 64), activations(64), activations(2, 64, 3).mT, activations(0, 64)):
        torch.library.opcheck(torch.ops.gptq_fn.gradient.default, (grad, *tensors, 3))


# on a GPU

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def on_gpu(dtype: torch.dtype, seed: int = 0, device: str = "cuda", rows: int = 3) -> torch.Tensor:
    return activations(rows, 256, seed=seed, dtype=dtype).to(device)


def gpu_layer(scheme: Scheme = LARGER, seed: int = 0, device: str = "cuda") -> QuantLinear:
    return layer_of(scheme, seed, (256, 512)).to(device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("scheme", [LARGER, ODD], ids=["usual", "odd"])
def test_a_captured_graph_computes_new_inputs(scheme: Scheme, dtype: torch.dtype) -> None:
    for rows in (1, 7, 64, 700):
        layer, x = gpu_layer(scheme), on_gpu(dtype, rows=rows)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), torch.no_grad():
            layer(x)  # prepares, and compiles kernels
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            y = layer(x)
        layer.to("cuda")  # is there already, so what the graph reads stays
        garbage = [torch.full((1 << 16,), torch.nan, device="cuda") for _ in range(64)]
        for seed in (1, 2):
            x.copy_(on_gpu(dtype, seed, rows=rows))
            y.fill_(torch.nan)
            graph.replay()
            with torch.no_grad():
                assert torch.equal(y, layer(x))
        del garbage


@pytest.mark.gpu
def test_a_prepared_layer_waits_for_nothing() -> None:
    for scheme in (LARGER, ODD):
        layer, x = gpu_layer(scheme), on_gpu(torch.float16).requires_grad_()

        def use(layer: QuantLinear = layer, x: torch.Tensor = x) -> None:
            layer(x).sum().backward()
            with torch.no_grad():
                layer(x)
            with torch.autocast("cuda", torch.bfloat16):
                layer(x).sum().backward()

        use()
        torch.cuda.set_sync_debug_mode("error")
        try:
            use()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_it_runs_on_the_current_stream() -> None:
    layer, reference = gpu_layer(), gpu_layer()
    x, later, busy = on_gpu(torch.float16), on_gpu(torch.float16, 1), torch.randn(8192, 8192, device="cuda", dtype=torch.float16)
    expected, expected_later = reference(x), reference(later)
    torch.cuda.synchronize()
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.stream(first):
        found = layer(x)  # prepares on this stream
    with torch.cuda.stream(second):
        found_too = layer(x)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
    assert torch.equal(found_too, expected)
    with torch.cuda.stream(second):
        for _ in range(20):
            busy = busy @ busy * 0  # on another stream the layer would not wait for this, and see the old x
        x.copy_(later)
        found = layer(x)
    torch.cuda.synchronize()
    assert torch.equal(found, expected_later)


@pytest.mark.gpu
def test_it_runs_on_the_device_of_its_tensors() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    layers = [gpu_layer(device=f"cuda:{i}") for i in range(2)]
    assert torch.cuda.current_device() == 0
    for dtype in FLOATS:
        found = [layer(on_gpu(dtype, device=f"cuda:{i}")) for i, layer in enumerate(layers)]
        assert [y.device.index for y in found] == [0, 1]
        torch.testing.assert_close(found[0].cpu(), found[1].cpu())
        grads = [gradient(layer, on_gpu(dtype, device=f"cuda:{i}")) for i, layer in enumerate(layers)]
        torch.testing.assert_close(grads[0].cpu(), grads[1].cpu())
    layer, x = layers[0], on_gpu(torch.float16)
    expected = layer(x).cpu()
    moved = layer.to("cuda:1")
    torch.testing.assert_close(moved(x.to("cuda:1")).cpu(), expected)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
def test_compiled_with_cuda_graphs_it_computes_the_same(dtype: torch.dtype) -> None:
    model = nn.Sequential(gpu_layer(), nn.SiLU(), layer_of(ODD, 1, (512, 256)).cuda())
    f = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    bound = 1e-4 if dtype == torch.float32 else 0.02
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for seed in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            x = on_gpu(dtype, seed)
            assert relative(f(x), model(x)) < bound
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert relative(gradient(f, x), gradient(model, x)) < bound


@pytest.mark.gpu
@pytest.mark.parametrize("who", ["transformers", "the user"])
def test_a_quantized_model_generates_the_same_compiled(who: str, tmp_path: Path) -> None:
    model = load(checkpoint(tmp_path, "llama", Scheme()).directory, device_map="cuda", dtype=torch.float16)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "return_dict_in_generate": True, "output_logits": True}
    eager = model.generate(IDS.cuda(), **options)
    if who == "the user":
        model.forward = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
        options["disable_compile"] = True  # it is compiled already
    # torch 2.11 gives the parts that it cuts a prompt's graph into wrong arguments, for models of floats, too.
    with torch._inductor.config.patch(graph_partition=False):
        found = model.generate(IDS.cuda(), cache_implementation="static", **options)
    for logits, expected in zip(found.logits[:2], eager.logits[:2], strict=True):  # of the prompt, and of a step
        assert relative(logits, expected) < 0.02
    assert found.sequences.shape == eager.sequences.shape
