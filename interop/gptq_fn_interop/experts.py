"""transformers' experts as separate linear layers: its fused three-dimensional parameters have no room for quantized ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gptq_fn_interop.adapters import keep_names

ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
"""What the linears of one expert are called on disk."""

_FEW = 16
"""So many experts at most all compute when they are compiled: Mixtral has 8. To trace the 128 of others in each block would take hours."""


def is_fused(module: Any) -> bool:
    """Whether this is a module of transformers that holds all experts of a block in fused parameters."""
    return hasattr(module, "num_experts") and hasattr(module, "is_transposed") and "down_proj" in module._parameters


def inputs_of(fused: Any, name: str) -> int:
    """How many inputs the linear called `name` of each expert has. Raises ValueError for a name that is no linear's."""
    if name not in ROLES:
        raise ValueError(f"An expert has no linear called {name!r}; its linears are called {', '.join(ROLES)}.")
    weight = fused.down_proj if ROLES[name] == "down" else (fused.gate_up_proj if fused.has_gate else fused.up_proj)
    return weight.shape[1 if fused.is_transposed else 2]


class Experts(nn.Module):
    """The experts of a block with a module of linears each: the state dict reads "0.gate_proj.qweight" and so on.

    What a gate does is asked of the module that it replaces. Adapters find the linears under those names.
    """

    fused: Any

    def __init__(self, fused: Any, linears: Mapping[int, Mapping[str, nn.Module]]):
        """`linears` holds, for each expert, its linears under their names on disk. Raises ValueError where one is missing."""
        super().__init__()
        wanted = {"gate", "up", "down"} if fused.has_gate else {"up", "down"}
        for n in range(fused.num_experts):
            found = {ROLES[name]: linear for name, linear in linears.get(n, {}).items()}
            if found.keys() != wanted:
                raise ValueError(
                    f"Expert {n} has quantized linears for {', '.join(sorted(found)) or 'nothing'}, but {type(fused).__name__} "
                    f"needs {', '.join(sorted(wanted))}; experts can be quantized only as a whole."
                )
            self.add_module(str(n), nn.ModuleDict(dict(linears[n])))
        if list(fused.children()) not in ([], [fused._modules.get("act_fn")]):
            raise ValueError(f"{type(fused).__name__} does more than its linears and their activation; it cannot be quantized.")
        for name in list(fused._parameters):
            fused.register_parameter(name, None)
        self.__dict__["fused"] = fused  # not a submodule: it has nothing left to load or to save
        keep_names(Experts)

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """[tokens, width] -> [tokens, width]: each token's experts, by index and weight [tokens, top_k], summed.

        Which experts are asked depends on values, for which a GPU has to be waited. So compiled, few experts compute all tokens.
        """
        if torch.compiler.is_dynamo_compiling() and len(self._modules) <= _FEW:
            return self._all(hidden_states, top_k_index, top_k_weights)
        out = torch.zeros_like(hidden_states)
        for n in top_k_index.unique().tolist():
            if n < len(self._modules):  # a larger one stands for no expert
                rows, slots = torch.where(top_k_index == n)
                y = self._one(n, hidden_states[rows]) * top_k_weights[rows, slots, None]
                out.index_add_(0, rows, y.to(out.dtype))
        return out

    def parts(self, n: int) -> dict[str, Any]:
        """The linears of expert `n` by what they are: gate, up and down."""
        return {ROLES[name]: linear for name, linear in self.get_submodule(str(n)).named_children()}

    def _all(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(x)
        for n in range(len(self._modules)):
            asked = top_k_index == n
            y = self._one(n, x) * (top_k_weights * asked).sum(-1, keepdim=True)
            out += torch.where(asked.any(-1, keepdim=True), y, 0).to(out.dtype)  # what nobody asked for may be infinite
        return out

    def _one(self, n: int, x: torch.Tensor) -> torch.Tensor:
        parts, fused = self.parts(n), self.fused
        if not fused.has_gate:
            return parts["down"](fused.act_fn(parts["up"](x)))
        gate, up = parts["gate"](x), parts["up"](x)
        both = torch.cat([gate, up], -1) if fused.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        return parts["down"](fused._apply_gate(both))


def fuse(experts: Experts, into: Any, weights: Mapping[tuple[int, str], torch.Tensor]) -> None:
    """Give the fused module `into` the weights [out, in] of (expert, role), and the experts' biases."""
    roles = {"gate_up_proj": ("gate", "up")} if into.has_gate else {"up_proj": ("up",)}
    for name, parts in {**roles, "down_proj": ("down",)}.items():
        weight = torch.stack([_joined([weights[n, role] for role in parts], into) for n in range(into.num_experts)])
        into.register_parameter(name, nn.Parameter(weight.mT.contiguous() if into.is_transposed else weight))
        if into.has_bias:
            biases = [_joined([experts.parts(n)[role].bias for role in parts], into) for n in range(into.num_experts)]
            into.register_parameter(f"{name}_bias", nn.Parameter(torch.stack(biases).to(weight.dtype)))


def _joined(parts: list[torch.Tensor], into: Any) -> torch.Tensor:
    return torch.cat(parts) if into.is_concatenated else torch.stack(parts, 1).flatten(0, 1)
