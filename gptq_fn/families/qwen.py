"""The dense Qwens."""

from gptq_fn.families._config import Config
from gptq_fn.families.llama import NORMS, QK_NORMS, Windows, attention, headwise, llama, rms, sliding, windows
from gptq_fn.spec import ModelSpec


def qwen2(c: Config) -> ModelSpec:
    """Llama with biases on q, k and v, and windows on some blocks where the config asks for them."""
    return llama(c, windows=late_windows(c))


def qwen3(c: Config) -> ModelSpec:
    """Qwen2 with norms on queries and keys in place of biases."""
    return llama(c, attn=attention(c, qk_norm=headwise(rms(c))), norms=NORMS + QK_NORMS, windows=late_windows(c))


def late_windows(c: Config) -> Windows:
    """Windows on the blocks from max_window_layers on, where windows are on at all."""
    first, on = c.get("max_window_layers", default=28), c.get("use_sliding_window", default=False)
    found = windows(c, sliding(c, lambda i: i >= first))
    return [window if on else None for window in found]
