"""What a quantized checkpoint holds, and which engines would load it, told from its headers and config alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptq_fn_interop.checkpoint import Checkpoint
from gptq_fn_interop.gptq_format import Zeros, bits_and_inputs, scheme_of, zeros_of


@dataclass(frozen=True)
class LinearInfo:
    """One quantized linear as its tensors tell it."""

    name: str
    bits: int
    inputs: int
    out: int
    groups: int
    sym: bool
    desc_act: bool
    has_g_idx: bool
    scale_dtype: str
    zeros: Zeros

    @property
    def group_size(self) -> int:
        """Inputs of a group; -1 for one group a row."""
        return -1 if self.groups == 1 else -(-self.inputs // self.groups)

    @property
    def bytes(self) -> int:
        """Bytes of the codes, zero points and 16-bit scales."""
        return (self.inputs * self.out + self.groups * self.out) * self.bits // 8 + 2 * self.groups * self.out


@dataclass(frozen=True)
class Inspection:
    """A checkpoint: its quantized linears, its other tensors, and the verdict of each engine (None means it loads)."""

    described: dict[str, Any]
    linears: tuple[LinearInfo, ...]
    other_bytes: int
    engines: dict[str, str | None]

    def schemes(self) -> Counter[str]:
        """How many linears share each scheme, in words."""
        return Counter(
            f"{x.bits} bits, {'one group a row' if x.groups == 1 else f'groups of {x.group_size}'}, "
            f"{'symmetric' if x.sym else 'asymmetric'}{', act-order' if x.desc_act else ''}, {x.scale_dtype} scales"
            for x in self.linears
        )


def inspect(directory: str | Path) -> Inspection:
    """The inspection of a quantized checkpoint. Raises ValueError for a float one, OSError where there is none."""
    checkpoint = Checkpoint(directory)
    described = checkpoint.quantization
    names = [name.removesuffix(".qweight") for name in checkpoint if name.endswith(".qweight")]
    if described is None or not names:
        raise ValueError(f"{directory} holds a float checkpoint; quantize it with: gptq-fn quantize {directory} DESTINATION")
    linears = tuple(_linear(checkpoint, name, described) for name in names)
    other_bytes = sum(path.stat().st_size for path in checkpoint.files) - sum(x.bytes for x in linears)
    engines = {name: _first(refusals, linears, described) for name, refusals in ENGINES.items()}
    return Inspection(described, linears, other_bytes, engines)


def _linear(checkpoint: Checkpoint, name: str, described: dict[str, Any]) -> LinearInfo:
    scheme = scheme_of(name, described) or described
    (rows, out), (groups, _) = checkpoint.shapes[f"{name}.qweight"], checkpoint.shapes[f"{name}.scales"]
    has_g_idx = f"{name}.g_idx" in checkpoint
    bits, inputs = bits_and_inputs(name, rows, checkpoint.shapes[f"{name}.g_idx"][0] if has_g_idx else None, scheme)
    size = inputs if groups == 1 else int(scheme.get("group_size", -(-inputs // groups)))
    irregular = has_g_idx and bool((checkpoint[f"{name}.g_idx"] != np.arange(inputs) // size).any())
    zeros = zeros_of(checkpoint[f"{name}.qzeros"], bits, out, scheme)
    dtype = str(checkpoint[f"{name}.scales"].dtype)
    return LinearInfo(name, bits, inputs, out, groups, bool(scheme.get("sym", True)), irregular, has_g_idx, dtype, zeros)


Refusal = Callable[[LinearInfo, dict[str, Any]], str | None]
"""Why an engine does not load a linear, or None."""


def _bits(*allowed: int) -> Refusal:
    return lambda x, _: None if x.bits in allowed else f"it reads {' or '.join(map(str, allowed))} bits, not {x.bits}"


def _groups(*allowed: int) -> Refusal:
    return lambda x, _: None if x.group_size in allowed else f"it reads groups of {', '.join(map(str, allowed))}, not {x.group_size}"


def _symmetric(x: LinearInfo, _: dict[str, Any]) -> str | None:
    return None if x.sym else "it reads symmetric zero points only"


def _no_act_order(x: LinearInfo, described: dict[str, Any]) -> str | None:
    return "it refuses desc_act: true" if (x.desc_act or described.get("desc_act")) and x.group_size != -1 else None


def _whole_groups(x: LinearInfo, _: dict[str, Any]) -> str | None:
    size = x.inputs if x.group_size == -1 else x.group_size
    return f"its groups must divide the {x.inputs} inputs, and {size} does not" if x.inputs % size else None


def _multiples(inputs: int, out: int) -> Refusal:
    def refusal(x: LinearInfo, _: dict[str, Any]) -> str | None:
        fits = x.inputs % inputs == 0 and x.out % out == 0
        return None if fits else f"it needs inputs divisible by {inputs} and outputs by {out}, not {x.inputs} and {x.out}"

    return refusal


def _keys(x: LinearInfo, described: dict[str, Any]) -> str | None:
    missing = [key for key in ("bits", "group_size", "desc_act", "sym") if key not in described]
    return f"its config lacks {', '.join(missing)}" if missing else None


def _g_idx(x: LinearInfo, _: dict[str, Any]) -> str | None:
    return None if x.has_g_idx else "it needs a g_idx for every qweight"


ENGINES: dict[str, tuple[Refusal, ...]] = {
    "transformers (with gptq_fn)": (),
    "transformers (with gptqmodel)": (_bits(2, 3, 4, 8),),
    "vLLM": (_keys, _bits(4, 8), _symmetric, _no_act_order, _groups(-1, 32, 64, 128), _whole_groups),
    "SGLang": (_keys, _bits(4, 8), _symmetric, _groups(-1, 32, 64, 128), _multiples(128, 64), _whole_groups),
    "ExLlamaV2": (_bits(4),),
    "llama.cpp (conversion)": (_bits(2, 4, 8), _g_idx),
}
"""What each engine is known to refuse, on one device (vLLM 0.33, SGLang 0.5.23, transformers 5.23, llama.cpp's converter)."""


def _first(refusals: tuple[Refusal, ...], linears: tuple[LinearInfo, ...], described: dict[str, Any]) -> str | None:
    for x in linears:
        for refusal in refusals:
            if reason := refusal(x, described):
                return f"{x.name}: {reason}"
    return None
