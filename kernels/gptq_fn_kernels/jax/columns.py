"""GPTQ's column loop over one block of columns inside JAX programs on GPUs: one launch of a Triton kernel."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from gptq_fn_kernels.jax.launch import launch

SMALLEST, WIDEST = 8, 128
"""Columns that are worth a launch, and those that a program can hold in its registers."""

FEW, FEW_ROWS, ROWS = 4096, 2, 32
"""Rows of a program, one warp, where few rows are to be rounded in all, and where there are more. The columns of a block
depend on each other, so only rows fill a GPU: an H100 took 69 us for 4096 rows with 2 a program and 79 with 32, and for 28,672
rows 341 and 112."""


def round_columns(w: jax.Array, upper: jax.Array, scale: jax.Array, zero: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Codes uint8 and errors float32 [columns, out] of the weights w, likewise, as column after column is rounded, on a GPU.

    The error of a column, over the diagonal of `upper` [columns, columns], is subtracted from those behind along its row of
    `upper`. scale and zero are [columns, out], or [1, out] for all columns; everything is float32, columns at most WIDEST.
    """

    @custom_vmap
    def one(*block: jax.Array) -> tuple[jax.Array, jax.Array]:
        codes, errors = _launched([a[None] for a in block], bits)
        return codes[0], errors[0]

    @one.def_vmap
    def several(size: int, batched: list[bool], *blocks: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[bool, bool]]:
        whole = [a if b else jnp.broadcast_to(a, (size, *a.shape)) for a, b in zip(blocks, batched, strict=True)]
        return _launched(whole, bits), (True, True)

    return one(w, upper, scale, zero)


def _launched(arrays: Sequence[jax.Array], bits: int) -> tuple[jax.Array, jax.Array]:
    """The same of many blocks: each of the four arrays has a leading axis of them."""
    w, upper, scale, zero = arrays
    blocks, columns, out = w.shape
    results = jax.ShapeDtypeStruct(w.shape, jnp.uint8), jax.ShapeDtypeStruct(w.shape, jnp.float32)
    inputs = {"w": w, "upper": upper, "scale": scale, "zero": zero}
    numbers = constants_of(columns, out, bits, each=scale.shape[1] > 1, rows=FEW_ROWS if blocks * out <= FEW else ROWS)
    codes, errors = launch("columns.round_columns", inputs, results, (-(-out // numbers["ROWS"]), blocks), numbers, warps=1)
    return codes, errors


def constants_of(columns: int, out: int, bits: int, *, each: bool, rows: int) -> dict[str, int]:
    """The kernel's numbers for blocks [columns, out], with a grid for each column or one for all, and `rows` a program."""
    width = 1 << (columns - 1).bit_length()
    return {"out": out, "BITS": bits, "COLUMNS": columns, "WIDTH": width, "ROWS": rows, "STEP": int(each)}
