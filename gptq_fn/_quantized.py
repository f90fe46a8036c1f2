"""The result of quantizing one linear layer: codes, scales and zero points as plain arrays."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8


@partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale", "zero", "group_of", "bias"], meta_fields=["bits"])
@dataclass(frozen=True)
class QuantizedLinear:
    """A weight [out, in] with `weight[o, i] = scale[o, g] * (codes[o, i] - zero[o, g])`, `g = group_of[i]`.

    Experts of a block are one QuantizedLinear whose arrays have a leading axis of experts.
    """

    codes: UInt8[Array, "out in"]
    scale: Float[Array, "out groups"]
    zero: UInt8[Array, "out groups"]
    group_of: Int[Array, " in"]
    bits: int
    bias: Float[Array, " out"] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight, or of each expert's."""
        out, inputs = self.codes.shape[-2:]
        return out, inputs

    def with_bias(self, bias: Float[Array, " out"] | None) -> "QuantizedLinear":
        """The same linear with this bias."""
        return QuantizedLinear(self.codes, self.scale, self.zero, self.group_of, self.bits, bias)

    def problems(self) -> tuple[str, ...]:
        """What is wrong with these arrays, in sentences; empty for a valid linear. Reads values: not for use under jit."""
        found = []
        *rows, groups = self.scale.shape
        *codes_rows, inputs = self.codes.shape
        if self.zero.shape != self.scale.shape or codes_rows != rows:
            found.append(f"codes {self.codes.shape}, scale {self.scale.shape} and zero {self.zero.shape} do not belong together.")
        if self.group_of.shape != (*rows[:-1], inputs):
            found.append(f"group_of has shape {self.group_of.shape} but there are {inputs} inputs.")
        elif self.group_of.size and not 0 <= int(self.group_of.min()) <= int(self.group_of.max()) < groups:
            found.append(f"group_of reaches from {self.group_of.min()} to {self.group_of.max()} but there are {groups} groups.")
        for name, a in (("code", self.codes), ("zero point", self.zero)):
            if a.size and int(a.max()) >= 2**self.bits:
                found.append(f"the largest {name} is {a.max()}, which does not fit {self.bits} bits.")
        if self.bias is not None and self.bias.shape != tuple(codes_rows):
            found.append(f"the bias has shape {self.bias.shape} but codes {self.codes.shape}.")
        if not bool(jnp.isfinite(self.scale).all()):
            found.append("a scale is not finite.")
        return tuple(found)


def dequantize(q: QuantizedLinear) -> Float[Array, "*experts out in"]:
    """The weight that `q` stands for, in float32; those of all experts where its arrays have a leading axis of experts."""
    if q.codes.ndim > 2:
        return jax.vmap(dequantize)(q)
    levels = q.codes.astype(jnp.float32) - q.zero.astype(jnp.float32)[:, q.group_of]
    return q.scale.astype(jnp.float32)[:, q.group_of] * levels
