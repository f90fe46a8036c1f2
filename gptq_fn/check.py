"""Whether a spec describes the tensors that exist, before any of them is read, and whether calibration tokens are the model's."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from gptq_fn.spec import INNER_NORMS, AttentionSpec, BlockSpec, MlpSpec, ModelSpec, MoeSpec, Tap

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
        if name is not None and not (role == "head" and spec.tied):
            yield name
    for i, block in enumerate(spec.blocks):
        prefix = spec.prefix.format(i=i)
        for linear in block.linears:
            yield from spec.names_of(i, linear)
        for slot, name in block.norms:
            if name is not None:
                yield from numbered(prefix + name, block.copies(slot))


def numbered(name: str, copies: int | None) -> Iterator[str]:
    """The names of all copies of a tensor; the name itself where there is one."""
    yield from (name,) if copies is None else (name.format(n=n) for n in range(copies))


def arrays(spec: ModelSpec) -> Iterator[str]:
    """The tensors that the spec reads under their full names: they are no module's."""
    for i, block in enumerate(spec.blocks):
        yield from (spec.prefix.format(i=i) + name for _, name in block.arrays)


def ignores(spec: ModelSpec, name: str) -> bool:
    """Whether the tensor of this name says nothing that the spec needs."""
    return any(re.fullmatch(pattern, name) for pattern in spec.ignored)


def _tensors(spec: ModelSpec, shapes: Shapes) -> Iterator[str]:
    read = Counter(names(spec))
    yield from (f"{name} is read {n} times." for name, n in read.items() if n > 1)
    needed = [f"{name}.weight" for name in read] + list(arrays(spec))
    yield from (f"{name} is missing." for name in needed if name not in shapes)
    expected = {f"{name}.{leaf}" for name in read for leaf in ("weight", "bias")} | set(needed)
    unread = sorted(name for name in shapes.keys() - expected if not ignores(spec, name))
    yield from (f"{name} {list(shapes[name])} is not read by anything in the spec." for name in unread)


def _roles(spec: ModelSpec) -> Iterator[str]:
    for i, block in _distinct(spec):
        needed = {role: tap for role, (tap, _, _) in roles_of(block, 0, 0, 0).items()}
        found = Counter(linear.role for linear in block.linears)
        yield from (f"Block {i} has {n} linears with the role {role!r}." for role, n in found.items() if n > 1)
        yield from (f"Block {i} has no linear with the role {role!r}, which its spec needs." for role in sorted(needed.keys() - found))
        yield from (f"Block {i} has a linear with the role {role!r}, which is in no stage." for role in sorted(found.keys() - needed))
        for linear in block.linears:
            if linear.tap != needed.get(linear.role, linear.tap):
                yield f"Block {i}: {linear.name} ({linear.role}) reads tap {needed[linear.role]!r}, but its spec says {linear.tap!r}."
        inner, arrays = block.attn.norms, _arrays(block)
        slots, kinds = dict(block.norms), dict(block.arrays)
        yield from (f"Block {i} has no norm in the slot {slot!r}, which its attention needs." for slot in sorted(inner.keys() - slots))
        unused = sorted(slot for slot in slots.keys() - inner if slot in INNER_NORMS)
        yield from (f"Block {i} has a norm in the slot {slot!r}, which its attention does not apply." for slot in unused)
        optional = {"route_bias"}
        yield from (f"Block {i} has no array {role!r}, which its spec needs." for role in sorted(arrays.keys() - kinds - optional))
        yield from (f"Block {i} has an array {role!r}, which nothing in its spec reads." for role in sorted(kinds.keys() - arrays))


Role = tuple[Tap, int, int]
"""The tap that a role reads, its outputs and its inputs."""


def roles_of(block: BlockSpec, width: int, hidden: int, shared: int) -> dict[str, Role]:
    """The roles that the interpreter will ask for, where the residual stream and the MLPs inside are this wide."""
    ffn = block.ffn
    projections: dict[str, Role] = {role: (tap, out or width, inputs or width) for role, (tap, out, inputs) in block.attn.roles.items()}
    if isinstance(ffn, MlpSpec):
        return {**projections, **_mlp(ffn, "", ("attn_in" if block.shares_tap else "mlp_in", "down_in"), width, hidden)}
    router: dict[str, Role] = {"router": ("router_in", ffn.experts, width)}
    gate: dict[str, Role] = {"shared_gate": ("router_in", 1, width)} if ffn.shared_gate else {}
    beside: dict[str, Role] = {} if ffn.shared is None else _mlp(ffn.shared, "shared.", ("mlp_in", "down_in"), width, shared)
    return {**projections, **router, **gate, **_mlp(ffn.mlp, "experts.", ("expert_in", "expert_down_in"), width, hidden), **beside}


def _mlp(mlp: MlpSpec, prefix: str, taps: tuple[Tap, Tap], width: int, hidden: int) -> dict[str, Role]:
    wide = 2 * hidden if mlp.form == "fused_gated" else hidden
    opening: dict[str, Role] = {prefix + role: (taps[0], wide, width) for role in mlp.opening}
    return {**opening, f"{prefix}down": (taps[1], width, hidden)}


def _arrays(block: BlockSpec) -> dict[str, int]:
    """The arrays that the interpreter reads where they are there, and their lengths."""
    sinks = {"sinks": block.attn.heads} if isinstance(block.attn, AttentionSpec) and block.attn.sinks else {}
    return {**sinks, **({"route_bias": block.ffn.experts} if isinstance(block.ffn, MoeSpec) else {})}


def _widths(spec: ModelSpec, shapes: Shapes) -> Iterator[str]:
    top = dict(spec.tensors)
    vocab, embedded = shapes[spec.embedding]
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
        if isinstance(block.ffn, MoeSpec):
            hidden = _hidden(spec, i, "experts.", block.ffn.mlp, shapes)
            shared = _hidden(spec, i, "shared.", block.ffn.shared, shapes) if block.ffn.shared else 0
        else:
            hidden, shared = _hidden(spec, i, "", block.ffn, shapes), 0
        needed = roles_of(block, width, hidden, shared)
        for linear in block.linears:
            shape = needed[linear.role][1:]
            for name in spec.names_of(i, linear):
                yield from _wrong(shapes, name, shape if linear.stored == "out_in" else shape[::-1], bias=shape[:1])
        for slot, name in block.norms:
            copies, features = block.attn.norms.get(slot, (1, width))
            for full in numbered(prefix + name, block.copies(slot)) if name is not None else ():
                # heads share a norm, have a row each, or, where there are copies, a tensor each
                rows = len(shapes[f"{full}.weight"]) > 1 and copies > 1
                shape = (copies, features) if rows and block.copies(slot) is None else (features,)
                yield from _wrong(shapes, full, shape, bias=shape)
        for role, name in block.arrays:
            if shapes[prefix + name] not in ((_arrays(block)[role],), (1, _arrays(block)[role])):
                yield f"{prefix + name} is {list(shapes[prefix + name])} but the spec makes it [{_arrays(block)[role]}]."


def _hidden(spec: ModelSpec, i: int, prefix: str, mlp: MlpSpec, shapes: Shapes) -> int:
    """The width inside an MLP, as the last linear that opens it says."""
    linear = spec.blocks[i].linear(prefix + mlp.opening[-1])
    out = shapes[f"{next(spec.names_of(i, linear))}.weight"][0 if linear.stored == "out_in" else 1]
    return out // 2 if mlp.form == "fused_gated" else out


def _wrong(shapes: Shapes, name: str | None, expected: tuple[int, ...], bias: tuple[int, ...] | None = None) -> Iterator[str]:
    if name is None:
        return
    for leaf, wanted in (("weight", expected), ("bias", expected[:1] if bias is None else bias)):
        found = shapes.get(f"{name}.{leaf}", wanted)
        if tuple(found) != wanted:
            yield f"{name}.{leaf} is {list(found)} but the spec makes it {list(wanted)}."


def _distinct(spec: ModelSpec) -> Iterator[tuple[int, BlockSpec]]:
    """The first block of each kind."""
    first: dict[BlockSpec, int] = {}
    for i, block in enumerate(spec.blocks):
        first.setdefault(block, i)
    yield from ((i, block) for block, i in first.items())


def check_tokens(calib: Iterable[Any], vocabulary: int) -> None:
    """Raise ValueError unless `calib` is token ids below `vocabulary`: an array [samples, time], or samples of any lengths."""
    samples = [np.asarray(sample) for sample in calib]
    if odd := [x for x in samples if x.ndim != 1 or not x.size or not np.issubdtype(x.dtype, np.integer)]:
        raise ValueError(
            "Calibration tokens are whole numbers [samples, time], or a sequence of samples [time]; "
            f"got a sample of {odd[0].dtype} {list(odd[0].shape)}."
        )
    if not samples:
        raise ValueError("There are no calibration samples; give some token ids [samples, time].")
    low, high = min(int(x.min()) for x in samples), max(int(x.max()) for x in samples)
    if low < 0 or high >= vocabulary:
        raise ValueError(f"Calibration tokens reach from {low} to {high} but the model knows {vocabulary}: another tokenizer made them.")
