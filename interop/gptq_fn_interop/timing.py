"""Times of calls that are too short for a clock, as a device takes for them: without the host, and with memory that no cache holds."""

import math
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], torch.Tensor]

_SPAN = 2e-3
"""Seconds of one measurement, so that neither a clock's resolution nor a graph's launch matters."""

_PAST_CACHE = 3
"""In sizes of the L2 cache, what all calls of a run read together."""


def copies_of(size: int, device: str) -> int:
    """How many copies of `size` bytes a run has to go through for the cache of a GPU to hold none when its turn comes again."""
    if torch.device(device).type != "cuda":
        return 1
    return 1 + math.ceil(_PAST_CACHE * torch.cuda.get_device_properties(device).L2_cache_size / size)


def stopwatch(calls: Sequence[Call], device: str, check: Callable[[torch.Tensor], None] | None = None) -> Callable[[], float]:
    """What makes one measurement of a run through `calls`, which do the same to different memory: microseconds of one.

    Everything has been compiled and tuned when this returns. On a GPU the calls are captured in a CUDA graph, whose
    replays are timed by events. `check` sees what each call writes over NaN.
    """
    for call in calls:
        call()
    replay, outputs = _captured(calls, device, 1)
    if check:
        for y in outputs:
            y.fill_(math.nan)
        replay()
        for y in outputs:
            check(y)
    replay()
    rounds = max(1, min(round(_SPAN / _seconds(replay, device)), 1024 // len(calls)))
    del replay, outputs
    replay, _ = _captured(calls, device, rounds)
    replay()
    return lambda: 1e6 * _seconds(replay, device) / (rounds * len(calls))


def _captured(calls: Sequence[Call], device: str, rounds: int) -> tuple[Callable[[], object], list[torch.Tensor]]:
    """What makes `rounds` runs through the calls, and where it leaves the outputs of the first."""
    if torch.device(device).type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = [call() for call in calls]
            for call in list(calls) * (rounds - 1):
                call()
        return graph.replay, outputs
    outputs = [call() for call in calls]

    def replay() -> None:
        for y, call in zip(outputs, calls, strict=True):
            y.copy_(call())
        for call in list(calls) * (rounds - 1):
            call()

    return replay, outputs


def _seconds(f: Callable[[], object], device: str) -> float:
    if torch.device(device).type != "cuda":
        began = time.perf_counter()
        f()
        return time.perf_counter() - began
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3
