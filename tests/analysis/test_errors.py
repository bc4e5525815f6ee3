# SPDX-License-Identifier: Apache-2.0
"""Error statistics against numbers worked out by hand and float64 brute force."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from lowbits.analysis import TensorErrors, error_sums, tensor_errors
from lowbits.formats import E4M3, INT4, INT8, TERNARY
from lowbits.quantizers import (
    AbsMean,
    Asymmetric,
    Hadamard,
    PerColumn,
    PerGroup,
    PerRow,
    PowerOfTwo,
    QuantSpec,
    Rounding,
    quantize,
)


def test_sqnr_by_hand() -> None:
    # scale 7/7 = 1; codes 7, 1, 0; errors 0, 0.25, 0.4
    errors = tensor_errors(torch.tensor([[7.0, 1.25, 0.4]]), QuantSpec(INT4))
    noise, signal = 0.25**2 + 0.4**2, 7.0**2 + 1.25**2 + 0.4**2
    assert errors.sqnr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-6)
    assert errors.relative_error == pytest.approx(math.sqrt(noise / signal), rel=1e-6)
    assert errors.zero == pytest.approx(1 / 3)
    assert (errors.clipped, errors.amax) == (0.0, 7.0)


def test_zeros_are_not_flushed() -> None:
    # scale 127/127: 0.3 becomes 0, the zeros always were
    assert tensor_errors(torch.tensor([127.0, 1.0, 0.0, 0.0, 0.3]), QuantSpec(INT8)).zero == pytest.approx(1 / 3)


def test_clipped_counts_what_lies_beyond_the_grid() -> None:
    # mean |x| = 2: the grid ends at +-2; 5 lies beyond, -2 on its end
    x = torch.tensor([[5.0, -2.0, 0.5, 0.5]])
    assert tensor_errors(x, QuantSpec(TERNARY, PerRow(), AbsMean())).clipped == 0.25
    assert tensor_errors(-x, QuantSpec(TERNARY, PerRow(), AbsMean())).clipped == 0.25


@pytest.mark.parametrize(
    "spec",
    [
        QuantSpec(INT8, PerRow()),
        QuantSpec(INT4, PerColumn()),
        QuantSpec(INT4, PerGroup(16)),
        QuantSpec(E4M3),
        QuantSpec(INT4, PerRow(), PowerOfTwo()),
        QuantSpec(INT4, PerRow(), Asymmetric()),
    ],
    ids=str,
)
def test_against_float64(spec: QuantSpec) -> None:
    x = torch.randn(24, 48) * torch.logspace(-2, 2, 48)
    x_hat = quantize(x, spec).dequantize().double()
    relative = ((x.double() - x_hat).norm() / x.double().norm()).item()
    errors = tensor_errors(x, spec)
    assert errors.relative_error == pytest.approx(relative, rel=1e-5)
    assert errors.sqnr_db == pytest.approx(-20 * math.log10(relative), rel=1e-5)
    assert errors.zero == (x_hat == 0).double().mean().item()
    assert errors.amax == x.abs().max().item()
    if not isinstance(spec.scale, Asymmetric):  # rounding the zero point may shift the grid by half a step
        assert errors.clipped == 0.0


def test_a_rotation_does_not_change_what_a_fine_grid_loses() -> None:
    x = torch.randn(32, 64)
    spec = QuantSpec(INT8, PerRow(), transform=Hadamard(64))
    x_hat = quantize(x, spec).dequantize()
    assert tensor_errors(x, spec).relative_error == pytest.approx(((x - x_hat).norm() / x.norm()).item(), rel=1e-3)


def test_stochastic_rounding_is_measured_with_a_fixed_draw() -> None:
    x = torch.randn(16, 16)
    spec = QuantSpec(INT4, rounding=Rounding.STOCHASTIC)
    assert tensor_errors(x, spec) == tensor_errors(x, spec)
    assert tensor_errors(x, spec).sqnr_db < tensor_errors(x, QuantSpec(INT4)).sqnr_db


@pytest.mark.parametrize("magnitude", [1e-35, 1e-20, 1.0, 1e30])
def test_no_magnitude_under_or_overflows(magnitude: float) -> None:
    """Powers of two times a tensor lose the same share of it, while all is normal."""
    x = torch.randn(8, 64)
    scaled = tensor_errors(x * 2.0 ** round(math.log2(magnitude)), QuantSpec(INT8, PerRow()))
    assert scaled.relative_error == pytest.approx(tensor_errors(x, QuantSpec(INT8, PerRow())).relative_error, rel=1e-4)


def test_bias_is_the_share_by_which_a_tensor_grew() -> None:
    # mean |x| = 2: 5 becomes 2, -2 stays, 0.5 becomes 0: <x_hat, x> = 10 + 4, <x, x> = 25 + 4 + 0.5
    errors = tensor_errors(torch.tensor([[5.0, -2.0, 0.5, 0.5]]), QuantSpec(TERNARY, PerRow(), AbsMean()))
    assert errors.bias == pytest.approx(14 / 29.5 - 1)
    x = torch.randn(64, 256)
    # Unbiased: the mean of <x_hat - x, x> / <x, x> over 16,384 entries; a step is amax / 127 = 0.03, so its standard
    # deviation is at most 0.5 * 0.03 / sqrt(16384) = 1.2e-4.
    assert abs(tensor_errors(x, QuantSpec(INT8, rounding=Rounding.STOCHASTIC)).bias) < 4 * 1.2e-4


def test_sums_of_parts_are_those_of_the_whole() -> None:
    x, spec = torch.randn(12, 32), QuantSpec(INT4, PerRow())
    parts = [error_sums(part, quantize(part, spec)).tolist() for part in x.split(5)]
    whole = tensor_errors(x, spec)
    assert TensorErrors.of_sums(parts).as_json() == pytest.approx(whole.as_json(), rel=1e-5)


def test_overflow_of_the_quantizer_is_told_from_nonfinite_input() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    assert (tensor_errors(x, QuantSpec(INT8)).nonfinite, tensor_errors(x, QuantSpec(INT8)).overflowed) == (0.25, False)
    sums = error_sums(torch.ones(2), replace(quantize(torch.ones(2), QuantSpec(INT8)), scale=torch.tensor([math.inf])))
    errors = TensorErrors.of_sums([sums.tolist()])
    assert (errors.nonfinite, errors.overflowed) == (0.0, True)


def test_exact_empty_and_non_finite_tensors() -> None:
    exact = tensor_errors(torch.tensor([7.0, -3.0]), QuantSpec(INT4))
    assert (exact.sqnr_db, exact.relative_error) == (math.inf, 0.0)
    zeros = tensor_errors(torch.zeros(4, 4), QuantSpec(INT4))
    assert (zeros.sqnr_db, zeros.zero, zeros.clipped, zeros.amax) == (math.inf, 0.0, 0.0, 0.0)
    for bad in (math.nan, math.inf):
        assert math.isnan(tensor_errors(torch.tensor([1.0, bad]), QuantSpec(INT8)).sqnr_db)
    assert json.loads(json.dumps(exact.as_json(), allow_nan=False))["sqnr_db"] is None
