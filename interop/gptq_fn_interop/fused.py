"""Tensors that hold the weights or biases of all experts at once, and the parts of them that each role is."""

from collections.abc import Mapping, Sequence

import numpy as np

from gptq_fn import FusedSpec


def split(fused: FusedSpec, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """Each role's part: weights [experts, out, in], biases [experts, out]."""
    if fused.leaf == "weight" and fused.stored == "in_out":
        tensor = tensor.swapaxes(1, 2)
    n = len(fused.roles)
    if fused.split == "interleaved":
        return {role: tensor[:, i::n] for i, role in enumerate(fused.roles)}
    return dict(zip(fused.roles, np.split(tensor, n, axis=1), strict=True))


def join(fused: FusedSpec, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The tensor on disk that these parts make up."""
    ordered = [np.asarray(parts[role]) for role in fused.roles]
    if fused.split == "interleaved":
        tensor = np.stack(ordered, 2).reshape(len(ordered[0]), -1, *ordered[0].shape[2:])
    else:
        tensor = np.concatenate(ordered, 1)
    return np.ascontiguousarray(tensor.swapaxes(1, 2) if fused.leaf == "weight" and fused.stored == "in_out" else tensor)


def part_shape(fused: FusedSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of one expert's part of one role, of a tensor on disk of this shape."""
    _, *rest = shape
    if fused.leaf == "weight" and fused.stored == "in_out":
        rest = rest[::-1]
    return (rest[0] // len(fused.roles), *rest[1:])
