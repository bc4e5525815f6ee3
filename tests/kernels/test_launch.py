# SPDX-License-Identifier: Apache-2.0
"""A kernel is looked up by what Triton compiles differently, and launched with the arguments at hand."""

from __future__ import annotations

import pytest
import torch

from lowbits.kernels import _launch

CPU = torch.device("cpu")


class Kernel:
    """Takes x and n, then the constant SIZE; remembers how it was launched."""

    arg_names = ("x", "n", "SIZE")

    def __init__(self) -> None:
        self.compiled, self.found = [], []

    def __getitem__(self, grid):
        def slowly(*arguments, **constants):
            self.compiled.append((grid, constants))
            return Found(self)

        return slowly


class Found:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.found.append((grid, arguments))


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(_launch, "_FOUND", {})
    return Kernel()


def start(kernel: Kernel, x: torch.Tensor, n: int, size: int = 4) -> bool:
    """Launch; return whether Triton was asked."""
    before = len(kernel.compiled)
    _launch.launch(kernel, (2, 1, 1), (x, n), lambda: {"SIZE": size, "num_warps": 4}, size, CPU)
    return len(kernel.compiled) > before


def test_the_second_launch_goes_past_triton_with_all_arguments(kernel):
    x, y = torch.zeros(64), torch.ones(64)
    assert start(kernel, x, 32) and not start(kernel, y, 48)
    ((grid, arguments),) = kernel.found
    assert grid == (2, 1, 1) and arguments[0] is y and arguments[1:] == (48, 4)


def test_what_triton_compiles_differently_is_not_mixed_up(kernel):
    x = torch.zeros(64)
    cases = [(x, 32), (x, 33), (x, 1), (x, 2**31 + 16), (x.bfloat16(), 32), (x[1:], 32)]
    assert all([start(kernel, *case) for case in cases]) and start(kernel, x, 32, size=8)
    assert not any(start(kernel, *case) for case in cases) and not start(kernel, x, 17)
