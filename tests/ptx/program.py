"""PTX as a list of instructions."""

import re
from dataclasses import dataclass

_TOKEN = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);)")
_OPERAND = re.compile(r"\[[^\]]*\]|\{[^}]*\}|[^\s,]+")
_SHARED = re.compile(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]")


PARAMETERS, PARAMETER = 1 << 56, 4096
"""Where the first parameter lies, and how far from the next."""


@dataclass(frozen=True)
class Instruction:
    """`op` with its operands, of which "{a, b}" is one."""

    text: str
    guard: str
    """The predicate register, or empty."""
    unless: bool
    """Whether the lanes go on where it is false."""
    op: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """The kernel of a source, with where its labels are and what it keeps in shared memory."""

    parameters: tuple[str, ...]
    """Their names."""
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    shared: dict[str, int]
    """Addresses."""

    def address_of(self, parameter: str) -> int:
        """Where a kernel sees it."""
        return PARAMETERS + PARAMETER * self.parameters.index(parameter)


def parse(ptx: str, shared_from: int) -> Program:
    """The one kernel of this PTX; its shared variables lie from this address on, dynamic ones last."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    head, body = ptx[ptx.index(".entry") :].split("\n{", 1)
    body = _scoped(body.rsplit("}", 1)[0])
    shared, at = {}, shared_from
    for align, name, size in _SHARED.findall(body):
        shared[name] = at = -(-at // int(align)) * int(align)
        at += int(size)
    for align, name in re.findall(r"\.extern \.shared \.align (\d+) \.b8 (\w+)\[\]", ptx):
        shared[name] = -(-at // int(align)) * int(align)
    instructions, labels = [], {}
    for label, _, statement in _TOKEN.findall(body):
        if label:
            labels[label] = len(instructions)
        elif (statement := " ".join(statement.split())) and not statement.startswith("."):
            instructions.append(_instruction(statement))
    parameters = tuple(re.findall(r"\.param .*?(\w+)(?:\[\d+\])?[,\s]*\n", head + "\n"))
    return Program(parameters, tuple(instructions), labels, shared)


def _scoped(body: str) -> str:
    """The names that a block in braces declares are its own."""
    count = 0

    def renamed(match: re.Match) -> str:
        nonlocal count
        count += 1
        text = match[1]
        for name in re.findall(r"\.reg \.pred (\w+);|^\s*(\w+):", text, re.M):
            text = re.sub(rf"\b{(own := ''.join(name))}\b", f"{own}_{count}" if name[1] else f"%p{own}_{count}", text)
        return text

    return re.sub(r"\{(\s*\.reg[^{}]*)\}", renamed, body)


def _instruction(statement: str) -> Instruction:
    guard, unless, rest = "", False, statement
    if found := re.match(r"@(!?)(%?\w+)\s+(.*)", statement):
        guard, unless, rest = found[2], bool(found[1]), found[3]
    op, _, operands = rest.partition(" ")
    return Instruction(statement, guard, unless, op, tuple(_OPERAND.findall(operands)))


def pieces(operand: str) -> list[str]:
    """What is in the braces, or the operand itself."""
    return [part.strip() for part in re.sub(r"[{}]", "", operand).split(",")]
