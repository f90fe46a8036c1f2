"""A layer holds its codes once, in the kernel's layout where that tells them again, and nobody notices."""

import copy
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gptq_fn_interop.qlinear import QuantLinear
from gptq_fn_kernels import BACKENDS
from gptq_writer import Scheme, quantization_config, random_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

SHAPE = (96, 64)
SCHEMES = (Scheme(), Scheme(3, sym=False, desc_act=True), Scheme(8, 32, zeros="v1"))
X = torch.randn(3, SHAPE[0], generator=torch.Generator().manual_seed(0))


def tensors_of(scheme: Scheme, seed: int) -> dict[str, torch.Tensor]:
    linear = random_linear(np.random.default_rng(seed), *SHAPE, scheme)
    return {**{name: tensor.clone() for name, tensor in linear.tensors.items()}, "bias": torch.linspace(-1, 1, SHAPE[1])}


def layer_of(scheme: Scheme, tensors: dict[str, torch.Tensor]) -> QuantLinear:
    return QuantLinear({name: tensor.clone() for name, tensor in tensors.items()}, scheme.bits, quantization_config(scheme))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_codes_are_let_go(scheme: Scheme) -> None:
    layer = layer_of(scheme, tensors_of(scheme, 0))
    kept = weakref.ref(layer.qweight)
    layer(X)
    gc.collect()
    assert kept() is None
    assert layer._buffers["qweight"].numel() == 0
    first = weakref.ref(layer._derived.prepared[torch.float32].form.words)
    layer.bfloat16()
    gc.collect()
    assert first() is None


def test_the_reference_keeps_them() -> None:
    layer = layer_of(SCHEMES[0], tensors_of(SCHEMES[0], 0))
    layer(X.double())
    assert layer._buffers["qweight"].numel() > 0


def multiplies(dtype: torch.dtype) -> Callable[[QuantLinear, dict, Scheme], QuantLinear]:
    def act(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
        layer(X.to(dtype))
        return layer

    return act


def trains(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    layer(X.clone().requires_grad_()).sum().backward()
    return layer


def is_cast(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    for name in ("scales", "bias"):
        state[name] = state[name].bfloat16()
    return layer.bfloat16()


def takes_other_scales(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    state["scales"] = state["scales"] * 2
    layer.scales = nn.Parameter(state["scales"].clone(), requires_grad=False)
    return layer


def finds_other_zeros(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    """As offloading hooks put them there."""
    state["qzeros"] = tensors_of(scheme, 7)["qzeros"]
    layer._buffers["qzeros"] = state["qzeros"].clone()
    return layer


def loads(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    for name, tensor in tensors_of(scheme, 8).items():
        state[name] = tensor.to(state[name].dtype)
    layer.load_state_dict(state)
    return layer


def is_asked_otherwise(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    layer.backend = "reference" if layer.backend is None else None
    return layer


def is_copied(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    return copy.deepcopy(layer)


def is_pickled(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def stays(layer: QuantLinear, state: dict, scheme: Scheme) -> QuantLinear:
    return layer.to("cpu")


ACTS: tuple[Callable[..., QuantLinear], ...] = (
    *map(multiplies, (torch.float32, torch.bfloat16, torch.float64)),
    *(trains, is_cast, takes_other_scales, finds_other_zeros, loads, is_asked_otherwise, is_copied, is_pickled, stays),
)


@settings(max_examples=40)
@given(st.sampled_from(SCHEMES), st.lists(st.sampled_from(ACTS), max_size=6))
def test_whatever_is_done_to_it(scheme: Scheme, acts: list[Callable[..., Any]]) -> None:
    state = tensors_of(scheme, 0)
    layer = layer_of(scheme, state)
    layer(X)
    for act in acts:
        layer = act(layer, state, scheme)
        found = layer.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in state.items())
        assert torch.equal(layer.qweight, state["qweight"])
        fresh = layer_of(scheme, state)
        fresh.backend = layer.backend
        assert torch.equal(layer.weight, fresh.weight)
        assert torch.equal(layer(X), fresh(X))


def test_buffers_of_another_layer_are_not_its_codes() -> None:
    """Its state dict has them."""
    layer, other = (layer_of(SCHEMES[0], tensors_of(SCHEMES[0], seed)) for seed in (0, 1))
    other(X)
    layer._buffers |= other._buffers
    with pytest.raises(ValueError, match=r"qweight is \(0,\) but must be \(12, 64\)"):
        layer(X)


def test_backends_that_tell_codes_have_a_gradient() -> None:
    assert all(backend.gradient for backend in BACKENDS if backend.restored)


def test_a_layer_that_has_multiplied_goes_into_ddp(tmp_path: Path) -> None:
    """It sends all buffers to the other processes, here to none."""
    layer = layer_of(SCHEMES[0], tensors_of(SCHEMES[0], 0))
    model = nn.Sequential(layer, nn.Linear(SHAPE[1], 4))
    expected = model(X)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'found'}", rank=0, world_size=1)
    try:
        assert torch.equal(nn.parallel.DistributedDataParallel(model)(X), expected)
    finally:
        torch.distributed.destroy_process_group()
