"""Whether CUDA sources can be compiled and run here, and for which architecture."""

import os

import torch

from gptq_fn_kernels.cuda.compile import missing


def unavailable() -> str | None:
    """None, or why kernels in CUDA C++ are not used here: in words that follow the backend's name."""
    if os.environ.get("GPTQ_FN_CUDA") == "0":
        return "is left out, for the environment has GPTQ_FN_CUDA=0"
    if torch.version.hip is not None:
        return "runs on NVIDIA's GPUs, not on AMD's"
    return None if os.environ.get("GPTQ_FN_CUBINS") else missing()


def arch_of(device: torch.device) -> str:
    """The architecture to compile for, "sm_90a" with Hopper's own instructions."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}{'a' if major == 9 else ''}"
