"""Which engines load a quantized checkpoint, and every reason why one does not.

The rules are those of the engines' own sources: vLLM 0.33, SGLang 0.5.23, llama.cpp's converter of 2026-10, ExLlamaV2 0.3.2,
GPTQModel 7.7, transformers 5.23. They speak of one device, and of how linears are quantized; whether an engine knows the
model's architecture is another question.

How they were checked, in 2026-11: vLLM's and SGLang's own Python for configs and linears, with their other modules stood in
for, agreed on the cases of tests/test_engines.py and on SmolLM2; llama.cpp's converter read six of the cases to the same
weights, GPTQModel six to the same weights and logits. Rules for experts, quantized heads and ExLlamaV2 were read and not run.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptq_fn import ModelSpec, QuantConfig
from gptq_fn_interop.checkpoint import INDEX, SINGLE, Checkpoint
from gptq_fn_interop.gptq_format import HEADS, format_of, scheme_of
from gptq_fn_interop.inspection import Inspection, LinearInfo, foresee


@dataclass(frozen=True)
class Refusal:
    """One reason why an engine does not load a checkpoint, and the linears that it concerns; none for the whole of it."""

    reason: str
    linears: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.linears:
            return self.reason
        return f"{self.reason} ({len(self.linears)} linear{'s' * (len(self.linears) > 1)}, for example {self.linears[0]})"


def refusals(engine: str, found: Inspection) -> tuple[Refusal, ...]:
    """Every reason why this engine of `ENGINES` does not load the checkpoint; empty where it does. Raises ValueError for another."""
    if engine not in ENGINES:
        raise ValueError(f"There is no engine {engine!r} here, but {', '.join(ENGINES)}.")
    concerned: dict[str, dict[str, None]] = defaultdict(dict)
    for reason, names in ENGINES[engine](found):
        concerned[reason].update(dict.fromkeys(names))
    return tuple(Refusal(reason, tuple(names)) for reason, names in concerned.items())


def caution(engine: str, found: Inspection) -> str | None:
    """What to know before this engine runs a checkpoint that it loads; docs/negative_scales.md has the sources."""
    if engine == "vllm" and (count := sum(x.negative for x in found.linears)):
        return (
            f"{count} linears have negative scales, which vLLM multiplies wrongly where VLLM_MARLIN_INPUT_DTYPE=int8 is set: "
            "leave it unset, or quantize with --negative-scales False."
        )
    return None


def config_for(
    engine: str, checkpoint: Checkpoint, spec: ModelSpec, config_of: Callable[[int | None], QuantConfig], sizes: Sequence[int | None]
) -> QuantConfig:
    """The first configuration, of those that `config_of` makes of the group sizes, whose result the engine will load.

    Raises ValueError with the reasons where there is none.
    """
    found = {}
    for size in sizes:
        config = config_of(size)
        if not (found := {**found, size: refusals(engine, foresee(checkpoint, spec, config))})[size]:
            return config
    why = min(found.values(), key=lambda reasons: len({name for x in reasons for name in x.linears}))
    raise ValueError(
        f"{engine} would not load the result: {'; '.join(map(str, why))}. Leave such linears out with --rule 'NAME => skip', by all the "
        "parts that the engine fuses, or give other options."
    )


Reasons = Iterator[tuple[str, tuple[str, ...]]]
"""Reasons and the names of linears that each concerns."""


@dataclass(frozen=True)
class _Module:
    """What vLLM and SGLang hold as one module: a linear, several that they fuse, or the experts of a block."""

    name: str
    parts: tuple[LinearInfo, ...]
    left: tuple[str, ...]
    """Its linears that are not quantized."""
    experts: bool

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(x.name for x in self.parts) or self.left

    @property
    def head(self) -> bool:
        return self.name.rpartition(".")[2] in HEADS


FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
_EXPERTS = re.compile(r"(.*[.]experts)[.]")


def _modules(found: Inspection) -> list[_Module]:
    quantized = {x.name: x for x in found.linears}
    names = quantized.keys() | set(found.left)
    members: dict[str, list[str]] = defaultdict(list)
    for name in (*quantized, *found.left):
        members[_fused_name(name, names)].append(name)
    return [
        _Module(
            module,
            tuple(quantized[n] for n in inside if n in quantized),
            tuple(n for n in inside if n not in quantized),
            any(_EXPERTS.match(n) for n in inside),
        )
        for module, inside in members.items()
    ]


def _fused_name(name: str, names: set[str]) -> str:
    if experts := _EXPERTS.match(name):
        return experts.group(1)
    parent, dot, leaf = name.rpartition(".")
    for fused, leaves in FUSED.items():
        if leaf in leaves and sum(f"{parent}.{other}" in names for other in leaves) > 1:
            return f"{parent}{dot}{fused}"
    return name


def _in_config_json(found: Inspection) -> Reasons:
    if "quantization_config" not in found.model:
        yield "it looks for quantization_config in config.json, where there is none", ()


def _keys(found: Inspection) -> Reasons:
    yield from _in_config_json(found)
    if missing := [key for key in ("quant_method", "bits", "group_size", "desc_act", "sym") if key not in found.described]:
        yield f"its quantization config lacks {', '.join(missing)}", ()


def _marlin_codes(scheme: Mapping[str, Any], names: tuple[str, ...] = ()) -> Reasons:
    bits, sym = scheme["bits"], scheme["sym"]
    if bits not in (4, 8) or not sym:
        yield f"it reads symmetric codes of 4 or 8 bits, not {'' if sym else 'a'}symmetric ones of {bits}", names


def _marlin_groups(scheme: Mapping[str, Any], names: tuple[str, ...] = ()) -> Reasons:
    if (size := scheme["group_size"]) not in (-1, 32, 64, 128):
        yield f"it reads groups of 32, 64 or 128, or one a row, not groups of {size}", names


def _as_held(module: _Module, scheme: Mapping[str, Any]) -> Reasons:
    """Where the tensors are not those that the scheme makes an engine expect, which allocates them before it loads."""
    bits, size = scheme["bits"], scheme["group_size"]
    for x in module.parts:
        name, per_word = (x.name,), 32 // bits if 32 % bits == 0 else 32
        if x.bits != bits:
            yield f"it holds {module.name.rpartition('.')[2]} as one with {bits} bits, and some of it has {x.bits}", name
        elif x.inputs % per_word or x.out % per_word:
            yield f"it needs inputs and outputs divisible by {per_word}, not {x.inputs} and {x.out}", name
        elif size != -1 and x.inputs % size:
            yield f"its groups must divide the inputs, and {size} does not divide {x.inputs}", name
        elif x.groups != (1 if size == -1 else x.inputs // size):
            yield f"it expects {'one group' if size == -1 else f'groups of {size}'} a row there, and finds {x.groups} groups", name
        if scheme["sym"] and not x.sym:
            yield "its config says symmetric, so zero points are ignored, but they are not the middle code", name
        if x.desc_act and not scheme["desc_act"]:
            yield "it ignores g_idx where desc_act is false, but these groups are not consecutive inputs", name
    if module.head and module.parts[0].out % 64:
        yield f"it pads a quantized head to a multiple of 64, and {module.parts[0].out} outputs are none", module.names


def _head_unsaid(module: _Module, described: Mapping[str, Any]) -> Reasons:
    if module.head and not described.get("lm_head"):
        yield "its config does not say lm_head: true, but the head is quantized", module.names


def _unlisted(module: _Module, described: Mapping[str, Any]) -> Reasons:
    listed = described.get("modules_in_block_to_quantize") or []
    flat = [name for entry in listed for name in (entry if isinstance(entry, list) else [entry])]
    if flat and not module.experts and (names := tuple(x.name for x in module.parts if not any(n in x.name for n in flat))):
        yield "modules_in_block_to_quantize in its config does not name them, but they are quantized", names


def _vllm(found: Inspection) -> Reasons:
    described = found.described
    yield from (missing := list(_keys(found)))
    if missing:
        return
    order = "it refuses desc_act: true unless there is one group a row"
    for pattern, rule in {"": {}, **(described.get("dynamic") or {})}.items():
        scheme = {**described, **rule}
        if not pattern.startswith("-:") and scheme["desc_act"] and scheme["group_size"] != -1:
            yield order, tuple(x.name for x in found.linears if scheme_of(x.name, described) == scheme)
    yield from _marlin_codes(described)  # asked of the base, even where rules change it everywhere
    for module in _modules(found):
        scheme = scheme_of(module.name, described)
        if not module.parts:
            if module.experts and scheme is not None:
                yield f"it takes experts for quantized unless a rule leaves out {module.name!r} itself", module.left
        elif module.left:
            yield f"it holds {module.name.rpartition('.')[2]} as one, and only some of it is quantized", module.names
        elif scheme is None:
            yield f"a rule leaves out {module.name!r}, as which it holds these linears, but they are quantized", module.names
        else:
            yield from _head_unsaid(module, described)
            yield from _unlisted(module, described)
            yield from _marlin_codes(scheme, module.names)
            yield from _marlin_groups(scheme, module.names)
            yield from _as_held(module, scheme)


def _sglang(found: Inspection) -> Reasons:
    described = found.described
    yield from (missing := list(_keys(found)))
    if missing:
        return
    yield from _marlin_codes(described)
    yield from _marlin_groups(described)
    for module in _modules(found):
        # Rules do not reach experts there.
        scheme = described if module.experts else scheme_of(module.name, described)
        if not module.parts:
            if scheme is not None:
                yield (
                    "it takes for quantized what no rule leaves out by the name under which it holds it"
                    + (", and experts always" if module.experts else ""),
                    module.left,
                )
        elif module.left:
            yield f"it holds {module.name.rpartition('.')[2]} as one, and only some of it is quantized", module.names
        elif scheme is None:
            yield f"a rule leaves out {module.name!r}, as which it holds these linears, but they are quantized", module.names
        else:
            yield from _head_unsaid(module, described)
            yield from _marlin_codes(scheme, module.names)
            yield from _marlin_groups(scheme, module.names)
            yield from _as_held(module, scheme)
            yield from _tiles(module)


def _tiles(module: _Module) -> Reasons:
    """Marlin's tiles are 64 inputs by 128 outputs or 128 by 64, of fused modules as a whole; for experts 64 by 128 alone."""
    if module.experts:
        twice = {x.name: 1 if x.name.endswith(("down_proj", "w2")) else 2 for x in module.parts}  # gate and up are held as one
        wrong = {(x.inputs, twice[x.name] * x.out): x.name for x in module.parts if x.inputs % 64 or twice[x.name] * x.out % 128}
        for (inputs, out), name in wrong.items():
            yield f"its kernel for experts needs inputs divisible by 64 and outputs by 128, not {inputs} and {out}", (name,)
        return
    inputs, out = module.parts[0].inputs, sum(x.out for x in module.parts)
    if (inputs % 64 or out % 128) and (inputs % 128 or out % 64):
        held = f" ({module.name.rpartition('.')[2]} as one)" if len(module.parts) > 1 else ""
        needs = "it needs inputs and outputs divisible by 64, and one of them by 128"
        yield f"{needs}, not {inputs} and {out}{held}", module.names


def _llama_cpp(found: Inspection) -> Reasons:
    yield from _in_config_json(found)
    stored = {"gptq": "v1", "gptq_v2": "v2"}[format_of(found.described)]
    for x in found.linears:
        name, per_word = (x.name,), 32 // x.bits
        if x.bits == 3:
            yield "its converter does not read 3 bits", name
        elif x.bits != found.described.get("bits"):
            yield f"its converter ignores rules: it reads {found.described.get('bits')} bits, not {x.bits}", name
        elif x.inputs % per_word or x.out % per_word:
            yield f"its converter needs inputs and outputs divisible by {per_word}, not {x.inputs} and {x.out}", name
        if not x.has_g_idx:
            yield "its converter needs a g_idx for every qweight", name
        if (x.zeros == "v2") != (stored == "v2"):
            yield f"its config says {format_of(found.described)!r}, but zero points are stored in the other way", name
        elif stored == "v1" and x.zero_at_0:
            yield "its converter misreads zero points of 0 in files of version 1", name
    if found.model.get("model_type") == "gpt2":
        yield "its converter transposes GPT-2's weights, which quantized ones do not need", tuple(x.name for x in found.linears)


def _exllamav2(found: Inspection) -> Reasons:
    stored = found.model.get("quantization_config", {}).get("checkpoint_format")  # read from here alone
    for x in found.linears:
        name = (x.name,)
        if x.bits != 4:
            yield f"it reads 4 bits, not {x.bits}", name
            continue
        if x.inputs % 32 or x.out % 32:
            yield f"it needs inputs and outputs divisible by 32, not {x.inputs} and {x.out}", name
        size = 1
        while size * x.groups < x.inputs:  # how it finds the size of groups
            size *= 2
        if x.groups > 1 and (size != x.group_size or size % 32):
            yield f"it reads groups of a power of two, at least 32, not of {x.group_size}", name
        if (x.zeros == "v2") != (stored == "gptq_v2"):
            yield f"config.json says checkpoint_format {stored!r}, but zero points are stored in the other way", name
        elif x.zeros != "v1" and x.zero_at_0:
            yield "it misreads zero points of 0 and their neighbours", name


def _gptqmodel(found: Inspection) -> Reasons:
    described = found.described
    writers = str((described.get("meta") or {}).get("quantizer", ""))
    if not described.get("sym", True) and format_of(described) == "gptq" and "gptqmodel" not in writers:
        yield "it reads asymmetric files of version 1 only where GPTQModel wrote them", ()
    for x in found.linears:
        scheme = scheme_of(x.name, described)
        name = (x.name,)
        if x.name.rpartition(".")[2] in HEADS and not described.get("lm_head"):
            yield "its config does not say lm_head: true, but the head is quantized", name
        if scheme is None or scheme.get("bits") != x.bits:
            yield f"its rules do not tell that it has {x.bits} bits", name
            continue
        size = scheme.get("group_size", -1)
        if size not in (-1, 16, 32, 64, 128, 256, 512, 1024, x.inputs):
            yield f"it reads groups of 16, 32, 64 ... 1024, or one a row, not groups of {size}", name
        elif x.groups != (1 if size == -1 else -(-x.inputs // size)):
            yield f"its rules say {'one group' if size == -1 else f'groups of {size}'} a row, and there are {x.groups} groups", name


def _transformers(found: Inspection) -> Reasons:
    yield from _in_config_json(found)
    if found.file not in (INDEX, SINGLE):
        yield f"it looks for {SINGLE} or shards with an index, not for {found.file}", ()


def _transformers_gptqmodel(found: Inspection) -> Reasons:
    yield from _transformers(found)
    base, spoken = found.described, "it ignores rules, and replaces all linears of the blocks by its own"
    for x in found.linears:
        size = base.get("group_size", 128)
        if _EXPERTS.match(x.name):
            yield "it does not read quantized experts", (x.name,)
        elif x.name.rpartition(".")[2] in HEADS:
            yield "it does not read a quantized head", (x.name,)
        elif (x.bits, x.groups) != (base.get("bits"), 1 if size == -1 else -(-x.inputs // size)):
            yield spoken, (x.name,)
    if found.left and "modules_in_block_to_quantize" not in base:
        yield spoken, found.left


ENGINES: dict[str, Callable[[Inspection], Reasons]] = {
    "transformers": _transformers,
    "transformers+gptqmodel": _transformers_gptqmodel,
    "gptqmodel": _gptqmodel,
    "vllm": _vllm,
    "sglang": _sglang,
    "exllamav2": _exllamav2,
    "llama.cpp": _llama_cpp,
}
"""What each engine refuses. "transformers" is with gptq_fn imported, "transformers+gptqmodel" without."""

GROUP_SIZES = (128, 64, 32)
"""Group sizes in the order in which they are tried for an engine. One group a row, which is coarse, is never chosen unasked."""
