# SPDX-License-Identifier: Apache-2.0
"""Let torch choose only algorithms that give the same bits every time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Switch torch's deterministic algorithms on for as long as the block lasts, where they are wanted.

    Args:
        wanted: False changes nothing.
    """
    if not wanted:
        yield
        return
    # cuBLAS reads it when it is first used; without it torch refuses its products.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
