"""One token's attention over a cache of keys and values, in Triton: rotation, appending and mixing in one launch."""
# pyright: reportAssignmentType=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# (Triton compiles these functions; what their names are bound to there, pyright cannot know.)

import triton
import triton.language as tl

NEVER = tl.constexpr(-1e30)
"""The score of what is not seen: finite, so that differences of two of them are numbers."""


@triton.jit
def turned(x, cos, sin, at, TURN: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """A head [WIDE] in float32, its first 2 * TURN features rotated. `at` is where the angles of its sample begin."""
    d = tl.arange(0, WIDE)
    result = tl.load(x + d, mask=d < DIM, other=0.0).to(tl.float32)
    if TURN > 0:
        pair = d // 2 if INTERLEAVED else d % TURN
        first = d % 2 == 0 if INTERLEAVED else d < TURN
        other = tl.where(first, d + (1 if INTERLEAVED else TURN), d - (1 if INTERLEAVED else TURN))
        across = tl.load(x + other, mask=d < 2 * TURN, other=0.0).to(tl.float32)
        c = tl.load(cos + at + pair, mask=d < 2 * TURN, other=1.0)
        s = tl.load(sin + at + pair, mask=d < 2 * TURN, other=0.0)
        result = result * c + tl.where(first, -across, across) * s
    return result


@triton.jit
def attend(
    qkv, keys, values, used, cos, sin, bias, sinks, mixed, logs, keys_after, values_after,
    heads, kv_heads, length, scale, softcap, window,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, DIM: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The values [PARTS, batch, heads, DIM] mixed over each of PARTS ranges of tokens, and the logarithms [PARTS, batch, heads] of
    what the weights of each add up to. qkv [batch, heads + 2 kv_heads, DIM], keys and values [batch, kv_heads, length, DIM], of
    which `used` [batch] tokens are there, cos and sin [batch, TURN], bias [heads, length], sinks [heads].

    A program is a head of a sample and a range. Each of BLOCK lanes keeps a softmax of its own over every BLOCK-th token, so
    that no lane waits for another until they are joined at the end. The current token is not read from the cache, into
    which the first of the heads that share it writes; behind the end of the cache nothing is written.
    """
    head, sample, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    shared = head // (heads // kv_heads)
    d, lane, here = tl.arange(0, WIDE), tl.arange(0, BLOCK), tl.load(used + sample)
    row = qkv + sample * (heads + 2 * kv_heads) * DIM
    asked = turned(row + head * DIM, cos, sin, sample * TURN, TURN, DIM, WIDE, INTERLEAVED)
    key = turned(row + (heads + shared) * DIM, cos, sin, sample * TURN, TURN, DIM, WIDE, INTERLEAVED).to(keys.dtype.element_ty)
    value = tl.load(row + (heads + kv_heads + shared) * DIM + d, mask=d < DIM, other=0.0).to(values.dtype.element_ty)
    cache = (sample * kv_heads + shared).to(tl.int64) * length * DIM

    oldest = tl.maximum(here - window + 1, 0)
    share = tl.cdiv(tl.cdiv(here - oldest, PARTS), BLOCK) * BLOCK
    first = oldest + part * share
    largest = tl.full((BLOCK,), NEVER, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK, WIDE), tl.float32)
    for start in tl.range(first, tl.minimum(first + share, here), BLOCK, num_stages=STAGES):
        t = start + lane
        seen = t < tl.minimum(here, length)
        at, inside = cache + t[:, None] * DIM + d[None, :], seen[:, None] & (d < DIM)[None, :]
        ks = tl.load(keys + at, mask=inside, other=0.0).to(tl.float32)
        vs = tl.load(values + at, mask=inside, other=0.0).to(tl.float32)
        score = tl.sum(ks * asked[None, :], 1) * scale
        if softcap is not None:
            score = softcap * (2 * tl.sigmoid(2 * score / softcap) - 1)
        if bias is not None:
            score += tl.load(bias + head * length + t, mask=seen, other=0.0)
        score = tl.where(seen, score, NEVER)
        larger = tl.maximum(largest, score)
        weight, less = tl.exp(score - larger), tl.exp(largest - larger)
        total = total * less + weight
        sums = sums * less[:, None] + weight[:, None] * vs
        largest = larger

    own = tl.sum(key.to(tl.float32) * asked, 0) * scale
    if softcap is not None:
        own = softcap * (2 * tl.sigmoid(2 * own / softcap) - 1)
    if bias is not None:
        own += tl.load(bias + head * length + here, mask=here < length, other=0.0)
    own = tl.where(part == 0, own, NEVER)
    top = tl.maximum(tl.max(largest, 0), own)
    rest = 0.0
    if sinks is not None:
        sink = tl.where(part == 0, tl.load(sinks + head).to(tl.float32), NEVER)
        top = tl.maximum(top, sink)
        rest = tl.exp(sink - top)
    less, alone = tl.exp(largest - top), tl.exp(own - top)
    whole = tl.sum(total * less, 0) + alone + rest
    result = (tl.sum(sums * less[:, None], 0) + alone * value.to(tl.float32)) / whole
    at = (part * tl.num_programs(1) + sample) * heads + head
    tl.store(mixed + at * DIM + d, result.to(mixed.dtype.element_ty), mask=d < DIM)
    tl.store(logs + at, top + tl.log(whole))
    new = cache + here * DIM + d
    if (part == 0) & (head % (heads // kv_heads) == 0) & (here < length):
        tl.store(keys_after + new, key, mask=d < DIM)
        tl.store(values_after + new, value, mask=d < DIM)
