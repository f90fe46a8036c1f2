"""The kernel, in Triton, of GPTQ's column loop: the columns of a block are rounded one after the other, each program on some rows."""
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton compiles these functions; what their names are bound to there, pyright cannot know.)

import triton
import triton.language as tl


@triton.jit
def round_columns(
    w, upper, scale, zero, codes, errors, out,
    BITS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Codes and scaled errors [blocks, COLUMNS, out] of weights w, likewise, of which a program holds [WIDTH, ROWS] in registers.

    upper [blocks, COLUMNS, COLUMNS] is the factor's square on these columns; scale and zero are [blocks, COLUMNS, out] with
    STEP 1, one grid a column, or [blocks, 1, out] with STEP 0. WIDTH is COLUMNS rounded up to a power of 2.
    """
    block = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    live = row < out
    w += block * COLUMNS * out
    upper += block * COLUMNS * COLUMNS
    grid = block * (1 + STEP * (COLUMNS - 1)) * out + row
    place = block * COLUMNS * out + row
    held = tl.load(w + column[:, None] * out + row[None, :], mask=(column < COLUMNS)[:, None] & live[None, :], other=0.0)
    # What the next column needs does not depend on this one: it is fetched meanwhile.
    ahead = tl.load(upper + column, mask=column < COLUMNS, other=0.0)
    pivot = tl.load(upper)
    s = tl.load(scale + grid, mask=live, other=1.0)
    z = tl.load(zero + grid, mask=live, other=0.0)
    for i in range(COLUMNS):
        factors, diagonal = ahead, pivot
        following = tl.minimum(i + 1, COLUMNS - 1)
        ahead = tl.load(upper + following * COLUMNS + column, mask=column < COLUMNS, other=0.0)
        pivot = tl.load(upper + following * (COLUMNS + 1))
        x = tl.sum(tl.where((column == i)[:, None], held, 0.0), 0)
        # Far outside the codes nothing changes, and below 2^22 adding 1.5 * 2^23 rounds to whole numbers, ties to even.
        level = tl.minimum(tl.maximum(tl.div_rn(x, s), -512.0), 512.0)
        code = tl.minimum(tl.maximum((level + 12582912.0) - 12582912.0 + z, 0.0), (1 << BITS) - 1.0)
        error = tl.div_rn(x - s * (code - z), tl.zeros_like(x) + diagonal)
        held -= factors[:, None] * error[None, :]
        tl.store(codes + place, code.to(tl.int32).to(tl.uint8), mask=live)
        tl.store(errors + place, error, mask=live)
        place += out
        if STEP:
            grid += out
            s = tl.load(scale + grid, mask=live & (i + 1 < COLUMNS), other=1.0)
            z = tl.load(zero + grid, mask=live & (i + 1 < COLUMNS), other=0.0)
