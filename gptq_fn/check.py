"""Whether a spec describes the tensors that exist, before any of them is read."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping

from gptq_fn.spec import BlockSpec, ModelSpec, Tap

Shapes = Mapping[str, tuple[int, ...]]
"""Tensor name -> shape, as stored."""


def check(spec: ModelSpec, shapes: Shapes) -> tuple[str, ...]:
    """What is wrong, in sentences: tensors that are missing, unread, read twice or of the wrong width, linears in no stage.

    Empty where the spec reads every tensor once and all widths agree. Biases are optional. Widths are looked at only
    when the tensors and roles are right.
    """
    return (*_tensors(spec, shapes), *_roles(spec)) or tuple(_widths(spec, shapes))


def names(spec: ModelSpec) -> Iterator[str]:
    """The modules that the spec reads: tensor names without ".weight" and ".bias"."""
    for role, name in spec.tensors:
        if not (role == "head" and spec.tied):
            yield name
    for i, block in enumerate(spec.blocks):
        prefix = spec.prefix.format(i=i)
        yield from (prefix + linear.name for linear in block.linears)
        yield from (prefix + name for _, name in block.norms)


def ignores(spec: ModelSpec, name: str) -> bool:
    """Whether the tensor of this name says nothing that the spec needs."""
    return any(re.fullmatch(pattern, name) for pattern in spec.ignored)


def _tensors(spec: ModelSpec, shapes: Shapes) -> Iterator[str]:
    read = Counter(names(spec))
    yield from (f"{name} is read {n} times." for name, n in read.items() if n > 1)
    yield from (f"{name}.weight is missing." for name in read if f"{name}.weight" not in shapes)
    expected = {f"{name}.{leaf}" for name in read for leaf in ("weight", "bias")}
    unread = sorted(name for name in shapes.keys() - expected if not ignores(spec, name))
    yield from (f"{name} {list(shapes[name])} is not read by anything in the spec." for name in unread)


def _roles(spec: ModelSpec) -> Iterator[str]:
    for i, block in _distinct(spec):
        needed = _needed(block)
        found = Counter(linear.role for linear in block.linears)
        yield from (f"Block {i} has {n} linears with the role {role!r}." for role, n in found.items() if n > 1)
        yield from (f"Block {i} has no linear with the role {role!r}, which its spec needs." for role in sorted(needed.keys() - found))
        yield from (f"Block {i} has a linear with the role {role!r}, which is in no stage." for role in sorted(found.keys() - needed))
        for linear in block.linears:
            if linear.tap != needed.get(linear.role, linear.tap):
                yield f"Block {i}: {linear.name} ({linear.role}) reads tap {needed[linear.role]!r}, but its spec says {linear.tap!r}."


def _needed(block: BlockSpec) -> dict[str, Tap]:
    """The roles that the interpreter will ask for, and the tap that each reads."""
    projections = ("q", "k", "v") if block.attn.qkv == "separate" else ("qkv",)
    opening = ("gate", "up") if block.ffn.form == "gated" else ("up",)
    mlp_in: Tap = "attn_in" if block.shares_tap else "mlp_in"
    return {**dict.fromkeys(projections, "attn_in"), "o": "o_in", **dict.fromkeys(opening, mlp_in), "down": "down_in"}


def _widths(spec: ModelSpec, shapes: Shapes) -> Iterator[str]:
    top = dict(spec.tensors)
    vocab, embedded = shapes[f"{top['embed']}.weight"]
    width = shapes[f"{top['project_in']}.weight"][0] if "project_in" in top else embedded
    yield from _wrong(shapes, top.get("project_in"), (width, embedded))
    yield from _wrong(shapes, top.get("project_out"), (embedded, width))
    yield from _wrong(shapes, None if spec.tied else top.get("head"), (vocab, embedded))
    if "positions" in top:
        yield from _wrong(shapes, top["positions"], (shapes[f"{top['positions']}.weight"][0], width))
    for role in ("embed_norm", "final_norm"):
        yield from _wrong(shapes, top.get(role), (width,))
    for i, block in enumerate(spec.blocks):
        prefix = spec.prefix.format(i=i)
        up = block.linear("up")
        hidden = shapes[f"{prefix}{up.name}.weight"][0 if up.stored == "out_in" else 1]
        attn, kv = block.attn, block.attn.kv_heads * block.attn.head_dim
        q = attn.heads * attn.head_dim
        expected = {"q": (q, width), "k": (kv, width), "v": (kv, width), "qkv": (q + 2 * kv, width), "o": (width, q)}
        expected |= {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        for linear in block.linears:
            shape = expected[linear.role]
            yield from _wrong(shapes, prefix + linear.name, shape if linear.stored == "out_in" else shape[::-1], bias=shape[0])
        for _, name in block.norms:
            yield from _wrong(shapes, prefix + name, (width,))


def _wrong(shapes: Shapes, name: str | None, expected: tuple[int, ...], bias: int | None = None) -> Iterator[str]:
    if name is None:
        return
    for leaf, wanted in (("weight", expected), ("bias", (expected[0] if bias is None else bias,))):
        found = shapes.get(f"{name}.{leaf}", wanted)
        if tuple(found) != wanted:
            yield f"{name}.{leaf} is {list(found)} but the spec makes it {list(wanted)}."


def _distinct(spec: ModelSpec) -> Iterator[tuple[int, BlockSpec]]:
    """The first block of each kind."""
    first: dict[BlockSpec, int] = {}
    for i, block in enumerate(spec.blocks):
        first.setdefault(block, i)
    yield from ((i, block) for block, i in first.items())
