"""What the compiler makes of a release: a place in the ring goes back to TMA when what was loaded from it has come.

An arrival waits for no load, and TMA, which writes over the place, waits for arrivals alone. What the source says is not enough: the
compiler has moved an arrival right behind loads that were under way (kernels/NOTES.md, version 16). So the machine's instructions are read.
A load names a scoreboard in its control bits, and whoever needs it waits for that one.
"""

import re
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from gptq_fn_kernels.cuda import compile as compiler
from gptq_fn_kernels.cuda.compile import HERE, Variant, compiled
from gptq_fn_kernels.cuda.plan import FEWEST, TILES, Split
from gptq_fn_kernels.cuda.variants import kind_of, product

TRITON = find_spec("triton")
CUOBJDUMP = Path(TRITON.origin).parent / "backends/nvidia/bin/cuobjdump" if TRITON and TRITON.origin else Path("cuobjdump")
pytestmark = [
    pytest.mark.skipif(compiler.missing() is not None, reason=f"the compiler {compiler.missing()}"),
    pytest.mark.skipif(not CUOBJDUMP.exists(), reason="Triton's wheel brings no cuobjdump here"),
]

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?) ;\s+/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/")
NO_SCOREBOARD = 7


def too_early(cubin: Path) -> list[str]:
    """Releases, and ways back to the begin of a loop, with loads from shared memory under way."""
    sass = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    found, under_way, unnamed = [], set(), False
    for at, text, control in INSTRUCTION.findall(sass):
        bits = int(control, 16) >> 41
        under_way -= {scoreboard for scoreboard in range(6) if bits >> 11 + scoreboard & 1}
        operation = text.split()[1] if text.startswith("@") else text.split()[0]
        back = operation == "BRA" and int(text.split("0x")[-1], 16) < int(at, 16)
        if (operation == "SYNCS.ARRIVE.TRANS64.A1T0" or back) and (under_way or unnamed):
            found.append(f"{at} {text}")
        if operation.split(".")[0] in ("LDS", "LDSM"):
            unnamed = bits >> 5 & 7 == NO_SCOREBOARD  # loads come in order: with the next that names one, this one has come, too
            if not unnamed:
                under_way.add(bits >> 5 & 7)
        if operation in ("EXIT", "BRA") and not text.startswith("@"):
            under_way, unnamed = set(), False  # what follows does not come from here
    return found


def few_rows() -> list[Variant]:
    """Of tiles whose warps multiply by their own instruction. With more rows, arrivals wait for `wgmma`, which has used all loads."""
    kinds = [
        kind_of(bits, 64, zeros, dtype, dtype) for bits in (4, 8) for zeros in (False, True) for dtype in (torch.float16, torch.bfloat16)
    ]
    return [product(kind, Split(tile, 2)) for tile in TILES if tile.rows <= FEWEST for kind in kinds]


def cubin_in(directory: Path, variant: Variant) -> Path:
    path = directory / "kernel.cubin"
    path.write_bytes(compiled(variant, "sm_90a").cubin)
    return path


@pytest.mark.parametrize("variant", few_rows(), ids=lambda variant: "-".join(str(value) for _, value in variant.defines))
def test_a_place_is_released_when_its_loads_have_come(variant: Variant, tmp_path: Path) -> None:
    assert not too_early(cubin_in(tmp_path, variant))


def test_a_release_behind_the_last_product_is_found(tmp_path: Path) -> None:
    """As it was once."""
    sources = Path(shutil.copytree(HERE, tmp_path / "sources"))
    text = (sources / "by_warp.cuh").read_text()
    begin, end = text.index("    if (before >= 0) ring.release(before);\n"), text.rindex("}\n\n__device__ __forceinline__ void finish")
    text = text[:begin] + text[text.index("\n", begin) + 1 : end] + "    __syncwarp();\n    ring.release(i);\n" + text[end:]
    (sources / "by_warp.cuh").write_text(text)
    assert any(too_early(cubin_in(tmp_path, replace(variant, source=str(sources / variant.source)))) for variant in few_rows())
