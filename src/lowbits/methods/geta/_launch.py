# SPDX-License-Identifier: Apache-2.0
"""The kernels of `lowbits.kernels.geta`, where they can run: plain contiguous tensors on CUDA.

A quantizer is some forty small operators forward and backward, which a GPU starts one by one; as kernels it is three.
Doomed slices are four operators a parameter, as kernels three for all parameters.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor, nn

_BLOCK, _SLICE_BLOCK = 2048, 1024
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@cache
def _kernels() -> ModuleType | None:
    """The kernels, None where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lowbits.kernels import geta

    return geta


def launchable(x: Tensor, *scalars: Tensor) -> bool:
    """Whether the kernels can take a tensor: on CUDA, or on a CPU where Triton interprets (only tests do).

    Tracing goes by the definition: torch.compile and torch.export cannot look into a kernel, and they pass tensors of
    other classes or say that they compile.
    """
    plain = type(x) in (Tensor, nn.Parameter) and x.dtype in _FLOATS and x.is_contiguous() and x.numel() > 0
    if not plain or torch.compiler.is_compiling() or any(s.dtype != torch.float32 for s in scalars):
        return False
    if x.is_cuda:
        return all(s.device == x.device for s in scalars) and _kernels() is not None
    loaded = sys.modules.get("lowbits.kernels.geta")
    return loaded is not None and bool(loaded.INTERPRETED)


def quantize(x: Tensor, step: Tensor, limit: Tensor, exponent: Tensor) -> Tensor:
    """Return x on the grid; see `lowbits.methods.geta.quantize`."""
    kernels = _kernels()
    assert kernels is not None
    out = torch.empty_like(x)
    with torch.cuda.device_of(x):
        kernels.quantize[(_programs(x),)](x, step, limit, exponent, out, x.numel(), BLOCK=_BLOCK)
    return out


def gradients(
    x: Tensor, g: Tensor, scalars: tuple[Tensor, Tensor, Tensor], share: float, mapped: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and those of step, limit and exponent times `share`, float32 `[3]`."""
    kernels = _kernels()
    assert kernels is not None
    grad_x = torch.empty_like(x)
    partial = torch.empty(_programs(x), 3, device=x.device)
    with torch.cuda.device_of(x):
        kernels.gradients[(_programs(x),)](
            x, g.contiguous(), *scalars, grad_x, partial, x.numel(), share, MAPPED=mapped, BLOCK=_BLOCK
        )
    return grad_x, partial.sum(0)


def _programs(x: Tensor) -> int:
    return -(-x.numel() // _BLOCK)


@dataclass(frozen=True)
class Slices:
    """Slices of one parameter along one axis.

    Args:
        parameter: float32.
        axis: number of the axis.
        rows: int64, on the parameter's device.
        layer: number of the quantizer; -1 without.
        dimension: number of the dimension.
    """

    parameter: Tensor
    axis: int
    rows: Tensor
    layer: int = -1
    dimension: int = 0

    @property
    def length(self) -> int:
        """Number of elements."""
        return self.parameter.numel() // self.parameter.shape[self.axis] * len(self.rows)


class Table:
    """What the kernels for slices of many parameters read; a launch, however many there are.

    Args:
        slices: at least one, of parameters that `takes` says yes to.
        own: 1 for every element of all slices in order, 0 where earlier slices have it as well; None if none have.
    """

    def __init__(self, slices: Sequence[Slices], own: Tensor | None = None) -> None:
        self.slices, self.device = slices, slices[0].parameter.device
        lengths = [s.length for s in slices]
        self.total = sum(lengths)
        self.chunk_counts = [-(-length // _SLICE_BLOCK) for length in lengths]
        first = [torch.arange(count) * _SLICE_BLOCK for count in self.chunk_counts]
        number = torch.arange(len(slices)).repeat_interleave(torch.tensor(self.chunk_counts))
        self.chunks = torch.stack([number, torch.cat(first)], 1).to(self.device)
        self.counts = torch.tensor(self.chunk_counts, device=self.device)
        self.own = None if own is None else own.to(self.device, torch.uint8)
        self.addresses: list[int] = []
        self.pieces = self.chunks  # until the first launch

    @staticmethod
    def takes(parameters: Iterable[Tensor]) -> bool:
        """Whether the kernels can work on all of some parameters."""
        found = list(parameters)
        return bool(found) and all(
            launchable(p, p) and p.device == found[0].device and p.dtype == torch.float32 for p in found
        )

    def gather(self) -> Tensor:
        """Return all elements, float32 `[n]`, 0 where earlier slices have them."""
        out = torch.empty(self.total, device=self.device)
        self._launch("gather", self._own, out, OWN=self.own is not None)
        return out

    def products(self, gradients: Sequence[Tensor], before: Tensor, scalars: Tensor) -> Tensor:
        """Return the five sums of `Doomed.products` for every one of the slices, float32 `[P, 5]`."""
        held = [g.float().contiguous() for g in gradients]
        addresses = torch.tensor([g.data_ptr() for g in held])
        addresses = (addresses.pin_memory() if self.device.type == "cuda" else addresses).to(
            self.device, non_blocking=True
        )
        partial = torch.empty(len(self.chunks), 5, device=self.device)
        self._launch("products", scalars, before, self._own, partial, OWN=self.own is not None, second=addresses)
        return torch.segment_reduce(partial, "sum", lengths=self.counts, axis=0, unsafe=True)

    def decay_(self, before: Tensor, scalars: Tensor, steps: Tensor, rates: Tensor) -> None:
        """x <- x - gamma x^Q."""
        self._launch("decay", scalars, steps.contiguous(), rates.contiguous(), before, self._own,
                     OWN=self.own is not None)  # fmt: skip

    def clear_(self) -> None:
        """x <- 0."""
        self._launch("clear")

    @property
    def _own(self) -> Tensor:
        return self.chunks if self.own is None else self.own

    def _launch(self, name: str, *arguments: Tensor, second: Tensor | None = None, **constants: bool) -> None:
        kernels = _kernels()
        assert kernels is not None
        addresses = [s.parameter.data_ptr() for s in self.slices]
        if addresses != self.addresses:
            self.addresses, self.pieces = addresses, self._rows(addresses).to(self.device)
        first = (self.pieces,) if second is None else (self.pieces, second)
        with torch.cuda.device_of(self.pieces):
            getattr(kernels, name)[(len(self.chunks),)](
                *first, self.chunks, *arguments, **constants, BLOCK=_SLICE_BLOCK, enable_fp_fusion=False
            )

    def _rows(self, addresses: Sequence[int]) -> Tensor:
        rows, base = [], 0
        for s, address in zip(self.slices, addresses, strict=True):
            inner = math.prod(s.parameter.shape[s.axis + 1 :])
            rows.append([address, s.rows.data_ptr(), len(s.rows), s.parameter.shape[s.axis], inner, s.length, base,
                         s.layer, s.dimension])  # fmt: skip
            base += s.length
        return torch.tensor(rows, dtype=torch.int64)
