# SPDX-License-Identifier: Apache-2.0
"""The kernel of levels against the eager definition: interpreted here, compiled for a GPU, run where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.methods.distillation.levels_launches import CASES

ROOT = Path(__file__).resolve().parents[3]
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
triton = pytest.importorskip("triton", reason="the gpu extra is not installed")


def run(environment: dict[str, str], *words: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.methods.distillation.levels_launches", *words],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_interpreted_kernels_equal_the_definition_bit_for_bit() -> None:
    assert run(INTERPRETER) == [f"{case}: equal" for case in CASES]


@pytest.mark.slow
def test_kernels_compile() -> None:
    assert run({"TRITON_INTERPRET": "0"}, "compile") == ["compiled: 12 kernels"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_definition_bit_for_bit() -> None:
    assert run({}) == [f"{case}: equal" for case in CASES]
