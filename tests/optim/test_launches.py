# SPDX-License-Identifier: Apache-2.0
"""The kernels of a step against the eager definition: interpreted here, run on a GPU where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lowbits.formats import DYNAMIC4, DYNAMIC8, UDYNAMIC8
from lowbits.optim import Blockwise
from lowbits.optim._steps import SHIFTS, order, steps_of

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = ["AdamW8bit", "clipped", "AdamW4bit", "SGD8bit", "AdEMAMix8bit", "4 bits, blocks of 80"]
INTERPRETED += ["stochastic, blocks of 80", "AdamW8bit, Grid(int8, 1 a byte)", "Lion8bit, Grid(int2, 4 a byte)"]
INTERPRETED += ["AdamW8bit, Grid(ternary, 4 a byte), per channel", "AdamW4bit, Grid(int4, 2 a byte)"]

INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(environment: dict[str, str], program: str, *cases: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-m", f"tests.optim.{program}", *cases]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False
    )


def test_interpreted_kernels_equal_the_definition_bit_for_bit():
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    done = run(INTERPRETER, "launches", *INTERPRETED)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(done.stdout.splitlines()) == sorted(f"{case}: equal" for case in INTERPRETED)


def test_whatever_changes_between_two_steps_the_launches_notice():
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    done = run(INTERPRETER, "changes")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": done") == 11


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_equal_the_definition_bit_for_bit():
    done = run({}, "launches")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": equal") > 25


@pytest.mark.parametrize("book", [DYNAMIC8, UDYNAMIC8, DYNAMIC4], ids=lambda book: book.name)
def test_the_look_up_gives_the_codes_of_the_definition(book):
    """What the kernels do with the table, in torch, for every end of a code, its neighbours, and a million others."""
    codec = Blockwise(book)
    shift, table = SHIFTS[book], steps_of(codec)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 0x3F800001, (1_000_000,), generator=generator)
    places = torch.cat([bits, *(order(torch.tensor(book.boundaries)) + near for near in (-1, 0, 1))])
    if book.min < 0:
        places = torch.cat([places, -bits])
    y = torch.where(places < 0, places ^ 0x7FFFFFFF, places).to(torch.int32).view(torch.float32)
    whole = table.as_strided((2 * len(table),), (1,), 0)
    entries = whole[(places >> shift) + len(table)].long()
    codes = ((places & ((1 << shift) - 1)) + entries) >> shift
    assert torch.equal(order(y), places)
    assert torch.equal(codes, codec._codes(y).long())
