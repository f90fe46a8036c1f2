"""The means with which checkpoints and models are quantized where a caller names none."""

from gptq_fn import Runtime
from gptq_fn.kernels import round_block


def default_runtime() -> Runtime:
    """What serves best here: one device, and the fastest kernel for it."""
    return Runtime(round_block=round_block())
