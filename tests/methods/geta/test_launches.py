# SPDX-License-Identifier: Apache-2.0
"""The quantizer's kernels against the eager definition: interpreted here, run on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.methods.geta.launches"],
        cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == "equal\n", done.stdout + done.stderr


def test_interpreted_kernels_are_the_definition() -> None:
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    run(INTERPRETER)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_are_the_definition() -> None:
    run({})
