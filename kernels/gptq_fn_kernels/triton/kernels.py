"""The kernels, in Triton: one that splits inputs over the warps of a program, one that splits them over programs, and dequantizing.

`words` and `high` are laid out by `layout.py`; n is the number of outputs, chunk 32 * FIELDS inputs. Both products keep
weights in the registers of the matrix instruction's left operand, and accumulate in float32:
y[m, o] = sum over i of x[m, i] * weight[o, i], weight rounded to x's dtype. A chunk has CHUNK / GROUP groups, 4 or more.
"""
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton compiles these functions; what their names are bound to there, pyright cannot know.)

import triton
import triton.language as tl


@triton.jit
def levels_of(w, h, zero, magic, ROWS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, BRAIN: tl.constexpr):
    """code - zero of words [ROWS, 16] and zero points [ROWS, GROUPS]: [ROWS, GROUPS, 32 * FIELDS / GROUPS] in float16 or bfloat16, exact.

    A code is put into the mantissa of a float whose exponent makes it count 1: 1024 + code, or 128 + code in bfloat16.
    `magic` is that float's bits, twice. A constant that the compiler knows costs one instruction more for each pair, so it
    is an argument, to which kernels add a zero of the grid's for JAX, where arguments are constants.
    """
    FLOAT: tl.constexpr = tl.bfloat16 if BRAIN else tl.float16
    BASE: tl.constexpr = 128 if BRAIN else 1024
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    field = tl.arange(0, FIELDS)[None, None, :]
    pairs = (w[:, :, None] >> (WIDTH * field)) & (((1 << WIDTH) - 1) * 0x00010001) | magic
    if BITS == 3:
        spread = ((h & 0xFF) << 2) | ((h & 0xFF00) << 10)
        pairs = pairs | ((spread[:, :, None] >> field) & 0x00040004)
    low = (pairs & 0xFFFF).to(tl.uint16).to(FLOAT, bitcast=True)
    high = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(FLOAT, bitcast=True)
    # row, lane's higher bit, eight, lane's lower bit, half, field, pair -> row, half, field, eight, lane, pair: inputs in their order
    codes = tl.permute(tl.reshape(tl.join(low, high), (ROWS, 2, 2, 2, 2, FIELDS, 2)), (0, 4, 5, 2, 1, 3, 6))
    codes = tl.reshape(codes, (ROWS, GROUPS, 32 * FIELDS // GROUPS))
    return codes - (zero.to(FLOAT) + BASE)[:, :, None]


@triton.jit
def weights_of(
    w, h, zero, scale, magic, ROWS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr, FIELDS: tl.constexpr, DTYPE: tl.constexpr
):
    """The weights [ROWS, 32 * FIELDS] of a chunk in DTYPE; zero points and scales [ROWS, GROUPS]."""
    # bfloat16 has no room for codes of 8 bits beside its exponent's own.
    BRAIN: tl.constexpr = tl.bfloat16 == DTYPE and BITS < 8
    levels = levels_of(w, h, zero, magic, ROWS, GROUPS, BITS, FIELDS, BRAIN).to(DTYPE)
    near = scale.to(DTYPE)
    weights = levels * near[:, :, None]
    if tl.bfloat16 == DTYPE:
        # A scale rounded to 8 bits would be wrong alike for a whole group: what it lost is added.
        lost = (scale.to(tl.float32) - near.to(tl.float32)).to(DTYPE)
        weights = tl.fma(levels, tl.broadcast_to(near[:, :, None], levels.shape), levels * lost[:, :, None])
    return tl.reshape(weights, (ROWS, 32 * FIELDS))


@triton.jit
def grid_of(zeros, scales, group, out, live, n, ROWS: tl.constexpr, GROUPS: tl.constexpr, BITS: tl.constexpr):
    """Zero points and scales [ROWS, GROUPS] of groups `group` [..., GROUPS] and outputs `out` [..., 1].

    Zero points are floats of 16 bits, like scales: single bytes could not be copied ahead.
    """
    at = group * n + out
    scale = tl.reshape(tl.load(scales + at, mask=live, other=0.0), (ROWS, GROUPS))
    if zeros is None:
        zero = tl.full((1, 1), 1 << (BITS - 1), tl.float16)
    else:
        zero = tl.reshape(tl.load(zeros + at, mask=live, other=0.0), (ROWS, GROUPS))
    return zero, scale


@triton.jit
def rsqrt_of_mean_square(x, k, WIDTH: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(the mean of x^2 + EPS) of x [k], in float32; WIDTH is a power of two, k or more."""
    TILE: tl.constexpr = WIDTH if WIDTH < 2048 else 2048
    squares = tl.zeros((TILE,), tl.float32)
    for start in tl.static_range(0, WIDTH, TILE):
        at = start + tl.arange(0, TILE)
        part = tl.load(x + at, mask=at < k, other=0.0).to(tl.float32)
        squares += part * part
    return tl.rsqrt(tl.sum(squares, 0) / k + EPS)


@triton.jit(do_not_specialize=["m", "chunks", "magic"])
def few_rows(
    x, gather, words, high, zeros, scales, norm, bias, plus, y, m, n, k, chunks, stride, magic,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
    ONE: tl.constexpr, WIDTH: tl.constexpr = 1, EPS: tl.constexpr = 0.0, OFFSET: tl.constexpr = 0.0,
    GATE: tl.constexpr = 0.0, BEND: tl.constexpr = 0.0,
):  # fmt: skip
    """y [m, n] for m <= BM: each of SPLIT parts of a program's threads takes every SPLIT-th chunk, and they add up at the end.

    ONE: m is 1. Then x may be normalized on the way: divided by the root of its mean square plus EPS, and multiplied by
    norm [k] + OFFSET; WIDTH is the number of features, rounded up. bias [n] and plus [m, n] are added to y. Where GATE is not 0
    the first half of y, z, becomes z * sigmoid(GATE * z + BEND * z^3) times the other half: y is then [m, n / 2], plus None.
    OVERLAP: launched while the kernel before still runs, for which it waits, and lets the one behind be launched likewise.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    magic += tl.num_programs(2) - 1  # nothing; see levels_of
    CHUNK: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = CHUNK // GROUP
    HALVES: tl.constexpr = 1 if GATE == 0 else 2
    wide, own = n // HALVES, tl.program_id(0) * (BN // HALVES) + tl.arange(0, BN) % (BN // HALVES)
    out = tl.arange(0, BN) // (BN // HALVES) * wide + own
    part, row, inner, column = tl.arange(0, SPLIT), tl.arange(0, BM), tl.arange(0, CHUNK), tl.arange(0, 16)
    wanted, there = (row < m)[None, :], (own < wide)[:, None]
    root, near, added = 1.0, 1.0, tl.zeros((BN, BM), tl.float32)
    sums = tl.zeros((SPLIT, BN, BM), tl.float32)
    for first in tl.range(0, chunks, SPLIT, num_stages=STAGES):
        if first == 0:  # what else is read is waited for when the first chunks are under way
            if norm is not None:
                root = rsqrt_of_mean_square(x, k, WIDTH, EPS)
                # Its power of two keeps products with `norm` in range, and is exact.
                near = (root.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
            if bias is not None:
                added += tl.load(bias + out[:, None], mask=there, other=0.0).to(tl.float32)
            if plus is not None:
                added += tl.load(plus + row[None, :] * n + out[:, None], mask=wanted & there, other=0.0).to(tl.float32)
        chunk = first + part
        live = ((chunk < chunks)[:, None] & (own < wide)[None, :])[:, :, None]
        at = (chunk[:, None] * n + out[None, :])[:, :, None] * 16 + column[None, None, :]
        w = tl.reshape(tl.load(words + at, mask=live, other=0), (SPLIT * BN, 16))
        h = tl.reshape(tl.load(high + at, mask=live, other=0).to(tl.int32), (SPLIT * BN, 16)) if BITS == 3 else None
        group = (chunk * GROUPS)[:, None, None] + tl.arange(0, GROUPS)[None, None, :]
        zero, scale = grid_of(zeros, scales, group, out[None, :, None], live, n, SPLIT * BN, GROUPS, BITS)
        weights = weights_of(w, h, zero, scale, magic, SPLIT * BN, GROUPS, BITS, FIELDS, x.dtype.element_ty)
        slot = chunk[:, None] * CHUNK + inner[None, :]
        place = slot if gather is None else tl.load(gather + slot, mask=(chunk < chunks)[:, None], other=k)
        if ONE:
            only = tl.load(x + place, mask=place < k, other=0.0)
            if norm is not None:
                weight = tl.load(norm + place, mask=place < k, other=0.0)
                only = (only * near.to(only.dtype) * (weight if OFFSET == 0 else weight.to(tl.float32) + OFFSET)).to(only.dtype)
            xs = tl.broadcast_to(only[:, :, None], (SPLIT, CHUNK, BM))
        else:
            inside = (place < k)[:, :, None] & (row < m)[None, None, :]
            xs = tl.load(x + place[:, :, None] + row[None, None, :] * stride, mask=inside, other=0.0)
        sums = tl.dot(tl.reshape(weights, (SPLIT, BN, CHUNK)), xs, sums, input_precision=PRECISION)
    result = tl.sum(sums, 0)
    if norm is not None:
        result *= root / near
    result += added
    if GATE != 0:
        z, other = tl.split(tl.permute(tl.reshape(result, (2, BN // 2, BM)), (1, 2, 0)))
        result = z * tl.sigmoid(z * (GATE + BEND * z * z)) * other
        own = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        there = (own < wide)[:, None]
    tl.store(y + row[None, :] * wide + own[:, None], result.to(y.dtype.element_ty), mask=wanted & there)


@triton.jit(do_not_specialize=["m", "chunks", "magic"])
def many_rows(
    x, words, high, zeros, scales, y, m, n, k, chunks, stride, magic,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """y [SPLIT, m, n]: the sums over each of SPLIT ranges of chunks. Programs that follow each other share words in L2."""
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    magic += tl.num_programs(2) - SPLIT  # nothing; see levels_of
    CHUNK: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = CHUNK // GROUP
    out, row = tl.program_id(1) * BN + tl.arange(0, BN), tl.program_id(0) * BM + tl.arange(0, BM)
    inner, column = tl.arange(0, CHUNK), tl.arange(0, 16)
    part = tl.program_id(2)
    sums = tl.zeros((BN, BM), tl.float32)
    live = (out < n)[:, None]
    for chunk in tl.range(part * chunks // SPLIT, (part + 1) * chunks // SPLIT, num_stages=STAGES):
        at = (chunk * n + out)[:, None] * 16 + column[None, :]
        w = tl.load(words + at, mask=live, other=0)
        h = tl.load(high + at, mask=live, other=0).to(tl.int32) if BITS == 3 else None
        group = chunk * GROUPS + tl.arange(0, GROUPS)[None, :]
        zero, scale = grid_of(zeros, scales, group, out[:, None], live, n, BN, GROUPS, BITS)
        weights = weights_of(w, h, zero, scale, magic, BN, GROUPS, BITS, FIELDS, x.dtype.element_ty)
        slot = chunk * CHUNK + inner
        inside = (slot < k)[:, None] & (row < m)[None, :]
        xs = tl.load(x + slot[:, None] + row[None, :] * stride, mask=inside, other=0.0)
        sums = tl.dot(weights, xs, sums, input_precision=PRECISION)
    at = (part * m + row)[None, :] * n + out[:, None]
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=(row < m)[None, :] & live)


@triton.jit(do_not_specialize=["size"])
def add_parts(parts, y, size, SPLIT: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """y [size] = the sum of parts [SPLIT, size], in their order. OVERLAP: launched while many_rows still runs."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    if OVERLAP:
        tl.extra.cuda.gdc_wait()
    for part in tl.static_range(SPLIT):
        total += tl.load(parts + part * size + at, mask=at < size, other=0.0)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=at < size)


@triton.jit(do_not_specialize=["magic"])
def dequantized(
    words, high, zeros, scales, weight, n, width, magic,
    BITS: tl.constexpr, FIELDS: tl.constexpr, GROUP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """weight [n, width]: width is a whole number of chunks."""
    CHUNK: tl.constexpr = 32 * FIELDS
    GROUPS: tl.constexpr = CHUNK // GROUP
    chunk, out = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    live = (out < n)[:, None]
    at = (chunk * n + out)[:, None] * 16 + tl.arange(0, 16)[None, :]
    w = tl.load(words + at, mask=live, other=0)
    h = tl.load(high + at, mask=live, other=0).to(tl.int32) if BITS == 3 else None
    group = chunk * GROUPS + tl.arange(0, GROUPS)[None, :]
    zero, scale = grid_of(zeros, scales, group, out[:, None], live, n, BN, GROUPS, BITS)
    weights = weights_of(w, h, zero, scale, magic, BN, GROUPS, BITS, FIELDS, weight.dtype.element_ty)
    place = out.to(tl.int64)[:, None] * width + chunk * CHUNK + tl.arange(0, CHUNK)[None, :]
    tl.store(weight + place, weights, mask=live)


@triton.jit(do_not_specialize=["m"])
def gathered(x, gather, y, m, k, width, stride, BLOCK: tl.constexpr):
    """y [m, width] = the columns of x that `gather` names, and 0 where it names k."""
    row, slot = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(gather + slot, mask=slot < width, other=k)
    tl.store(y + row * width + slot, tl.load(x + row * stride + place, mask=place < k, other=0.0), mask=slot < width)
