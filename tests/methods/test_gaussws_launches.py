# SPDX-License-Identifier: Apache-2.0
"""The noise kernels against the eager definition: interpreted here, run on a GPU where there is one (D1)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbits.methods.gaussws import Plan, PseudoNoise, Storage
from tests.methods.gaussws_launches import CASES

# The interpreter takes its time: a program a row, and formats that differ in their constants alone, are left out.
LEFT_OUT = ("blocks of 1 x 32", "stored as e2m3", "stored as e3m4", "stored as e4m7")
INTERPRETED = [case for case in CASES if case not in LEFT_OUT]

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


def test_kernels_compile_for_a_gpu_that_need_not_be_there() -> None:
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    from lowbits.methods._pseudo_noise import _launch
    from tests.kernels.compiling import compiling

    w, counter = torch.randn(64, 96), torch.tensor([1, 2, 3])
    with compiling() as seen:
        for plan in (Plan(), Plan(noise=PseudoNoise.NORMAL, storage=Storage.E3M2, block=(16, 16))):
            b_i = torch.ones(64 // plan.block[0], 96 // plan.block[1])
            y, slopes = _launch.add_noise(w, b_i, counter, plan, (0, 0), torch.bfloat16)
            _launch.gradients(y, counter, slopes, plan, (0, 0), torch.float32)
        _launch.draw(counter, Plan(noise=PseudoNoise.UNIFORM), (64, 96))
    assert len(seen) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_definition_bit_for_bit() -> None:
    done = run({})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines() == [f"{case}: equal" for case in CASES]
