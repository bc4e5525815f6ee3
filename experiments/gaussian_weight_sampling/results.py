# SPDX-License-Identifier: Apache-2.0
"""Results files of these experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from lowbits.analysis import provenance


def save(name: str, content: dict[str, object], checks: Sequence[Check], device: str) -> Path:
    """Write benchmarks/results/<device>/gaussws_<name>.json."""
    told = provenance(torch.device(device))
    return checks_file.save(f"gaussws_{name}", told, content, checks, checks_file.RESULTS)


def write(name: str, content: dict[str, object], checks: Sequence[Check], device: str) -> Path:
    """Write it, and print the claims."""
    path = save(name, content, checks, device)
    checks_file.tell(path, checks)
    return path
