"""What a torch model turns out to be when it runs: its blocks in order, and in each the linears grouped by the tensor they read."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gptq_fn.check import check_tokens
from gptq_fn_interop.capture import evaluating, hollow, input_of, is_linear, run_block, run_model, same
from gptq_fn_interop.qlinear import QuantLinear

Carry = Literal["last", "all", "none"]
"""Which outputs of quantized blocks are kept while the next one is done: the last block's, those of all blocks (where a
block reads what an earlier one has made), or none, and then all blocks before it are run again for each block."""


@dataclass(frozen=True)
class TracedBlock:
    """A block by its module's name, and the names of its linears: those of one stage read the same tensor, stages run in order."""

    name: str
    stages: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Trace:
    """Plain data: it may be printed, edited with `dataclasses.replace`, and given to `quantize_traced`."""

    blocks: tuple[TracedBlock, ...]
    left: tuple[tuple[str, str], ...]
    """Linears and fused parameters of the blocks that are in no stage, each with the reason."""
    carry: Carry

    def __str__(self) -> str:
        """One line for each block, stages separated by bars, then what is left, by reason."""
        lines = [f"{b.name}: {' | '.join(' '.join(n.removeprefix(f'{b.name}.') for n in s) for s in b.stages)}" for b in self.blocks]
        because: dict[str, list[str]] = {}
        for name, why in self.left:
            because.setdefault(why, []).append(name)
        return "\n".join([*lines, *(f"left as they are, since {why}: {' '.join(names)}" for why, names in because.items())])


def trace(
    model: nn.Module,
    example: Any,
    blocks: str | None = None,
    layers: Sequence[str | Sequence[str]] | None = None,
    *,
    definition: Any = None,
) -> Trace:
    """The blocks and linears of `model` as they ran on `example`, token ids [samples, time]; the model stays as it is.

    `blocks` names the module whose children are the blocks ("model.layers"); by default it is the longest ModuleList
    with linears in it whose items run once, one after another. `layers` names the linears to quantize, as in
    "self_attn.q_proj", by default all. An AutoGPTQ `definition`, a class or a mapping with layers_block_name,
    inside_layer_modules, outside_layer_modules and layer_type, tells both; order and grouping are always taken from the
    run. Raises ValueError in a sentence where no blocks are found or several may be meant, a name is not there, the
    tokens are not the model's, or its forward does not repeat itself.
    """
    if definition is not None:
        blocks, layers = _autogptq(model, definition)
    tokens = max(as_tokens(model, example), key=lambda some: some.shape[1])
    with evaluating(model):
        versions = {name: parameter._version for name, parameter in model.named_parameters()}
        items = _find_blocks(model, tokens, blocks)
        if changed := [name for name, parameter in model.named_parameters() if parameter._version != versions[name]]:
            raise ValueError(f"The model's forward changes its own weight {changed[0]}; for RWKV, set config.rescale_every to 0 first.")
        stages, outputs = _watch(list(items.values()), model, tokens)
        left = _left(model, items, {name for found in stages for stage in found for name in stage}, _flat(layers))
        chosen = [[tuple(name for name in stage if name not in left) for stage in found] for found in stages]
        traced = tuple(TracedBlock(name, tuple(filter(None, found))) for name, found in zip(items, chosen, strict=True))
        return Trace(traced, tuple(left.items()), _carry(model, list(items.values()), tokens, outputs))


def as_tokens(model: nn.Module, tokens: Any) -> list[torch.Tensor]:
    """Token ids as int64 [samples, time] on the model's device, samples of one length together, in the order of their first.

    `tokens` is an array [samples, time] or a sequence of samples of any lengths. Raises ValueError where they, or the
    model's weights, do not serve.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if any(t.is_meta for t in tensors) or not tensors:
        raise ValueError(f"Some weights of this {type(model).__name__} are on the meta device, without values; load or move them first.")
    samples = [np.asarray(sample.cpu() if isinstance(sample, torch.Tensor) else sample) for sample in tokens]
    known = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    embedding = model.get_input_embeddings() if isinstance(model, PreTrainedModel) else None
    check_tokens(samples, embedding.num_embeddings if isinstance(embedding, nn.Embedding) else max(known, default=2**31))
    alike: dict[int, list[np.ndarray]] = {}
    for sample in samples:
        alike.setdefault(len(sample), []).append(sample)
    return [torch.as_tensor(np.stack(some).astype(np.int64), device=tensors[0].device) for some in alike.values()]


def _autogptq(model: nn.Module, definition: Any) -> tuple[str, Sequence[Sequence[str]] | None]:
    """The blocks and layers of AutoGPTQ's description of a model, after a look whether it is this model's."""
    read = definition.get if isinstance(definition, Mapping) else lambda key: getattr(definition, key, None)
    blocks, kind, outside = read("layers_block_name"), read("layer_type"), read("outside_layer_modules")
    if not blocks:
        raise ValueError("The definition has no layers_block_name, which says where the blocks are.")
    names = dict(model.named_modules())
    # like AutoGPTQ's OPT, a definition may name modules that only some sizes of a model have
    needed = [[blocks], *([list(outside)] if outside else [])]
    if absent := [" and ".join(wanted) for wanted in needed if not any(name in names for name in wanted)]:
        raise ValueError(f"The definition names {absent[0]}, but {type(model).__name__} has no such module; it describes another model.")
    classes = sorted({type(block).__name__ for block in names[blocks].children()})
    if kind and not {kind} & set(classes) and not set(kind) & set(classes):  # one name, or several
        raise ValueError(f"The definition says that blocks are {kind}, but those of {blocks} are {' and '.join(classes)}.")
    return blocks, read("inside_layer_modules")


def _flat(layers: Sequence[str | Sequence[str]] | None) -> list[str] | None:
    return None if layers is None else [name for item in layers for name in ([item] if isinstance(item, str) else item)]


def _find_blocks(model: nn.Module, tokens: torch.Tensor, named: str | None) -> dict[str, nn.Module]:
    """The blocks by name, in order of execution."""
    modules = dict(model.named_modules())
    lists = {n: m for n, m in modules.items() if isinstance(m, nn.ModuleList) and any(map(_any_linear, m.modules()))}
    if named is not None and named not in modules:
        raise ValueError(
            f"The model has no module {named!r}. Blocks may be in {', '.join(lists) or 'none: it has no ModuleList of linears'}."
        )
    wanted = lists if named is None else {named: modules[named]}
    order: list[nn.Module] = []
    with ExitStack() as stack:
        for child in {child for container in wanted.values() for child in container.children()}:
            stack.callback(child.register_forward_pre_hook(lambda module, args: order.append(module)).remove)
        run_model(model, tokens)
    found = {n: {f"{n}.{key}": child for key, child in m.named_children() if child in order} for n, m in wanted.items()}
    once = {n: items for n, items in found.items() if items and [m for m in order if m in items.values()] == list(items.values())}
    if named is not None and named not in once:
        raise ValueError(f"{named} holds no blocks: its children have to run once each, in their order, and do not.")
    outer = {n: items for n, items in once.items() if not any(n.startswith(f"{other}.") for other in once)}
    longest = [n for n, items in outer.items() if len(items) == max(map(len, outer.values()))]
    if len(longest) != 1:
        told = f"Several lists may be the blocks: {', '.join(longest)}" if longest else "No ModuleList with linears ran item by item"
        raise ValueError(f"{told}. Name the module whose children are the blocks, as in blocks='model.layers'.")
    return outer[longest[0]]


def _any_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D)


def _watch(blocks: Sequence[nn.Module], model: nn.Module, tokens: torch.Tensor) -> tuple[list[list[tuple[str, ...]]], list[Any]]:
    """For each block the names of its linears, grouped by what they were called with in order of the first call, and its output."""
    reads: list[dict[str, list[Any]]] = [{} for _ in blocks]
    outputs, alive, inside = [], [], [False]

    def enter(module: nn.Module, args: Any) -> None:
        inside[0] = True

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        alive.clear()
        inside[0] = False

    def read(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = input_of(args, kwargs)
            if inside[0] and x.numel():
                alive.append(x)  # so that no later tensor of the block takes its place in memory
                reads[len(outputs)].setdefault(name, []).append(_identity(x))

        return hook

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_linear(module):
                stack.callback(module.register_forward_pre_hook(read(name), with_kwargs=True).remove)
        for block in blocks:
            stack.callback(block.register_forward_pre_hook(enter).remove)
            stack.callback(block.register_forward_hook(leave).remove)
        run_model(model, tokens)
    stages = []
    for called in reads:
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name, inputs in called.items():
            groups.setdefault(tuple(inputs), []).append(name)
        stages.append([tuple(names) for names in groups.values()])
    return stages, outputs


def _identity(x: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tensors with the same values in the same memory, whatever leading axes they are seen with."""
    return x.data_ptr(), x.numel(), x.shape[-1], x.stride(-1), x.dtype, 0 if x.is_inference() else x._version


def _left(model: nn.Module, blocks: Mapping[str, nn.Module], read: set[str], layers: Sequence[str] | None) -> dict[str, str]:
    """What of the blocks, by full name, cannot or shall not be quantized, and why."""
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    left, inner = {}, set()
    for block, top in blocks.items():
        for path, module in top.named_modules():
            name = f"{block}.{path}".rstrip(".")
            if isinstance(module, QuantLinear):
                raise ValueError(f"{name} is quantized already; trace the float model that it was made from.")
            if _any_linear(module):
                inner.add(path)
                sharing = owners.get(id(module._parameters.get("weight")), [])
                if layers is not None and path not in layers:
                    left[name] = "it is not among the layers that were named"
                elif not is_linear(module):
                    left[name] = f"{type(module).__name__} is more than a linear layer with a float weight"
                elif len(sharing) > 1:
                    left[name] = "other modules share its weight"
                elif name not in read:
                    left[name] = "no example token passed through it, or its weight is read without calling it"
            elif not isinstance(module, nn.modules.conv._ConvNd):
                fused = (key for key, p in module.named_parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1)
                left |= {f"{name}.{key}": "it is several linears in one parameter, which tracing cannot tell apart" for key in fused}
    if absent := sorted(set(layers or ()) - inner):
        raise ValueError(f"No block has a linear {absent[0]!r}; there are {', '.join(sorted(inner))}.")
    return left


def _carry(model: nn.Module, blocks: Sequence[nn.Module], tokens: torch.Tensor, outputs: Sequence[Any]) -> Carry:
    """The least that has to be kept for blocks that run alone to return what they returned in the whole model, `outputs`."""
    run_model(model, tokens.flip(-1))  # what a module remembers of its last call is from now on wrong, and seen to be
    hollowed = [hollow(output) for output in outputs]
    last = len(blocks) - 1
    if all(
        _repeats(model, blocks, j, tokens, dict(enumerate([*hollowed[: max(j - 1, 0)], *outputs[max(j - 1, 0) : j]])), outputs)
        for j in range(last + 1)
    ):
        return "last"
    if all(_repeats(model, blocks, j, tokens, dict(enumerate(outputs[:j])), outputs) for j in range(last + 1)):
        return "all"
    if same(run_block(model, blocks, last, tokens, {}), outputs[last]):
        return "none"
    raise ValueError("The model's forward does not give the same twice for the same tokens, so its blocks cannot be run one by one.")


def _repeats(
    model: nn.Module, blocks: Sequence[nn.Module], j: int, tokens: torch.Tensor, given: Mapping[int, Any], outputs: Sequence[Any]
) -> bool:
    try:
        return same(run_block(model, blocks, j, tokens, given), outputs[j])
    except Exception:  # whatever fails for want of what an earlier block would have left behind
        return False
