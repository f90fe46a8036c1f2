"""The backends in order of preference, and the choice among them: a list to ask, not a ladder of conditions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from gptq_fn_kernels import reference
from gptq_fn_kernels.cpu import vectors
from gptq_fn_kernels.cuda import backend as cuda
from gptq_fn_kernels.cuda.weight import prepare as prepare_for_cuda
from gptq_fn_kernels.cuda.weight import restored as cuda_codes
from gptq_fn_kernels.problem import Packed, Problem, problem_of
from gptq_fn_kernels.triton import backend as triton
from gptq_fn_kernels.triton.weight import prepare as prepare_for_triton
from gptq_fn_kernels.triton.weight import restored as triton_codes


@dataclass(frozen=True)
class Backend:
    """One way to multiply. `form` below is whatever `prepare` returns: the weight in the backend's own layout."""

    name: str
    unsupported: Callable[[Problem], str | None]
    """None, or why this backend does not serve the problem, in words that follow its name ("packs 4 bits, not 3")."""
    prepare: Callable[[Packed], Any]
    """packed -> form, once for a weight."""
    matmul: Callable[[torch.Tensor, Any], torch.Tensor]
    """(x [..., k], form) -> [..., n], in x's dtype; gradients are not its concern."""
    gradient: Callable[[torch.Tensor, Any], torch.Tensor] | None = None
    """(grad [..., n], form) -> [..., k], what reaches x; None for the reference's, which unpacks the checkpoint's tensors."""
    restored: Callable[[Any], torch.Tensor] | None = None
    """form -> the qweight that it was made from, so that nobody has to keep both; only where `gradient` needs none either."""


BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", cuda.on_hopper, prepare_for_cuda, cuda.matmul, cuda.gradient, cuda_codes),
    Backend("triton", triton.unsupported, prepare_for_triton, triton.matmul, triton.gradient, triton_codes),
    Backend("multistage", cuda.elsewhere, prepare_for_cuda, cuda.matmul, cuda.gradient, cuda_codes),
    Backend("cpu_vectors", vectors.unsupported, vectors.prepare, vectors.matmul, vectors.gradient, vectors.restored),
    Backend("reference", reference.unsupported, reference.prepare, reference.matmul),
)
"""Every backend, the preferred one first; the reference serves what no other does."""


def explain(problem: Problem, backends: tuple[Backend, ...] = BACKENDS) -> dict[str, str | None]:
    """For each backend's name None, or the reason why it does not serve the problem."""
    return {backend.name: backend.unsupported(problem) for backend in backends}


def choose(problem: Problem, wanted: str | None = None, backends: tuple[Backend, ...] = BACKENDS) -> Backend:
    """The first backend that serves the problem, or the one called `wanted`.

    Raises ValueError with every backend's reason where `wanted` or all of them do not serve it.
    """
    reasons = explain(problem, backends)
    for backend in backends:
        if reasons[backend.name] is None and wanted in (None, backend.name):
            return backend
    if wanted is None:
        failure = f"No backend serves {problem}"
    elif wanted in reasons:
        failure = f"Backend {wanted!r} does not serve {problem}"
    else:
        failure = f"There is no backend {wanted!r}; for {problem} there are"
    told = "".join(f"\n  {name}: {reason or 'serves it'}" for name, reason in reasons.items())
    raise ValueError(f"{failure}:{told}")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A weight in the form of the backend that was chosen for it, for activations of one dtype."""

    backend: Backend
    packed: Packed
    """Its qweight may be on the meta device, where `form` is what has the codes: see `without_codes`."""
    form: Any
    k: int
    """The number of inputs; asked at each call, so it is at hand."""


def prepare(packed: Packed, dtype: torch.dtype, backend: str | None = None, backends: tuple[Backend, ...] = BACKENDS) -> Prepared:
    """The weight, prepared once for many multiplications with activations of `dtype`. Raises as `choose` does.

    It may be read on any stream. It is no inference tensor even where it is prepared in inference mode, so that a layer
    which has been tried there can be trained with, or compiled, afterwards.
    """
    with torch.inference_mode(False), torch.no_grad():
        chosen = choose(problem_of(packed, dtype), backend, backends)
        prepared = Prepared(chosen, packed, chosen.prepare(packed), packed.k)
    if packed.qweight.device.type != "cpu":
        torch.accelerator.current_stream(packed.qweight.device).synchronize()
    return prepared


def without_codes(prepared: Prepared) -> Prepared | None:
    """The same, whose `packed` has its qweight on the meta device, for `codes_of` makes it again; None where the backend needs it."""
    if prepared.backend.restored is None or prepared.backend.gradient is None:
        return None
    with torch.inference_mode(False):
        room = torch.empty_like(prepared.packed.qweight, device="meta")
    return replace(prepared, packed=replace(prepared.packed, qweight=room))


def codes_of(prepared: Prepared) -> torch.Tensor:
    """int32 [k * bits / 32, n]: the qweight that it was prepared from, kept or made anew, on the device of the form."""
    if not prepared.packed.qweight.is_meta:
        return prepared.packed.qweight
    assert prepared.backend.restored is not None
    with torch.inference_mode(False), torch.no_grad():
        return prepared.backend.restored(prepared.form)


def multiply(x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
    """x [..., k] -> x @ weight.T [..., n], differentiable in x whatever the backend. Raises ValueError for another width.

    It reads no values, so nothing here waits for a GPU; where no gradient is asked for, the backend is called directly.
    """
    if x.shape[-1] != prepared.k:
        raise ValueError(f"The activations have {x.shape[-1]} features, in shape {tuple(x.shape)}, but the weight has {prepared.k} inputs.")
    if x.requires_grad and torch.is_grad_enabled():
        # Rows in and rows out: an output that is a view could not be changed in place, as some adapters do.
        return _Multiply.apply(x.reshape(-1, prepared.k), prepared).reshape(*x.shape[:-1], prepared.packed.n)
    return prepared.backend.matmul(x, prepared.form)


def matmul(x: torch.Tensor, packed: Packed, backend: str | None = None, backends: tuple[Backend, ...] = BACKENDS) -> torch.Tensor:
    """x [..., k] -> x @ weight.T [..., n] in x's dtype, by the backend of this name or the first that serves it.

    Prepares the weight on each call; whoever multiplies with it again uses `prepare` and `multiply`.
    """
    return multiply(x, prepare(packed, x.dtype, backend, backends))


class _Multiply(torch.autograd.Function):
    """Any backend's matmul with its gradient, which dequantizes the weight anew and so keeps none alive.

    A `setup_context` would serve functorch too, but cost five times as much at each call: torch then inspects signatures.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, prepared: Prepared) -> torch.Tensor:
        ctx.prepared = prepared
        return prepared.backend.matmul(x, prepared.form)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        prepared = ctx.prepared
        if prepared.backend.gradient is None:
            return reference.gradient(grad, prepared.packed), None
        return prepared.backend.gradient(grad, prepared.form), None
