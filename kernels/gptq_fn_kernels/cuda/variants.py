"""Which variants of the sources multiply with a kind of weight."""

import torch

from gptq_fn_kernels.cuda.compile import Variant
from gptq_fn_kernels.cuda.plan import FEWEST, SENT, Plan, plans_of
from gptq_fn_kernels.triton.layout import chunk_of

BITS = (4, 8)
DTYPES = (torch.float16, torch.bfloat16)

Kind = tuple[tuple[str, str | int], ...]
"""The defines that say what a weight is like."""


def kind_of(bits: int, group: int, zeros: bool, scales: torch.dtype, dtype: torch.dtype) -> Kind:
    """Of weights of which `group` slots share a scale of dtype `scales`, for activations of `dtype`."""
    brain = int(dtype == torch.bfloat16)
    return (("BITS", bits), ("GROUP", group), ("ZEROS", int(zeros)), ("SCALES", int(scales == torch.bfloat16)), ("BRAIN", brain))


def product(kind: Kind, plan: Plan) -> Variant:
    """The product as this plan makes it."""
    sizes, tile = dict(kind), plan.tile
    bits = int(sizes["BITS"])
    grid = chunk_of(bits) // int(sizes["GROUP"]) * (1 + int(sizes["ZEROS"]))
    shape = (("ROWS", tile.rows), ("TILES", tile.tiles), ("ABREAST", tile.abreast), ("BLOCKS", tile.blocks))
    name = type(plan).__name__.lower()
    return Variant(f"{name}.cu", name, (*kind, *shape, ("STAGES", tile.stages(bits, grid)), ("FEWEST", FEWEST), ("SENT", SENT)))


def dense(kind: Kind) -> Variant:
    """The weight itself, in the activations' type."""
    return Variant("dense.cu", "dense", kind)


GATHER = Variant("gather.cu", "gather")
"""Activations in the order of a weight's slots."""


def variants(arch: str, bits: int, group_size: int | None, dtype: torch.dtype, symmetric: bool) -> tuple[Variant, ...]:
    """All that GPUs of this architecture may need for it, whatever the number of rows; none where no source serves it.

    `group_size` None means that a whole row shares a scale.
    """
    if not plans_of(arch) or bits not in BITS or dtype not in DTYPES:
        return ()
    group = min(group_size or chunk_of(bits), chunk_of(bits))
    # Scales of float32 are kept in float16; those of bfloat16 come with models of bfloat16.
    kinds = [kind_of(bits, group, not symmetric, scales, dtype) for scales in dict.fromkeys((torch.float16, dtype))]
    products = dict.fromkeys(product(kind, plan) for kind in kinds for plan in plans_of(arch))
    return (*products, *map(dense, kinds), GATHER)
