# SPDX-License-Identifier: Apache-2.0
"""Results files of these experiments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from lowbits.analysis import provenance


def write(name: str, content: dict[str, object], checks: Sequence[Check], device: torch.device) -> Path:
    """Write benchmarks/results/<device>/gaussws_<name>.json and print the claims."""
    return checks_file.write(f"gaussws_{name}", provenance(device), content, checks)
