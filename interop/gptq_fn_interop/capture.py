"""Running one block of a torch model: its inputs come from the model's own forward, in which the blocks before it are stood in for.

So whatever happens between blocks (masks, positions, casts, the embeddings that some hybrids hand to every block) is
computed by the model itself, and no block is computed twice.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class _Reached(Exception):
    """Leaves the model's forward with what a block returned."""

    def __init__(self, output: Any):
        self.output = output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, the model is in eval mode and no gradients are recorded; afterwards each module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def run_model(model: nn.Module, tokens: torch.Tensor) -> Any:
    """The model's own forward on `tokens` int64 [samples, time], without a cache where it knows that word."""
    if not isinstance(model, PreTrainedModel):
        return model(tokens)
    parameters = inspect.signature(model.forward).parameters
    knows = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return model(input_ids=tokens, **({"use_cache": False} if knows else {}))


def run_block(model: nn.Module, blocks: Sequence[nn.Module], j: int, tokens: torch.Tensor, given: Mapping[int, Any]) -> Any:
    """What `blocks[j]` returns in the model's forward on `tokens`, where block i returns a copy of `given[i]` for each i there.

    The forward is left right after the block. Raises ValueError if it never comes there.
    """

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        raise _Reached(output)

    with ExitStack() as stack:
        for i, output in given.items():
            stack.enter_context(_instead(blocks[i], _copies(output)))
        stack.callback(blocks[j].register_forward_hook(leave).remove)
        try:
            run_model(model, tokens)
        except _Reached as reached:
            return reached.output
    raise ValueError(f"The model's forward never came to its block {j}; it depends on the tokens which blocks run, so name others.")


def hollow(output: Any) -> Any:
    """`output` with NaN in place of its floating values, without memory of its own: whoever reads it will show that."""
    return tree_map_only(torch.Tensor, lambda t: t.new_full((), torch.nan).expand(t.shape) if t.is_floating_point() else t, output)


def same(found: Any, expected: Any) -> bool:
    """Whether two outputs agree, within what a repeated computation may differ by, wherever the expected one is finite."""
    a, b = ([x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)] for tree in (found, expected))
    return len(a) == len(b) and all(map(_same, a, b))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if not b.is_floating_point():
        return bool((a == b).all())
    slack = 1e-4 if b.dtype in (torch.float32, torch.float64) else 1e-2
    fine = torch.isfinite(b)
    a, b = a[fine].double(), b[fine].double()
    return bool((a - b).norm() <= slack * b.norm())


def _copies(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: tree_map_only(torch.Tensor, torch.clone, output)  # models add to what blocks return in place


@contextmanager
def _instead(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")  # accelerate keeps its hooks there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if before is not None:
            module.__dict__["forward"] = before


def is_linear(module: nn.Module) -> bool:
    """Whether this computes x W^T + b and nothing else, from a float weight of its own."""
    forward = type(module).forward
    plain = (isinstance(module, nn.Linear) and forward is nn.Linear.forward) or (isinstance(module, Conv1D) and forward is Conv1D.forward)
    weight = module._parameters.get("weight") if plain else None
    return weight is not None and weight.is_floating_point()


def weight_of(linear: nn.Module) -> torch.Tensor:
    """Its weight as [out, in]: a view, transposed for GPT-2's Conv1D."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if isinstance(linear, Conv1D) else weight


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """What a linear is called with."""
    return args[0] if args else next(iter(kwargs.values()))
