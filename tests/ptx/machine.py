"""A stand-in for a GPU under the CUDA tier: its launches are interpreted, on torch's tensors of the CPU."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_fn_kernels.cuda import backend
from gptq_fn_kernels.cuda.compile import HERE, Variant, compiled
from torch.utils._python_dispatch import TorchDispatchMode

from ptx.gpu import Memory
from ptx.launch import Kernel
from ptx.tiles import Map


@dataclass(frozen=True)
class TensorMap:
    """As `gptq_fn_kernels.cuda.launch.TensorMap`."""

    dtype: torch.dtype
    shape: tuple[int, int]
    strides: tuple[int]
    box: tuple[int, int]
    swizzle: int

    def at(self, address: int) -> Map:
        assert self.dtype.itemsize == 2
        assert self.swizzle == 128
        assert address % 16 == self.strides[0] % 16 == 0, "TMA's tensors begin at multiples of 16 bytes, and so do their rows"
        return Map(address, self.shape, self.strides[0], self.box)


class Machine(TorchDispatchMode):
    """A GPU of so many multiprocessors. What torch makes while it is entered is its memory, and holds NaN before it is written."""

    def __init__(self, patch: pytest.MonkeyPatch, arch: str, processors: int) -> None:
        super().__init__()
        self.memory, self.sources, self.seed, self.resident, self.processors = Memory(), HERE, 0, 8, processors
        self.flags = torch.zeros(512, dtype=torch.int32)
        self.add("flags", self.flags)
        given: dict[str, Any] = {
            "load": lambda variant, arch, device, shared: (_kernel(variant, arch, self.sources), shared),
            "Launch": self._launch,
            "TensorMap": TensorMap,
            "_arch": lambda device: arch,
            "_processors": lambda device: self.processors,
            "_overlaps": lambda device: True,
            "_flags": lambda device, stream: self.flags,
        }
        for name, value in given.items():
            patch.setattr(backend, name, value)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0, raising=False)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Makes the tensor part of the memory."""
        room = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        self.memory.add(name, room.data_ptr(), room.numpy())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if "empty" in func.__name__ and found.numel():
            found.view(torch.uint8).fill_(0xFF)
            self.add(func.__name__, found)
        return found

    def change(self, directory: Path, file: str, old: str, new: str) -> None:
        """Takes the sources from a copy, with this text in place of that one wherever it is."""
        self.sources = Path(shutil.copytree(HERE, directory / "sources"))
        text = (self.sources / file).read_text()
        assert old in text
        (self.sources / file).write_text(text.replace(old, new))

    def _launch(
        self,
        loaded: tuple[Kernel, int],
        grid: Sequence[int],
        block: Sequence[int],
        arguments: int,
        *,
        cluster: Sequence[int] | None = None,
        overlap: bool = False,
        maps: Mapping[int, TensorMap] | None = None,
    ) -> Any:
        """As `gptq_fn_kernels.cuda.launch.Launch`."""
        (kernel, shared), maps = loaded, maps or {}

        def launch(stream: int, *given: int) -> None:
            assert len(given) == arguments
            values = [maps[i].at(value) if i in maps else value for i, value in enumerate(given)]
            size, together = ((*sizes, 1, 1, 1)[:3] for sizes in (grid, cluster or ()))
            options: Any = {"grid": size, "cluster": together, "threads": block[0], "shared": shared}
            kernel.launch(values, self.memory, seed=self.seed, resident=self.resident, **options)

        return launch


@cache
def _kernel(variant: Variant, arch: str, sources: Path) -> Kernel:
    return Kernel(compiled(replace(variant, source=str(sources / variant.source)), arch).ptx)
