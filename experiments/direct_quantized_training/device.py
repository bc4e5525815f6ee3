# SPDX-License-Identifier: Apache-2.0
"""The GPU, or the CPU on which every command can be tried at a tiny size: peaks are 0 there, times say nothing."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"


@dataclass
class Span:
    """What a block of code took.

    Args:
        seconds: until the device had finished.
        peak: most bytes that the allocator held meanwhile.
        resident: bytes that it holds afterwards.
    """

    seconds: float = 0.0
    peak: int = 0
    resident: int = 0


@contextmanager
def measured() -> Iterator[Span]:
    """Measure a block; the device has finished what came before."""
    span = Span()
    if ON_GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    yield span
    if ON_GPU:
        torch.cuda.synchronize()
        span.peak, span.resident = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    span.seconds = time.perf_counter() - begin


def clear() -> int:
    """Give everything back, and return how many bytes there are to have. Hooks of updates in backward tie cycles."""
    gc.collect()
    if not ON_GPU:
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]
