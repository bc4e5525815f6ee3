# SPDX-License-Identifier: Apache-2.0
"""Say what a quantizer does to a tensor, in five numbers that do not depend on the tensor's scale or size."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lowbits.quantizers import Noise, QTensor, QuantSpec, Rounding, quantize


@dataclass(frozen=True)
class TensorErrors:
    """Errors of one quantized tensor.

    Args:
        sqnr_db: 10 log10( sum x^2 / sum (x - x_hat)^2 ); inf where nothing was lost.
        zero: share of the non-zero entries that became exactly 0, flushed away.
        clipped: share of the entries that lie beyond the ends of their group's grid.
        relative_error: ||x - x_hat|| / ||x||, Frobenius.
        amax: largest magnitude in the tensor.
    """

    sqnr_db: float
    zero: float
    clipped: float
    relative_error: float
    amax: float

    def as_json(self) -> dict[str, float | None]:
        """Return the fields with None for what is not finite, which JSON cannot hold."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def tensor_errors(x: Tensor, spec: QuantSpec) -> TensorErrors:
    """Quantize a tensor and measure what was lost.

    With a Hadamard transform, flushing and clipping are counted where they happen, after the transform; the other
    numbers are the same in either basis, since the transform is orthonormal.

    Args:
        x: float, `[..., K]`; the last axis is the one that the GEMM contracts. Not changed, not differentiated.
        spec: how it is quantized. Stochastic rounding is measured with one fixed draw.
    Returns:
        The five numbers; NaN where the tensor holds NaN or infinities.
    Raises:
        ShapeError: the granularity does not fit the shape.
    """
    q = quantize_once(x.detach(), spec)
    target = x.detach().float()
    if spec.transform is not None:
        target = spec.transform.forward(target)
    return _compare(target, q)


def quantize_once(x: Tensor, spec: QuantSpec) -> QTensor:
    """Quantize outside of any step: a stochastic spec takes one fixed draw.

    Args:
        x: as in `quantize`.
        spec: as in `quantize`.
    """
    if spec.rounding is Rounding.NEAREST:
        return quantize(x, spec)
    return quantize(x, spec, Noise.of(0, "analysis", "x").uniform(x.shape, 0, device=x.device))


def _compare(x: Tensor, q: QTensor) -> TensorErrors:
    x_hat = q.rotated()
    slack = 1e-6 * x_hat.abs()  # x / scale * scale differs from x in the last bits of float32
    over = (q.values == q.spec.format.max) & (x > x_hat + slack)
    under = (q.values == q.spec.format.min) & (x < x_hat - slack)
    nonzero = x != 0
    counts = [nonzero.sum(), (nonzero & (x_hat == 0)).sum(), (over | under).sum()]
    powers = [(x * x).sum(dtype=torch.float64), (x - x_hat).square().sum(dtype=torch.float64), x.abs().amax()]
    live, flushed, clipped, signal, noise, amax = torch.stack([t.double() for t in counts + powers]).tolist()
    relative = math.sqrt(noise / signal) if signal > 0 else noise
    return TensorErrors(
        sqnr_db=-20 * math.log10(relative) if relative > 0 else math.inf if relative == 0 else math.nan,
        zero=flushed / live if live else 0.0,
        clipped=clipped / x.numel(),
        relative_error=relative,
        amax=amax,
    )
