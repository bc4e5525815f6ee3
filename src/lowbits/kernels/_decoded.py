# SPDX-License-Identifier: Apache-2.0
"""An operand in the numbers that a simulated GEMM multiplies."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbits.quantizers import PackedTensor, QuantSpec


@dataclass(frozen=True)
class Decoded:
    """An operand as a GEMM multiplies it:  x ~ inner * outer, in the spec's basis.

    Args:
        inner: [R, padded K], rounded to the compute dtype; exact in it where `outer` is not None.
        outer: float32 [R, 1] or [1, 1], or None for 1.
        spec: how it was made.
        packed: the same as stored codes, where they were asked for.
    """

    inner: Tensor
    outer: Tensor | None
    spec: QuantSpec
    packed: PackedTensor | None = None

    def factors(self) -> tuple[Tensor, Tensor | None]:
        """See `QTensor.factors`."""
        return self.inner, self.outer

    def dequantize(self) -> Tensor:
        """See `QTensor.dequantize`; for operands that are not rotated."""
        assert self.spec.transform is None
        inner = self.inner.float()
        return inner if self.outer is None else inner * self.outer
