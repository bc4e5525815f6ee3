# SPDX-License-Identifier: Apache-2.0
"""What every test shares: one thread a process, fixed seeds, no network, and the folder of real data."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

# Before torch is imported, and inherited by the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
# Wall time decides nothing here: a loaded machine must not fail a property.
settings.register_profile(
    "lowbits", deadline=None, derandomize="CI" in os.environ, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lowbits")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same global random state."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def compile_backend() -> str:
    """Return the backend to test `torch.compile` with: inductor, or capture alone where no C++ compiler is."""
    found = any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++"))
    return "inductor" if found else "aot_eager"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder of real data beside the repository, or skip the test."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder
