# SPDX-License-Identifier: Apache-2.0
"""The noise kernels against the eager definition: interpreted here, run on a GPU where there is one (D1)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.methods.gaussws_launches import CASES

# The interpreter takes its time.
INTERPRETED = ["default", "lite, blocks of 16", "bfloat16 weights", "float16", "no cast", "uniform", "normal"]
INTERPRETED += ["stored as e2m1", "stored as e4m3", "blocks of 1 x 32"]

ROOT = Path(__file__).resolve().parents[2]
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], *cases: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.methods.gaussws_launches", *cases],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def test_interpreted_kernels_equal_the_definition_bit_for_bit() -> None:
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    done = run(INTERPRETER, *INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{case}: equal" for case in CASES if case in INTERPRETED]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_definition_bit_for_bit() -> None:
    done = run({})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{case}: equal" for case in CASES]
