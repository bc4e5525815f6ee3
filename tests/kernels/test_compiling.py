# SPDX-License-Identifier: Apache-2.0
"""Kernels compile for a GPU on machines that have none."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_compile() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = [sys.executable, "-W", "ignore", "-m", "tests.kernels.compiling"]
    found = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 0, (found.stdout + found.stderr)[-3000:]


REDUCTION = """
#blocked = #ttg.blocked<{sizePerThread = [1, 4], threadsPerWarp = [4, 8], warpsPerCTA = [1, 1], order = [1, 0]}>
#linear = #ttg.linear<{register = [], lane = [[0, 4], [0, 8], [0, 16], [1, 0], [0, 32]], warp = [], block = []}>
    %a = "tt.reduce"(%x) <{axis = AXIS : i32}> ({
    ^bb0(%l: f32, %r: f32):
      %m = arith.maximumf %l, %r : f32
      tt.reduce.return %m : f32
    }) : (tensor<2x1024xf32, LAYOUT>) -> tensor<2xf32, #ttg.slice<{dim = 1, parent = #linear}>>
"""


def test_reductions_over_lanes_that_are_not_neighbours_are_found() -> None:
    """Of this one Triton 3.6 made shuffles over lanes 0 to 3, and took half of each maximum from the other row."""
    pytest.importorskip("triton", reason="the gpu extra is not installed")
    from tests.kernels.compiling import torn_reductions

    def torn(axis: int, layout: str) -> list[str]:
        return torn_reductions(REDUCTION.replace("AXIS", str(axis)).replace("LAYOUT", layout))

    assert torn(1, "#linear") == ["#linear"]
    assert torn(0, "#linear") == torn(1, "#blocked") == []
    outer = "#ttg.slice<{dim = 0, parent = #linear}>"
    assert torn(0, outer) == [outer]
