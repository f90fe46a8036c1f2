"""The gptq-fn kernels command."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from rich.table import Table
from tyro.conf import Positional, arg

from gptq_fn_interop.console import out

if TYPE_CHECKING:
    from gptq_fn_kernels import Problem


@dataclass(frozen=True)
class _Weight:
    """A weight to multiply with, where no checkpoint tells of one."""

    bits: Literal[2, 3, 4, 8] = 4
    """Of a code."""
    group_size: int | None = 128
    """Consecutive inputs that share a scale; None means that a whole row does."""
    sym: bool = True
    """Symmetric grids, or a zero point for each group."""
    act_order: bool = False
    """Which inputs share a scale does not follow from their order (desc_act)."""
    k: int = 4096
    """Inputs."""
    n: int = 4096
    """Outputs."""


def kernels(
    model: Annotated[Positional[str | None], arg(metavar="[DIRECTORY]")] = None,
    weight: Annotated[_Weight, arg(name="")] = _Weight(),
    dtype: Literal["float16", "bfloat16", "float32"] | None = None,
    device: Literal["cuda", "cpu"] | None = None,
    backend: str | None = None,
    time: bool = False,
    rows: tuple[int, ...] = (1, 16, 256),
) -> None:
    """Tell which backends multiply with a quantized weight on this machine, why others do not, and which one is taken.

    Args:
        model: A directory with a quantized checkpoint, or the name of one on the hub: tells of each kind of linear in it.
        weight: The weight, where there is no checkpoint.
        dtype: Of the activations; by default float16 on a GPU and float32 on a CPU.
        device: Where the weight is; by default the GPU, if there is one.
        backend: Take this one; exit with status 1 and every backend's reason if it does not serve.
        time: Measure, beside a dense layer, those that serve, or with a checkpoint the one that is taken. Values are random.
        rows: How many activations are multiplied at once, for each measurement.
    """
    import torch
    from gptq_fn_kernels import choose

    from gptq_fn_interop.backends import problem, problems_of
    from gptq_fn_interop.hub import local
    from gptq_fn_interop.inspection import inspect

    gpu = torch.cuda.is_available()
    device = device or ("cuda" if gpu else "cpu")
    if time and device == "cuda" and not gpu:
        raise ValueError("There is no GPU here to measure on; leave out --time, or pass --device cpu.")
    if not rows or min(rows) < 1:
        raise ValueError(f"--rows are numbers of activations, from 1 on, not {' '.join(map(str, rows)) or 'nothing'}.")
    of: torch.dtype = getattr(torch, dtype or ("float16" if device == "cuda" else "float32"))
    shown = Table(title=f"{of} on {torch.cuda.get_device_name() if device == 'cuda' and gpu else device}", title_justify="left")
    if model is None:
        described = problem(**asdict(weight), dtype=of, device=device)
        _show_backends(shown, described, choose(described, backend).name, device, rows if time else ())
    elif weight != _Weight():
        raise ValueError(f"{model} tells of its weights itself; leave out the options that describe one.")
    else:
        kinds = problems_of(inspect(local(model)), of, device)
        _show_kinds(shown, {p: (count, choose(p, backend).name) for p, count in kinds.most_common()}, device, rows if time else ())
    if time:
        out.print("In brackets: how many times as fast as a dense layer of this type.", highlight=False)


def _show_backends(shown: Table, described: "Problem", taken: str, device: str, rows: Sequence[int]) -> None:
    """Every backend for one problem with its reason, and the times of those that serve."""
    from gptq_fn_kernels import explain

    from gptq_fn_interop.backends import DENSE, times, told

    reasons = explain(described)
    for column in ("backend", "serves", "why not"):
        shown.add_column(column)
    for name, reason in reasons.items():
        shown.add_row(name, "no" if reason else "yes", reason)
    out.print(shown)
    out.print(f"{told(described)}: {taken} is taken.", highlight=False)
    if rows:
        serving = [name for name, reason in reasons.items() if reason is None]
        found = [times(described, m, serving, device) for m in rows]
        table = Table("microseconds", *(f"M = {m}" for m in rows))
        for name in (*serving, DENSE):
            table.add_row(name, *(_cell(each[name]) for each in found))
        out.print(table)


def _show_kinds(shown: Table, kinds: "dict[Problem, tuple[int, str]]", device: str, rows: Sequence[int]) -> None:
    """The backend that is taken for each kind of linear in a checkpoint, with its times."""
    from gptq_fn_interop.backends import times, told

    for column in ("linears", "kind", "backend", *(f"us, M = {m}" for m in rows)):
        shown.add_column(column)
    for described, (count, taken) in kinds.items():
        found = (times(described, m, [taken], device)[taken] for m in rows)
        shown.add_row(str(count), told(described), taken, *map(_cell, found))
    out.print(shown)
    out.print("Why another one is not: gptq-fn kernels --bits BITS --group-size SIZE --k INPUTS --n OUTPUTS ...", highlight=False)


def _cell(time: tuple[float, float]) -> str:
    return f"{time[0]:.1f} ({1 / time[1]:.2f})"
