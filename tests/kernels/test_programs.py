# SPDX-License-Identifier: Apache-2.0
"""The kernels give the definition's bits: on a GPU, and under Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = pytest.mark.parametrize("program", ["blocks", "memory", "rows"])


def run(program: str, **environment: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{program}"]
    found = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@PROGRAMS
def test_interpreted_kernels_give_the_definitions_bits(program) -> None:
    assert "differ" not in run(program, TRITON_INTERPRET="1")


@pytest.mark.gpu
@PROGRAMS
def test_kernels_give_the_definitions_bits(program) -> None:
    assert "differ" not in run(program)
