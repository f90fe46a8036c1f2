"""The means with which checkpoints and models are quantized where a caller names none."""

from gptq_fn import Runtime


def default_runtime() -> Runtime:
    """What serves best here."""
    return Runtime()
