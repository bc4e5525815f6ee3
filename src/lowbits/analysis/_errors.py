# SPDX-License-Identifier: Apache-2.0
"""Say what a quantizer does to a tensor, in a few numbers that do not depend on the tensor's scale or size.

They come from sums that are taken where the tensor is and add up over parts of a tensor, micro-batches and processes.
`error_sums` waits for no device, so that a whole model can be measured with one transfer at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from lowbits.quantizers import Noise, QTensor, QuantSpec, quantize


@dataclass(frozen=True)
class TensorErrors:
    """Errors of one quantized tensor.

    Args:
        sqnr_db: 10 log10( sum x^2 / sum (x - x_hat)^2 ); inf where nothing was lost.
        zero: share of the non-zero entries that became exactly 0, flushed away.
        clipped: share of the entries that lie beyond the ends of their group's grid.
        relative_error: ||x - x_hat|| / ||x||, Frobenius.
        amax: largest magnitude in the tensor.
        bias: <x_hat, x> / <x, x> - 1, the share by which the tensor grew, or shrank (negative). 0 on average for
            unbiased rounding; clipping shrinks.
        nonfinite: share of the entries that are NaN or infinite.
    """

    sqnr_db: float
    zero: float
    clipped: float
    relative_error: float
    amax: float
    bias: float
    nonfinite: float

    @staticmethod
    def of_sums(rows: Sequence[Sequence[float]]) -> TensorErrors:
        """Return the errors of a tensor from the sums of its parts.

        Args:
            rows: what `error_sums` returned for each part, on the host; at least one.
        """
        *sums, largest = zip(*rows, strict=True)
        count, live, flushed, clipped, bad, signal, noise, restored = map(sum, sums)
        relative = math.sqrt(noise / signal) if signal > 0 else noise
        return TensorErrors(
            sqnr_db=-20 * math.log10(relative) if relative > 0 else math.inf if relative == 0 else math.nan,
            zero=flushed / live if live else 0.0,
            clipped=clipped / count,
            relative_error=relative,
            amax=math.nan if any(map(math.isnan, largest)) else max(largest),
            # By the law of cosines, which needs no product of the two tensors.
            bias=(restored - signal - noise) / (2 * signal) if signal > 0 else 0.0,
            nonfinite=bad / count,
        )

    @property
    def overflowed(self) -> bool:
        """Whether the tensor is finite and its quantized form is not."""
        return self.nonfinite == 0 and not math.isfinite(self.relative_error)

    def as_json(self) -> dict[str, float | None]:
        """Return the fields to six digits, with None for what is not finite, which JSON cannot hold."""
        return {name: float(f"{v:.6g}") if math.isfinite(v) else None for name, v in asdict(self).items()}


def tensor_errors(x: Tensor, spec: QuantSpec) -> TensorErrors:
    """Quantize a tensor and measure what was lost.

    With a Hadamard transform, errors are counted where they happen, after the transform; it is orthonormal, so that
    their norms are the same in either basis.

    Args:
        x: float, `[..., K]`; the last axis is the one that the GEMM contracts. Not changed, not differentiated.
        spec: how it is quantized. Stochastic rounding is measured with one fixed draw.
    Returns:
        The numbers; NaN where the tensor holds NaN or infinities.
    Raises:
        ShapeError: the granularity does not fit the shape.
    """
    x = x.detach()
    return TensorErrors.of_sums([error_sums(x, quantize_once(x, spec)).tolist()])


@torch.no_grad()
def error_sums(x: Tensor, q: QTensor) -> Tensor:
    """Return the sums that `TensorErrors.of_sums` takes, without waiting for the device.

    Norms are taken of tensors divided by amax, row by row in float32 and over the rows in float64: no magnitude
    under- or overflows, and a million entries lose no digit that matters.

    Args:
        x: float, `[..., K]`, what was quantized.
        q: what became of it.
    Returns:
        float64 `[9]`: entries, those not zero, flushed, clipped, not finite, sum x^2, sum (x - x_hat)^2, sum x_hat^2,
        amax.
    """
    target = x.float() if q.spec.transform is None else q.spec.transform.forward(x)
    x_hat = q.rotated()
    error = target - x_hat
    amax = target.abs().amax()
    unit = torch.where(amax > 0, amax, 1.0)
    live = target != 0
    counts = [live, live & (x_hat == 0), _clipped(error, x_hat, q), target - target]  # NaN and inf less themselves: NaN
    norms = [torch.linalg.vector_norm(t / unit, dim=-1).double() * unit for t in (target, error, x_hat)]
    return torch.stack(
        [
            amax.new_full((), x.numel(), dtype=torch.float64),
            *(torch.count_nonzero(t).double() for t in counts),
            *(norm.square().sum() for norm in norms),
            amax.double(),
        ]
    )


def quantize_once(x: Tensor, spec: QuantSpec) -> QTensor:
    """Quantize outside of any step: a stochastic spec takes one fixed draw.

    Args:
        x: as in `quantize`.
        spec: as in `quantize`.
    """
    return quantize(x, spec, spec.draw(Noise.of(0, "analysis", "x"), x.shape, 0, device=x.device))


def _clipped(error: Tensor, x_hat: Tensor, q: QTensor) -> Tensor:
    """Where an entry lies beyond an end of the grid."""
    slack = 1e-6 * x_hat.abs()  # x / scale * scale differs from x in the last bits of float32
    over = (q.values == q.spec.format.max) & (error > slack)
    return over | ((q.values == q.spec.format.min) & (error < -slack))
