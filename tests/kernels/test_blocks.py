# SPDX-License-Identifier: Apache-2.0
"""The kernels of block formats give the definition's bits: on a GPU, and under Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = [sys.executable, "-W", "ignore", "-m", "tests.kernels.blocks"]
ROOT = Path(__file__).resolve().parents[2]


def run(**environment: str) -> str:
    found = subprocess.run(
        PROGRAM, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_interpreted_kernels_give_the_definitions_bits() -> None:
    assert "differ" not in run(TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_give_the_definitions_bits() -> None:
    assert "differ" not in run()
