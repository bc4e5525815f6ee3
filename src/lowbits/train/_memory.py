# SPDX-License-Identifier: Apache-2.0
"""Ask how much memory this process has come to use."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak(device: torch.device) -> None:
    """Forget earlier peaks, so that `peak_bytes` speaks of what follows (on Linux and CUDA).

    Args:
        device: where the run computes.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # not Linux, or a sandbox: the peak is then that of the whole process
            _CLEAR.write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Return the peak since `reset_peak`: allocated on CUDA, resident memory of the process on a CPU.

    Args:
        device: where the run computes.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
