"""A linear layer of torch that holds a GPTQ checkpoint's tensors and multiplies with them as they are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from gptq_fn_kernels import Packed, Prepared, dequantize, multiply, prepare
from gptq_fn_kernels.registry import codes_of, without_codes
from torch import nn

from gptq_fn_interop.gptq_format import TENSORS, zeros_of
from gptq_fn_interop.tensors import to_numpy
from gptq_fn_interop.weight import DequantizedWeight, refuse

_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in every field of a word."""


@dataclass(frozen=True, eq=False)
class _Derived:
    """What follows from a layer's tensors. It is made anew when they are others than those it was made of."""

    qweight: torch.Tensor
    qzeros: torch.Tensor
    scales: torch.Tensor
    g_idx: torch.Tensor
    packed: Packed
    prepared: dict[torch.dtype, Prepared] = field(default_factory=dict)
    keeper: Prepared | None = None
    """Who has the codes where `qweight` is empty."""


_CAST = (torch.float32, torch.float16, torch.bfloat16)
"""What autocast casts; it leaves float64 alone."""


def _untraced(method: Any) -> Any:
    """What `torch.compiler.assume_constant_result` does, except that it imports Dynamo, which takes two seconds."""
    method._dynamo_marked_constant = True
    return method


class QuantLinear(nn.Linear):
    """y = x W^T + b with W quantized. The state dict is the checkpoint's: qweight, qzeros, scales, g_idx and bias, unchanged.

    Once a kernel has the codes in a layout of its own, the layer keeps that alone: among its buffers qweight is empty then. The
    attribute, the state dict, copies and moves have its values, made again each time.

    It is an `nn.Linear` with a `weight`, which is what PEFT and transformers look for; that weight is dequantized at each
    access, and writing to it or assigning another raises ValueError. Scales are a parameter, so that the layer has one,
    but frozen. Activations may have any floating dtype, whatever the scales' is; gradients reach them.

    So PEFT's adapters train on it as on any linear layer. Initializations that take something off the base weight
    (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, KaSA) are refused: they belong on the float model, before it is quantized.
    """

    qzeros: torch.Tensor
    g_idx: torch.Tensor

    def __init__(self, tensors: Mapping[str, torch.Tensor], bits: int, scheme: Mapping[str, Any] | None = None, backend: str | None = None):
        """From qweight, qzeros, scales, g_idx and possibly bias, as in a checkpoint (on the meta device where they come later).

        `scheme` is what the quantization config says of this layer; it decides how zero points are stored. `backend` is
        a name in `gptq_fn_kernels.BACKENDS`, or None for the first that serves. Raises ValueError where shapes disagree.
        """
        nn.Module.__init__(self)  # nn.Linear's own would allocate a weight
        groups, self.out_features = tensors["scales"].shape
        self.in_features, self.groups = tensors["g_idx"].shape[0], groups
        self.bits, self.scheme, self.backend = bits, dict(scheme or {}), backend
        self._buffers["qweight"] = tensors["qweight"]  # register_buffer would not take a property's name
        for name in ("qzeros", "g_idx"):
            self.register_buffer(name, tensors[name])
        self.scales = nn.Parameter(tensors["scales"], requires_grad=False)
        self.register_parameter("bias", nn.Parameter(tensors["bias"], requires_grad=False) if "bias" in tensors else None)
        self.loading = False  # set while tensors are to come: whoever initializes the weight then initializes nothing
        self.__dict__["_derived"] = None
        Packed(*self._tensors(), bits, 0)  # refuses what does not belong together before anything is loaded

    @property
    def qweight(self) -> torch.Tensor:
        """int32 [in * bits / 32, out]: the codes as the checkpoint has them."""
        held, derived = self._buffers["qweight"], self._derived
        assert held is not None
        if derived is None or derived.keeper is None or held is not derived.qweight:
            return held
        return codes_of(derived.keeper)

    @property
    def packed(self) -> Packed:
        """The weight as kernels take it. Reads the zero points when it is made."""
        return self._whole(self._derive(None))

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The dequantized weight [out, in] in the scales' dtype: a new tensor to read at each access, on the meta device while loading."""
        if self.loading:
            return torch.empty(self.out_features, self.in_features, dtype=self.scales.dtype, device="meta")
        weight = dequantize(self._derive(None).packed, self.scales.dtype, self.qweight)
        # torch.compile does not trace the subclass, and nothing initializes or merges adapters in compiled code.
        return weight if torch.compiler.is_compiling() else weight.as_subclass(DequantizedWeight)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out] in the input's dtype, or under autocast in autocast's, as `nn.Linear` has it."""
        dtype = input.dtype
        if torch.is_autocast_enabled(kind := input.device.type) and dtype in _CAST:
            dtype = torch.get_autocast_dtype(kind)
            input = input.to(dtype)
        y, bias = multiply(input, self._derive(dtype).prepared[dtype]), self.bias
        return y if bias is None else y + (bias if bias.dtype is dtype else bias.to(dtype))

    def extra_repr(self) -> str:
        """Shape and precision, for print(model)."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{shape}, bits={self.bits}, groups={self.groups}, bias={self.bias is not None}"

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.qweight, self.qzeros, self.scales, self.g_idx

    def _derive(self, dtype: torch.dtype | None) -> _Derived:
        """What follows from the tensors, with the weight prepared for activations of `dtype`, if that is given."""
        if torch.compiler.is_dynamo_compiling():
            self._derive_untraced(dtype)
            if (derived := self._derived) is None or self._buffers["qweight"] is not derived.qweight:  # becomes a guard
                raise RuntimeError(f"The tensors of {self} changed while it was compiled.")
            return derived
        # Loaders and offloading hooks put new tensors into the layer without telling it. This is asked at each call, and
        # looking into the dictionaries takes a tenth of the time of a module's attributes.
        derived, buffers = self._derived, self._buffers
        if (
            derived is None
            or buffers.get("qweight") is not derived.qweight
            or buffers.get("qzeros") is not derived.qzeros
            or buffers.get("g_idx") is not derived.g_idx
            or self._parameters.get("scales") is not derived.scales
        ):
            self._take_back()
            with torch.inference_mode(False), torch.no_grad():  # what is kept must serve any mode
                derived = self._derived = _Derived(*self._tensors(), self._pack())
        if dtype is not None and dtype not in derived.prepared:
            found = prepare(self._whole(derived), dtype, self.backend)
            derived = self._give_up(derived, dtype, found)
        return derived

    def _whole(self, derived: _Derived) -> Packed:
        return derived.packed if derived.keeper is None else replace(derived.packed, qweight=codes_of(derived.keeper))

    def _give_up(self, derived: _Derived, dtype: torch.dtype, found: Prepared) -> _Derived:
        """Holds the weight that was prepared for `dtype`, and no longer the codes where that has them."""
        if derived.keeper is not None:
            derived.prepared[dtype] = replace(found, packed=derived.packed)
        elif (keeper := without_codes(found)) is None:
            derived.prepared[dtype] = found
        else:
            prepared = {kind: replace(each, packed=keeper.packed) for kind, each in derived.prepared.items()}
            with torch.inference_mode(False):
                empty = derived.qweight.new_empty(0)  # not on the meta device: some move or send a module's buffers
            derived = replace(derived, qweight=empty, packed=keeper.packed, prepared={**prepared, dtype: keeper}, keeper=keeper)
            self._buffers["qweight"], self._derived = empty, derived
        return derived

    def _take_back(self) -> None:
        """Holds the codes again, where the empty buffer is now, and nothing that follows from them."""
        if self._derived is not None:
            held, codes = self._buffers["qweight"], self.qweight
            self._buffers["qweight"] = codes if held is None else codes.to(held.device)
            self.__dict__["_derived"] = None

    @_untraced
    def _derive_untraced(self, dtype: torch.dtype | None) -> None:
        """Derive while Dynamo traces: it calls this instead of tracing it, for what is derived depends on values.

        What that leaves in the layer is then read and guarded like any attribute. So a layer can be compiled before its
        first forward; equal layers share a graph; and new tensors are seen, though by their qweight alone where somebody
        wrote to the layer's dictionaries. To compare all four would double what guards cost at each call.
        """
        _ = self._derive(dtype).packed.zeros

    def _pack(self) -> Packed:
        qweight, qzeros, scales, g_idx = self._tensors()
        if qzeros.is_meta:
            raise ValueError(f"{self} has no values yet: its tensors are on the meta device. Load a checkpoint into it first.")
        stored = zeros_of(to_numpy(qzeros), self.bits, self.out_features, self.scheme)
        if stored == "v1_carry":
            qzeros = qzeros + _ONES[self.bits]
        return Packed(qweight, qzeros, scales.detach(), g_idx, self.bits, 1 if stored == "v1" else 0)

    def _apply(self, fn: Any, recurse: bool = True) -> "QuantLinear":
        def watched(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            if result is not tensor:
                self._take_back()  # a parameter that is cast or moved stays the same object
            return result  # where nothing changes, captured CUDA graphs go on reading what was derived

        return super()._apply(watched, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._take_back()  # values are copied into the same tensors
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}qweight"] = self.qweight

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":  # nn.Module would answer that the attribute exists already, or has no setter
            refuse()
        if "_derived" in self.__dict__ and (name == "backend" or (name in TENSORS and name != "bias")):
            self._take_back()
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        buffers = {**self._buffers, "qweight": self.qweight}
        return {**self.__dict__, "_buffers": buffers, "_derived": None}  # copies and pickles derive their own
