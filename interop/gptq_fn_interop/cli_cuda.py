"""The gptq-fn kernels build and gptq-fn kernels list commands."""

import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Literal

from rich.table import Table
from tyro.conf import arg

from gptq_fn_interop.cli_kernels import kernels
from gptq_fn_interop.console import out, problems, progress


def build(
    archs: Annotated[str, arg(name="arch", metavar="ARCH,...")],
    bits: tuple[Literal[2, 3, 4, 8], ...] = (4,),
    group_size: tuple[int | None, ...] = (128,),
    sym: bool = True,
    dtype: tuple[Literal["float16", "bfloat16"], ...] = ("float16", "bfloat16"),
    destination: Annotated[Path | None, arg(name="out")] = None,
) -> None:
    """Compile the CUDA kernels for GPUs that need not be here, so that nothing is compiled where they are used.

    Args:
        archs: The GPUs' architectures, such as sm_80,sm_90a.
        bits: Of the codes.
        group_size: Consecutive inputs that share a scale; None means that a whole row does.
        sym: Symmetric grids, or a zero point for each group.
        dtype: Of the activations.
        destination: A directory for the cubins, which GPTQ_FN_CUBINS names where they are used; by default the user's cache.
    """
    import torch
    from gptq_fn_kernels.cuda.compile import cache_directory, check_arch, compiled, file_name, missing, read, write
    from gptq_fn_kernels.cuda.variants import variants

    if reason := missing():
        raise ValueError(f"Building kernels {reason}.")
    known = list(dict.fromkeys(archs.split(",")))
    for one in known:
        check_arch(one)
    directory, wanted, without = destination or cache_directory(), {}, []
    for one in known:
        kinds = itertools.product([one], bits, group_size, [getattr(torch, name) for name in dtype], [sym])
        serving = {variant for kind in kinds for variant in variants(*kind)}
        wanted |= {directory / file_name(variant, one): (variant, one) for variant in serving}
        without += [] if serving else [one]
    said = f"No CUDA kernel serves such a weight on {' or '.join(without)}. The Triton tier may, and needs no building."
    if not wanted:
        raise ValueError(said)
    if without:
        problems.print(said, highlight=False)
    todo = {path: job for path, job in wanted.items() if read(path) is None}
    with progress("Compiling") as advance, ThreadPoolExecutor(os.cpu_count()) as pool:
        done = pool.map(lambda path: write(path, compiled(*todo[path]).cubin), todo)
        for count, _ in enumerate(done, 1):
            advance(count, len(todo))
    out.print(f"{len(wanted)} cubins in {directory}, of which {len(wanted) - len(todo)} were there.", highlight=False, soft_wrap=True)


def listed() -> None:
    """Tell which backends multiply on this machine, why others do not, and which compiled CUDA kernels are kept."""
    from gptq_fn_kernels.cuda.compile import cache_directory

    kernels()
    for directory in dict.fromkeys(filter(None, [os.environ.get("GPTQ_FN_CUBINS"), str(cache_directory())])):
        kinds: dict[tuple[str, ...], list[int]] = {}
        for path in Path(directory).glob("*.*.sm_*.nvrtc*.cubin"):
            source, _, arch, compiler, _ = path.name.rsplit(".", 4)
            kinds.setdefault((source, arch, compiler), []).append(path.stat().st_size)
        table = Table("source", "architecture", "compiler", "cubins", "MB")
        for kind, sizes in sorted(kinds.items()):
            table.add_row(*kind, str(len(sizes)), f"{sum(sizes) / 1e6:.2f}")
        out.print(f"Compiled CUDA kernels in {directory}: {sum(map(len, kinds.values())) or 'none'}", highlight=False, soft_wrap=True)
        if kinds:
            out.print(table)
