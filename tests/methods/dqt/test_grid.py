# SPDX-License-Identifier: Apache-2.0
"""Codes, steps and rounding against the paper in float64, and the statistics that it implies."""

from __future__ import annotations

import pytest
import torch

from lowbits.errors import FormatError, ShapeError, SpecError
from lowbits.formats import UINT4
from lowbits.nn import Grid, Packing, QParameter, StepInit, StepRule, moved, quantize_parameter, rounded
from lowbits.quantizers import Noise, Rounding
from tests.oracles import direct_quantized as oracle

GRIDS = [Grid.of(bits) for bits in (8, 7, 6, 5, 4, 3, 2, 1.58)] + [
    Grid.of(1.58, Packing.FIVE), Grid.of(1.58, Packing.ONE), Grid.of(2, Packing.TWO),
]  # fmt: skip
DRAWS = 1_000_000


def uniform(count: int, step: int = 0) -> torch.Tensor:
    return Noise.of(0, "w", "weight").uniform((count,), step)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("length", [1, 4, 5, 13])
def test_codes_come_back_from_their_bytes(grid: Grid, length: int) -> None:
    every = torch.arange(grid.low, grid.high + 1, dtype=torch.int8)
    codes = every.repeat(-(-7 * length // len(every)) + 1)[: 7 * length].view(7, length)
    stored = grid.pack(codes)
    assert torch.equal(grid.unpack(stored, length), codes)
    assert stored.dtype == grid.dtype and stored.shape == (7, -(-length // grid.per_byte))


def test_bytes_are_those_of_the_formats() -> None:
    """Rows that end with a byte lie as `lowbits.formats.pack` lays them, which exports read."""
    from lowbits.formats import pack

    codes = torch.randint(-1, 2, (3, 20), dtype=torch.int8)
    for grid, bits in ((Grid.of(1.58), 2), (Grid.of(1.58, Packing.FIVE), 1.6), (Grid.of(4), 4)):
        field = codes.view(torch.uint8) & (3 if bits < 4 else 15)
        assert torch.equal(grid.pack(codes).flatten(), pack(field, bits))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SpecError, match="got 1"):
        Grid.of(1)
    with pytest.raises(SpecError, match="signed"):
        Grid(UINT4)
    with pytest.raises(SpecError, match="5 codes of int2"):
        Grid.of(2, Packing.FIVE)
    with pytest.raises(SpecError, match="2 codes of int8"):
        Grid.of(8, Packing.TWO)
    with pytest.raises(SpecError, match="to 24 bits"):
        Grid.of(8, rounding=Rounding.STOCHASTIC_8BIT)
    with pytest.raises(FormatError, match="a row of 9 codes takes 3 bytes"):
        Grid.of(2).unpack(torch.zeros(2, dtype=torch.uint8), 9)
    with pytest.raises(SpecError, match="positive and finite"):
        QParameter.of(torch.zeros(2, 2, dtype=torch.int8), torch.tensor(0.0), Grid.of(8))
    with pytest.raises(ShapeError, match="one a row of 2"):
        QParameter.of(torch.zeros(2, 2, dtype=torch.int8), torch.ones(3), Grid.of(8))
    with pytest.raises(SpecError, match="not finite"):
        quantize_parameter(torch.tensor([float("nan"), 1.0]), Grid.of(8))


@pytest.mark.parametrize("x", [-3.7, -0.2, 0.3, 2.5, 5.999])
def test_rounding_is_unbiased(x: float) -> None:
    """U1: four standard errors of a mean of Bernoulli draws; U2: no code but the two neighbours."""
    codes = rounded(torch.full((DRAWS,), x), Grid.of(8), uniform(DRAWS))
    fraction = x - torch.tensor(x).floor().item()
    assert abs(codes.double().mean().item() - x) < 4 * (fraction * (1 - fraction) / DRAWS) ** 0.5
    assert set(codes.unique().tolist()) == {int(torch.tensor(x).floor()), int(torch.tensor(x).ceil())}


def test_integers_stay_and_the_ends_hold() -> None:
    """U2."""
    for grid in GRIDS:
        every = torch.arange(grid.low, grid.high + 1, dtype=torch.float32).repeat(50)
        assert torch.equal(rounded(every, grid, uniform(len(every))), every.to(torch.int8))
        far = rounded(torch.tensor([1e9, 300.0, -300.0, -1e9, float("nan")]), grid, torch.zeros(5))
        assert far.tolist() == [grid.high, grid.high, grid.low, grid.low, 0]


@pytest.mark.parametrize("grid", GRIDS[:1] + GRIDS[4:8], ids=str)
def test_moved_codes_are_the_published_ones(grid: Grid) -> None:
    """The difference is rounded, not the sum; where both are exact in float32 the codes are the published ones."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(grid.low, grid.high + 1, (4000,), generator=generator, dtype=torch.int8)
    step = 2.0**-9  # a power of two: quotients are exact
    change = (torch.randn(4000, generator=generator) * step * grid.high).mul(2**16).round() / 2**16
    draw = uniform(4000)
    got = moved(codes, change, torch.tensor(step), grid, draw)
    new = [q * step + c for q, c in zip(codes.tolist(), change.tolist(), strict=True)]
    assert got.tolist() == oracle.write_back(codes.tolist(), new, step, grid.low, grid.high, draw.tolist())


def test_nothing_moves_without_a_change() -> None:
    """U3, for steps of all mantissas: D q / D is not always q in floats, a difference of 0 always is 0."""
    grid = Grid.of(8)
    codes = torch.arange(-128, 128, dtype=torch.int8).repeat(1000, 1)
    steps = torch.rand(1000, 1) + 1e-3
    draw = uniform(codes.numel()).view(codes.shape)
    assert torch.equal(moved(codes, torch.zeros(codes.shape), steps, grid, draw), codes)


def test_a_change_that_is_no_number_moves_nothing() -> None:
    change = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30])
    got = moved(torch.full((4,), 5, dtype=torch.int8), change, torch.tensor(1.0), Grid.of(8), torch.zeros(4))
    assert got.tolist() == [5, 5, 5, 127]


def changed(grid: Grid, size: float) -> float:
    """Share of a million interior weights of `absmean_top` steps that an update of `size` moves."""
    step = StepInit().step(torch.randn(768, 768, generator=torch.Generator().manual_seed(0)) * 0.02, grid)
    codes = torch.zeros(DRAWS, dtype=torch.int8)
    return float((moved(codes, torch.full((DRAWS,), size), step, grid, uniform(DRAWS)) != 0).double().mean())


def test_the_share_that_changes_is_the_change_over_the_step() -> None:
    """U4: four standard errors."""
    step = float(StepInit().step(torch.randn(768, 768, generator=torch.Generator().manual_seed(0)) * 0.02, Grid.of(8)))
    for share in (0.3, 0.01):
        assert abs(changed(Grid.of(8), share * step) - share) < 4 * (share * (1 - share) / DRAWS) ** 0.5


def test_eight_bits_change_127_times_as_often_as_ternary() -> None:
    """U13, within 5 %: at 0.6 of an 8-bit step some 4,700 of a million ternary codes change, give or take 70."""
    size = 0.6 * 0.02 * 0.798 / 127
    assert changed(Grid.of(8), size) / changed(Grid.of(1.58), size) == pytest.approx(127, rel=0.05)


START = {1.58: (34.5, 34.6), 2: (34.5, 11.6), 3: (25.3, 17.7), 4: (22.9, 19.7), 8: (21.3, 21.2)}
"""Spec, 2.2: percent of a Gaussian 768 x 768 start at the top and at the bottom code."""


@pytest.mark.parametrize("bits", START)
def test_the_start_saturates_as_published(bits: float) -> None:
    """U6: within 0.3 points, against the published code's statistics and Gaussian theory (zeros of ternary ones)."""
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(3)) * 0.02
    p = quantize_parameter(weight, Grid.of(bits))
    codes, (top, bottom) = p.unpacked(), START[bits]
    assert 100 * float((codes == p.grid.high).double().mean()) == pytest.approx(top, abs=0.3)
    assert 100 * float((codes == p.grid.low).double().mean()) == pytest.approx(bottom, abs=0.3)
    if bits == 1.58:
        assert 100 * float((codes == 0).double().mean()) == pytest.approx(31.0, abs=0.3)
    step = oracle.absmean_top(weight.flatten().tolist(), p.grid.high)
    assert float(p.step) == pytest.approx(step, rel=1e-6)
    few = weight[:20].flatten().tolist()
    assert codes[:20].flatten().tolist() == oracle.start(few, float(p.step), p.grid.low, p.grid.high)


@pytest.mark.parametrize("rule", StepRule)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", ["zeros", "negative", "constant", "one", "row of zeros"])
def test_degenerate_tensors_get_a_step(rule: StepRule, per_channel: bool, kind: str) -> None:
    """U11: all values finite, no sign turned, and room to train from zeros."""
    weight = {
        "zeros": torch.zeros(8, 8), "negative": -torch.rand(8, 8) - 0.1, "constant": torch.full((8, 8), 0.3),
        "one": torch.tensor([[0.7]]), "row of zeros": torch.cat([torch.zeros(1, 8), torch.ones(7, 8)]),
    }[kind]  # fmt: skip
    for bits in (8, 1.58):
        p = quantize_parameter(weight, Grid.of(bits), StepInit(rule, per_channel))
        values = p.dequantize()
        assert values.isfinite().all() and (values * weight >= 0).all()
        # Four sigmas over one positive code: everything a ternary tensor of one magnitude has is below half a step.
        assert values.any() or kind == "zeros" or (rule is StepRule.SIGMA and bits == 1.58)
        assert float((p.step * p.grid.high).min()) > 0.01


def test_steps_of_the_rules() -> None:
    weight = torch.tensor([[0.5, -1.0], [0.25, 0.0]])
    grid = Grid.of(1.58)
    assert float(StepInit(StepRule.ABSMEAN_TOP).step(weight, grid)) == pytest.approx(0.4375)
    assert float(StepInit(StepRule.ABSMAX).step(weight, grid)) == 1.0
    assert StepInit(StepRule.ABSMAX, per_channel=True).step(weight, grid).flatten().tolist() == [1.0, 0.25]
    assert float(StepInit(StepRule.POWER_OF_TWO).step(weight, grid)) == 0.5
    rms = (1.3125 / 4) ** 0.5
    assert float(StepInit(StepRule.SIGMA, sigmas=3).step(weight, grid)) == pytest.approx(3 * rms)
    with pytest.raises(SpecError, match="positive"):
        StepInit(sigmas=0)
