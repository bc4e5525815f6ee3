# SPDX-License-Identifier: Apache-2.0
"""Rounding to levels against the oracle: codes, values, counts, errors, tails, and the three gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbits.errors import ShapeError, SpecError
from lowbits.export import bucketed, flattened, num_buckets
from lowbits.methods.distillation import Backward, Levels, encode, round_to_levels
from lowbits.quantizers import Noise, PerBlock, PerColumn, PerGroup, PerRow, PerTensor, Rounding
from tests.oracles import distillation as oracle

ALL_BUCKETS = [PerTensor(), PerRow(), PerBlock(7), PerBlock(256), PerGroup(4)]
weights = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40)


def tensor(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


@given(values=weights, count=st.integers(2, 20), size=st.integers(1, 50))
def test_codes_and_values_are_the_oracles(values: list[float], count: int, size: int) -> None:
    w = tensor(values).double()  # the oracle computes in float64 as well, so the codes are equal, not nearly so
    coded = encode(w, Levels(count, PerBlock(size)))
    expected = [oracle.uniform_codes(bucket, count) for bucket in oracle.buckets(values, size)]
    assert coded.codes.tolist() == sum(expected, [])
    points = oracle.uniform_points(count)
    rebuilt = [oracle.rebuild(c, points, b) for c, b in zip(expected, oracle.buckets(values, size), strict=True)]
    assert torch.allclose(coded.dequantize(), torch.tensor(sum(rebuilt, []), dtype=torch.float64), atol=1e-12)


@given(values=weights, count=st.integers(2, 300), size=st.integers(1, 50))
def test_levels_of_a_bucket(values: list[float], count: int, size: int) -> None:
    w, levels = tensor(values), Levels(count, PerBlock(size))
    q = round_to_levels(w, levels)
    for bucket, rounded in zip(w.split(size), q.split(size), strict=True):
        assert len(rounded.unique()) <= count
        assert rounded.min() == bucket.min() and rounded.max() == bucket.max()
        exact = (bucket.double() - rounded.double()).abs().max()
        # half a step; three float32 operations on numbers up to 100, each off by half a unit in the last place
        assert exact <= (bucket.max() - bucket.min()).double() / (2 * (count - 1)) + 3 * 100 * 2.0**-24
    assert torch.equal(encode(w, levels).dequantize(), q)  # what is stored is what was trained on, bit for bit


@given(values=weights, count=st.integers(2, 20), size=st.integers(1, 50))
def test_rounding_twice_is_rounding_once(values: list[float], count: int, size: int) -> None:
    levels = Levels(count, PerBlock(size))
    once = round_to_levels(tensor(values), levels)
    assert torch.allclose(round_to_levels(once, levels), once, rtol=0, atol=1e-6 * 200)


def test_a_constant_and_a_narrow_bucket_keep_their_values() -> None:
    w = torch.cat([torch.full((5,), 0.3), torch.tensor([1.0, 1.0 + 2**-23, 1.0, 1.0, 1.0]), torch.zeros(3)])
    assert torch.equal(round_to_levels(w, Levels(2, PerBlock(5))), w)


@pytest.mark.parametrize("buckets", ALL_BUCKETS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (255,), (256,), (257,), (5, 6), (3, 2, 3, 3), (2, 1), (1, 300)])
def test_the_filling_of_a_tail_changes_nothing(buckets: PerBlock, shape: tuple[int, ...]) -> None:
    w = torch.randn(shape)
    view = bucketed(w, buckets)
    assert torch.equal(flattened(view, shape, buckets), w) and view.shape[0] == num_buckets(shape, buckets)
    rows = w.reshape(shape[0], -1) if isinstance(buckets, PerRow | PerGroup) and len(shape) > 1 else w.reshape(1, -1)
    size = getattr(buckets, "size", rows.shape[1])
    pieces = [piece for row in rows for piece in row.split(size)]
    assert [p.min().item() for p in pieces] == view.amin(1).tolist()
    assert [p.max().item() for p in pieces] == view.amax(1).tolist()
    coded = encode(w, Levels(4, buckets))
    assert coded.codes.numel() == w.numel() and torch.equal(coded.dequantize(), round_to_levels(w, Levels(4, buckets)))


def test_rows_are_independent_under_row_buckets() -> None:
    w = torch.randn(6, 40)
    for buckets in (PerGroup(16), PerRow()):
        q = round_to_levels(w, Levels(4, buckets))
        assert torch.equal(round_to_levels(w[[0, 2, 5]], Levels(4, buckets)), q[[0, 2, 5]])


@given(values=weights, count=st.integers(2, 20), size=st.integers(1, 50), step=st.integers(0, 1000))
def test_stochastic_codes_are_the_oracles(values: list[float], count: int, size: int, step: int) -> None:
    w = tensor(values).double()
    u = Noise.of(0, "w", "levels").uniform(w.shape, step).double()
    q = round_to_levels(w, Levels(count, PerBlock(size), Rounding.STOCHASTIC), u)
    cut = zip(oracle.buckets(values, size), oracle.buckets(u.tolist(), size), strict=True)
    points = oracle.uniform_points(count)
    expected = sum((oracle.rebuild(oracle.stochastic_codes(b, count, n), points, b) for b, n in cut), [])
    assert torch.allclose(q, torch.tensor(expected, dtype=torch.float64), atol=1e-12)


def test_stochastic_rounding_is_unbiased_with_the_stated_variance() -> None:
    w, draws, n = torch.tensor([0.0, 0.05, 0.21, 0.4, 0.77, 1.0]), 40_000, 3
    rows = w.expand(draws, -1)
    noise = Noise.of(1, "w", "levels").uniform(rows.shape, 0)
    q = round_to_levels(rows, Levels(n + 1, PerRow(), Rounding.STOCHASTIC), noise).double()
    f = (w.double() * n) % 1
    variance = f * (1 - f) / n**2
    assert ((q.mean(0) - w).abs() <= 4 * (variance / draws).sqrt() + 1e-7).all()
    assert ((q.var(0) - variance).abs() <= 0.05 * variance + 1e-12).all()
    assert ((q - w).abs() <= 1 / n + 1e-6).all()


def test_straight_through_is_the_gradient_at_the_rounded_weight() -> None:
    w, x = torch.randn(8, 300, requires_grad=True), torch.randn(5, 300)
    q = round_to_levels(w, Levels(4))
    (x @ q.t()).square().sum().backward()
    at_q = q.detach().requires_grad_()
    (x @ at_q.t()).square().sum().backward()
    assert torch.equal(w.grad, at_q.grad)


def test_truncated_gradient_stops_outside_one() -> None:
    w = torch.tensor([-3.0, -1.0, 0.2, 1.0, 1.5], requires_grad=True)
    q = round_to_levels(w, Levels(3), backward=Backward.TRUNCATED)
    q.sum().backward()
    assert q.tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0] and w.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("buckets", ALL_BUCKETS, ids=str)
def test_range_aware_gradient_is_autograds(buckets: PerBlock) -> None:
    w = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    g = torch.randn(5, 11, dtype=torch.float64)
    q = round_to_levels(w, Levels(4, buckets), backward=Backward.RANGE_AWARE)
    (found,) = torch.autograd.grad(q, w, g)
    view = bucketed(w, buckets)
    low, high = view.amin(1, keepdim=True), view.amax(1, keepdim=True)
    scaled = (view - low) / torch.where(high > low, high - low, 1)
    moved = (scaled * 3).round() / 3 - scaled
    expected = flattened((high - low) * (scaled + moved.detach()) + low, w.shape, buckets)
    assert torch.allclose(q, expected, atol=1e-12)
    (wanted,) = torch.autograd.grad(expected, w, g)
    assert (found - wanted).abs().max() <= 1e-10


@pytest.mark.parametrize("backward", Backward)
def test_low_precision_weights_keep_their_dtype(backward: Backward) -> None:
    w = torch.randn(300).bfloat16().requires_grad_()
    q = round_to_levels(w, Levels(4), backward=backward)
    q.sum().backward()
    assert q.dtype == w.grad.dtype == torch.bfloat16
    if backward is Backward.STRAIGHT_THROUGH:
        assert torch.equal(encode(w, Levels(4)).dequantize(), q)


def test_bad_input_is_named() -> None:
    with pytest.raises(SpecError, match="2 to 65,536"):
        Levels(1)
    for rounding in set(Rounding) - {Rounding.NEAREST, Rounding.STOCHASTIC}:
        with pytest.raises(SpecError, match=r"Rounding\.NEAREST or Rounding\.STOCHASTIC"):
            Levels(4, rounding=rounding)
    with pytest.raises(SpecError, match="takes noise"):
        round_to_levels(torch.ones(3), Levels(2, rounding=Rounding.STOCHASTIC))
    with pytest.raises(ShapeError, match="at least one element"):
        round_to_levels(torch.ones(0), Levels(2))
    with pytest.raises(ShapeError, match="noise has shape"):
        round_to_levels(torch.ones(3), Levels(2, rounding=Rounding.STOCHASTIC), torch.ones(2))
    with pytest.raises(SpecError, match="floating point"):
        round_to_levels(torch.ones(3, dtype=torch.int64), Levels(2))
    with pytest.raises(SpecError, match="per tensor, row, block or group"):
        round_to_levels(torch.ones(3, 3), Levels(2, PerColumn()))  # type: ignore[arg-type]


def test_what_is_not_finite_is_seen() -> None:
    q = round_to_levels(torch.tensor([1.0, torch.nan, 2.0, 3.0]), Levels(2, PerBlock(2)))
    assert q[:2].isnan().all() and q[2:].isfinite().all()
