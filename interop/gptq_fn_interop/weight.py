"""A weight that is made at each access, and so refuses to be written to: nobody would ever see what was written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch

_ASSIGNING = frozenset(
    f"__{name}__"
    for name in ("setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift")
)


class DequantizedWeight(torch.Tensor):
    """The dequantized weight [out, in] of a quantized layer, to be read.

    Whatever is computed from it is a plain tensor; `clone()` gives one that may be changed. Writing to it, in place or
    by `weight.data = ...`, and asking for its gradient raise ValueError. That stops initializations of adapters that
    take something off the base weight (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA) and the merging of adapters, both of
    which would otherwise lose what they write and leave a model that is silently another one.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """The result of `func` on plain tensors. What an in-place function changes is its first argument, or `out`."""
        kwargs = kwargs or {}
        first = next(iter((*args, *kwargs.values())), None)
        if isinstance(kwargs.get("out", first if _in_place(func.__name__) else None), cls):
            refuse()
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @property
    def data(self) -> torch.Tensor:
        """The same values, as unwritable."""
        return self

    @data.setter
    def data(self, value: torch.Tensor) -> NoReturn:
        refuse()

    def detach(self) -> torch.Tensor:
        """The same values, as unwritable; they have no gradient to be detached from."""
        return self

    @property
    def requires_grad(self) -> bool:
        """False; the weight is frozen, and setting this to True raises ValueError."""
        return False

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value:
            refuse()

    def requires_grad_(self, mode: bool = True) -> "DequantizedWeight":
        """The weight, which is frozen. Raises ValueError where it should not be."""
        self.requires_grad = mode
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.clone().__reduce_ex__(protocol)


def refuse() -> NoReturn:
    """Raise ValueError with what to do instead of writing to the weight."""
    raise ValueError(
        "The weight of a quantized layer is dequantized anew at each access, so writing to it would change nothing. To train an adapter, "
        "initialize it without changing the base weight (LoraConfig's default), or initialize it on the float model and quantize that "
        "model afterwards; to merge an adapter or to train the weight, call model.dequantize() first. "
        "A copy that may be changed is weight.clone()."
    )


def _in_place(name: str) -> bool:
    return name in _ASSIGNING or (name.endswith("_") and not name.endswith("__"))
