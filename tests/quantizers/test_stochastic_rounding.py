# SPDX-License-Identifier: Apache-2.0
"""Stochastic rounding with 24 and 8 random bits: exact probabilities, bias, independence (C7, C8, W6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lowbits.formats import E2M1, E4M3
from lowbits.quantizers import BlockRounding, Hadamard, Noise, PerGroup, QuantSpec, Rounding, TwoLevel, quantize
from tests.oracles import nvfp4 as oracle

STOCHASTIC = [rounding for rounding in Rounding if rounding is not Rounding.NEAREST]
ROUNDINGS = pytest.mark.parametrize("rounding", STOCHASTIC, ids=lambda r: r.value)


def spec_of(rounding: Rounding, blocks: BlockRounding = BlockRounding.NEAREST) -> QuantSpec:
    return QuantSpec(E2M1, PerGroup(16), TwoLevel(rounding=blocks), rounding)


@dataclass(frozen=True)
class Known(Noise):
    """Random bits that are known: 0, 1, 2, ... as bytes, or their 2^24 multiples as words."""

    key: tuple[Tensor | int, Tensor | int] = (0, 0)

    def bits8(self, shape, step, *, offset=0, device="cpu"):
        return torch.arange(math.prod(shape)).view(shape) % 256

    def bits(self, shape, step, *, offset=0, device="cpu"):
        return self.bits8(shape, step) << 24


def up_of_256(fraction: float, rounding: Rounding) -> int:
    """How many of 256 equally likely draws round 1 + fraction / 2 (between 1 and 1.5) away from zero."""
    noise = QuantSpec(E2M1, rounding=rounding).draw(Known(), (256,), 0)
    rounded = E2M1.project(torch.full((256,), 1 + fraction / 2), noise)
    assert set(rounded.tolist()) <= {1.0, 1.5}
    return int((rounded == 1.5).sum())


fractions = (
    st.integers(0, 2**22 - 1)
    | st.integers(0, 255).map(lambda k: k << 14)
    | st.integers(1, 255).map(lambda k: (k << 14) - 1)
)  # of 2^22: what a float32 between 1 and 1.5 can say; multiples of 1/256 and what is just below them


@given(fractions)
def test_8_bits_give_exactly_the_published_probabilities(numerator):
    fraction = numerator * 2.0**-22
    # floor(fraction + k / 256) over k = 0 .. 255, and the same with half a unit more.
    assert up_of_256(fraction, Rounding.STOCHASTIC_8BIT_FLOOR) == math.floor(256 * fraction)
    centred = sum(math.floor(fraction + (k + 0.5) / 256) for k in range(256))
    assert abs(up_of_256(fraction, Rounding.STOCHASTIC_8BIT) - centred) <= (fraction * 512 % 2 == 1)  # a tie of noise


@given(st.integers(0, 255), st.integers(0, 2**23 - 1))
def test_24_bits_round_up_below_the_fraction(k, numerator):
    fraction = numerator * 2.0**-22 / 2
    noise = QuantSpec(E2M1, rounding=Rounding.STOCHASTIC).draw(Known(), (256,), 0)
    assert noise is not None and noise[k].item() == k / 256  # the top 24 of 32 bits
    y = torch.tensor([1 + fraction / 2])
    assert E2M1.project(y, noise[k : k + 1]).item() == (1.5 if k / 256 < 2 * (y.item() - 1) else 1.0)


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_transformer_engines_bits_give_its_numbers(seed, tight):
    # It rounds up where k / 256 >= 1 - fraction; here k counts down, which is the same distribution.
    random = np.random.default_rng(seed)
    y = random.uniform(-6, 6, 512).astype(np.float32)
    if tight:  # fractions at, or one unit below, multiples of 1/256
        y = (random.integers(-3072, 3073, 512) / 512).astype(np.float32)
        y = np.where(random.random(512) < 0.5, np.nextafter(y, np.float32(0)), y)
    noise = QuantSpec(E2M1, rounding=Rounding.STOCHASTIC_8BIT_FLOOR).draw(Known(), (512,), 0)
    theirs = oracle.stochastic(y, (255 - np.arange(512) % 256) / 256)
    assert np.array_equal(E2M1.project(torch.from_numpy(y), noise).numpy(), theirs)


def test_8_bit_floor_is_biased_towards_zero_and_centred_is_not():
    steps = (torch.arange(1 << 13).double() + 0.5) * 2.0**-13
    y = (1 + steps / 2).float().repeat(256, 1).t().contiguous()
    for rounding, mean, worst in (
        (Rounding.STOCHASTIC_8BIT_FLOOR, -1 / 512, 1 / 256),
        (Rounding.STOCHASTIC_8BIT, 0.0, 1 / 512),
    ):
        noise = QuantSpec(E2M1, rounding=rounding).draw(Known(), (256,), 0)
        assert noise is not None
        error = (E2M1.project(y, noise.expand_as(y)).double().mean(1) - 1) * 2 - steps  # in steps, exact expectation
        assert error.mean().item() == pytest.approx(mean, abs=1e-5)  # section 2.1: -0.0019
        assert error.abs().max() <= worst


@ROUNDINGS
@pytest.mark.parametrize(("y", "lower", "upper", "share"), [(2.3, 2, 3, 0.3), (4.5, 4, 6, 0.25), (-0.1, 0, -0.5, 0.2)])
def test_w6_shares_of_the_neighbours(rounding, y, lower, upper, share):
    n = 1 << 16
    spec = QuantSpec(E2M1, rounding=rounding)
    noise = spec.draw(Noise.of(0, "w6", rounding.value), (n,), 0)
    rounded = E2M1.project(torch.full((n,), y), noise)
    assert set(rounded.unique().tolist()) == {lower, upper}
    # Four standard errors, and what 8 bits cannot say.
    assert abs((rounded == upper).double().mean().item() - share) < 4 * (share * (1 - share) / n) ** 0.5 + 1 / 256


@ROUNDINGS
@given(seed=st.integers(0, 2**32 - 1))
def test_c7_only_the_two_neighbours(rounding, seed):
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    spec = spec_of(rounding)
    q = quantize(x, spec, spec.draw(Noise.of(seed, "x", "r"), x.shape, 0))
    assert q.outer is not None
    y = (x.view(4, 4, 16).double() / (q.scale * q.outer)).flatten(1).clamp(-6, 6)
    grid = torch.tensor(sorted({*oracle.E2M1, *-oracle.E2M1}), dtype=torch.float64)
    slack = 6 * 4 * 2**-24  # x is multiplied by a rounded reciprocal there and divided here: four roundings
    lower = grid[(torch.searchsorted(grid, y - slack, right=True) - 1).clamp(0, len(grid) - 1)]
    upper = grid[torch.searchsorted(grid, y + slack).clamp(0, len(grid) - 1)]
    # Between them lies at most the point that y is, but for the slack.
    assert ((lower <= q.values) & (q.values <= upper)).all() and torch.isin(q.values.double(), grid).all()


@ROUNDINGS
def test_c7_the_mean_of_many_draws(rounding):
    n = 400
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    spec = spec_of(rounding, BlockRounding.UP)  # which clips nothing
    noise = Noise.of(1, "x", "mean")
    draws = [quantize(x, spec, spec.draw(noise, x.shape, step)) for step in range(n)]
    scale = draws[0].scale * draws[0].outer
    y = x.view(16, 4, 16).double() / scale
    mean = torch.stack([q.values for q in draws]).double().mean(0).view(16, 4, 16)
    step = torch.where(y.abs() < 2, 0.5, torch.where(y.abs() < 4, 1.0, 2.0))
    error = (mean - y).abs() / (step / 2)
    # Four standard errors of a coin; of 1,024 numbers, 0.06 pass that by chance. 8 bits add up to 1/256 of a step.
    assert (error > 4 / n**0.5 + 2 / 256).sum() <= 1


def test_c7_small_gradients_keep_their_slope():
    # The half of the numbers that is smallest, of log-normal data: decoded against true. Nearest sets many to zero.
    generator = torch.Generator().manual_seed(0)
    x = torch.exp(1.5 * torch.randn(512, 512, generator=generator)) * torch.randn(512, 512, generator=generator).sign()
    smallest = x.abs() < x.abs().median()
    slope = lambda x_hat: ((x_hat * x)[smallest].sum() / (x * x)[smallest].sum()).item()  # noqa: E731
    for rounding in STOCHASTIC:
        spec = spec_of(rounding)
        noise = spec.draw(Noise.of(0, "x", "slope"), x.shape, 0)
        assert 0.98 < slope(quantize(x, spec, noise).dequantize()) < 1.02
    assert slope(quantize(x, spec_of(Rounding.NEAREST)).dequantize()) < 0.8


def expectation(x: Tensor, spec: QuantSpec) -> tuple[Tensor, float]:
    """The mean over all 256 draws of 8 bits, and the root of the mean square error of one draw, relative."""
    draws = [quantize(x, spec, torch.full(x.shape, (k + 0.5) / 256)).dequantize() for k in range(256)]
    square = torch.stack([(d - x).square().sum() for d in draws]).mean()
    return torch.stack(draws).double().mean(0), (square.sqrt() / x.norm()).item()


def test_block_scales_rounded_up_leave_no_bias():
    # Section 2.2: nearest clips, a bias of 1.0 % of the norm; up has below 0.2 %, for single draws of 0.148, not 0.138.
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    bias, error = {}, {}
    for blocks in BlockRounding:
        mean, error[blocks] = expectation(x, spec_of(Rounding.STOCHASTIC_8BIT, blocks))
        bias[blocks] = ((mean - x).norm() / x.norm()).item()
    assert bias[BlockRounding.NEAREST] == pytest.approx(0.010, rel=0.1) and bias[BlockRounding.UP] < 0.002
    assert error[BlockRounding.NEAREST] == pytest.approx(0.138, rel=0.02)
    assert error[BlockRounding.UP] == pytest.approx(0.148, rel=0.02)


@ROUNDINGS
def test_c8_draws_are_a_function_of_seed_name_role_and_step(rounding):
    spec = spec_of(rounding)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    draw = lambda *who, step=0: spec.draw(Noise.of(*who), x.shape, step)  # noqa: E731
    base = draw(0, "layer", "dgrad.lhs")
    assert base is not None and base.min() >= 0 and base.max() < 1 and base.dtype == torch.float32
    assert torch.equal(base, draw(0, "layer", "dgrad.lhs"))
    rows = quantize(x, spec, base).values
    assert torch.equal(rows, quantize(x, spec, base).values)
    others = [draw(1, "layer", "dgrad.lhs"), draw(0, "other", "dgrad.lhs"), draw(0, "layer", "wgrad.lhs"),
              draw(0, "layer", "dgrad.lhs", step=1)]  # fmt: skip
    for other in others:
        assert not torch.equal(quantize(x, spec, other).values, rows)
        correlation = torch.corrcoef(torch.stack([base.flatten(), other.flatten()]))[0, 1]
        assert correlation.abs() < 4 / x.numel() ** 0.5  # four standard errors: 0.03
    large = [spec.draw(Noise.of(0, "layer", role), (1 << 20,), 0) for role in ("dgrad.lhs", "wgrad.lhs")]
    assert torch.corrcoef(torch.stack([t for t in large if t is not None]))[0, 1].abs() < 0.01


@ROUNDINGS
def test_c9_error_of_a_single_draw(rounding):
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    spec = spec_of(rounding)
    q = quantize(x, spec, spec.draw(Noise.of(0, "x", "c9"), x.shape, 0))
    assert ((q.dequantize() - x).norm() / x.norm()).item() == pytest.approx(0.1373, rel=0.02)


@ROUNDINGS
def test_any_length_draws_for_what_the_rotation_fills_up(rounding):
    spec = QuantSpec(E2M1, PerGroup(16), TwoLevel(), rounding, Hadamard(16, dtype=torch.bfloat16))
    x = torch.randn(3, 21)
    noise = spec.draw(Noise.of(0, "x", "r"), x.shape, 5)
    assert noise is not None and noise.shape == (3, 32)
    q = quantize(x, spec, noise)
    assert q.values.shape == (3, 32) and q.dequantize().shape == (3, 21)


@ROUNDINGS
def test_other_formats_take_a_neighbour_too(rounding):
    spec = QuantSpec(E4M3, rounding=rounding)
    x = torch.linspace(-448, 448, 4001)
    q = quantize(x, spec, spec.draw(Noise.of(0, "x", "e4m3"), x.shape, 0)).values
    gap = torch.exp2(torch.floor(torch.log2(x.abs().clamp_min(2**-6))) - 3)
    assert ((q - x).abs() < gap * (1 + 1e-6)).all() and torch.equal(E4M3.project(q), q)
