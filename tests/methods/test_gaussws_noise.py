# SPDX-License-Identifier: Apache-2.0
"""The circuit and the draws: B1 to B3 and B7 of the specification."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowbits.errors import FormatError
from lowbits.methods._pseudo_noise._blocks import counts, elements, from_blocks, to_blocks
from lowbits.methods._pseudo_noise._circuit import (
    Fidelity,
    Odds,
    bernoulli,
    pack_nibbles,
    rounded_normal,
    unpack_nibbles,
)
from lowbits.methods._pseudo_noise._draw import PseudoNoise, draw
from lowbits.methods._pseudo_noise._weight import NoisyWeight, set_draw_
from lowbits.methods.gaussws import Plan
from tests.oracles import gaussws as oracle

KEY = (0x243F6A88, 0x85A308D3)
# What the specification derives for each circuit: P(0), P(1), P(2), total variation to the exact distribution, Var R.
PUBLISHED = {
    "lite": (0.6875, 0.3100586, 0.0024414, 0.0048, 0.3198),
    "default": (0.6835938, 0.3139343, 0.0024719, 0.0009, 0.3238),
    "fine": (0.6826172, 0.3145933, 0.0027895, 0.0001, 0.3258),
}


def counter(number: int, key: tuple[int, int] = KEY) -> torch.Tensor:
    return torch.tensor([number, *key])


@pytest.mark.parametrize("digits", range(1, 9))
def test_the_tree_gives_its_odds_exactly(digits: int) -> None:
    """B1 and E5: over all 2^k inputs, n ones for every n."""
    words = [torch.tensor(column) for column in zip(*itertools.product((0, 1), repeat=digits), strict=True)]
    for numerator in range(1 << digits):
        assert int((bernoulli(words, Odds(numerator, digits)) & 1).sum()) == numerator
        bits = itertools.product((0, 1), repeat=digits)
        assert sum(oracle.bernoulli_bit(list(b), numerator) for b in bits) == numerator


@pytest.mark.parametrize("fidelity", Fidelity)
def test_the_probabilities_are_the_published_ones(fidelity: Fidelity) -> None:
    p0, p1, p2, variation, variance = PUBLISHED[fidelity.value]
    ideal = oracle.ideal_probabilities()
    assert fidelity.probabilities == pytest.approx((p0, p1, p2), abs=6e-8)
    assert 0.5 * sum(abs(p - q) for p, q in zip(fidelity.probabilities, ideal, strict=True)) == pytest.approx(
        variation, abs=1e-4
    )
    assert fidelity.variance == pytest.approx(variance, abs=1e-4)
    assert fidelity.words == {"lite": 12, "default": 16, "fine": 21}[fidelity.value]


@pytest.mark.parametrize("fidelity", Fidelity)
def test_ten_million_draws(fidelity: Fidelity) -> None:
    """B2: each probability within four standard errors; sign, magnitude, neighbours and layers are uncorrelated."""
    blocks = (100, 98) if fidelity is Fidelity.DEFAULT else (40, 25)
    r, other = (
        draw(PseudoNoise.ROUNDED_NORMAL, fidelity, blocks, (32, 32), counter(3, key)) for key in (KEY, (KEY[1], KEY[0]))
    )
    n = r.numel()
    for magnitude, p in enumerate(fidelity.probabilities):
        assert abs(float((r.abs() == magnitude).double().mean()) - p) < 4 * (p * (1 - p) / n) ** 0.5
    assert abs(float(r.double().mean())) < 4 * (fidelity.variance / n) ** 0.5
    lanes = r.view(-1, 32)
    for x, y in ((r.sign() * (r != 0), r.abs()), (lanes[:, 1:], lanes[:, :-1]), (lanes[1:], lanes[:-1]), (r, other)):
        pair = torch.stack((x.flatten(), y.flatten())).double()
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 4 / pair.shape[1] ** 0.5


@pytest.mark.parametrize("block", [(32, 32), (8, 16), (5, 7), (1, 1)])
@pytest.mark.parametrize("kind", ["lite", "default", "fine", "uniform"])
def test_every_element_is_the_oracles(block: tuple[int, int], kind: str) -> None:
    shape = (block[0] * 2, block[1] + 3)
    noise = PseudoNoise.UNIFORM if kind == "uniform" else PseudoNoise.ROUNDED_NORMAL
    fidelity = Fidelity.DEFAULT if kind == "uniform" else Fidelity(kind)
    blocks = draw(noise, fidelity, counts(shape, block), block, counter(5))
    expected = oracle.noise(shape, block, 5, KEY, kind)
    assert np.array_equal(from_blocks(blocks, shape, block).numpy(), expected)


def test_normal_and_uniform_noise_have_the_moments_of_diffq() -> None:
    for noise, variance, fourth in ((PseudoNoise.UNIFORM, 1 / 12, 1 / 80), (PseudoNoise.NORMAL, 1 / 4, 3 / 16)):
        r = draw(noise, Fidelity.DEFAULT, (40, 25), (32, 32), counter(1)).double()
        n = r.numel()
        assert abs(r.mean()) < 4 * (variance / n) ** 0.5
        assert abs(r.square().mean() - variance) < 4 * ((fourth - variance**2) / n) ** 0.5
        assert noise.variance(Fidelity.DEFAULT) == variance


def test_nibbles() -> None:
    """B3 and E4."""
    r = torch.tensor([0, 1, -1, 2, -2, 0, 1, -2])
    assert pack_nibbles(r).item() == 0xA10A2910
    every = torch.tensor(list(itertools.product(range(-2, 3), repeat=4))).repeat(1, 2)
    assert torch.equal(unpack_nibbles(pack_nibbles(every)), every)
    drawn = draw(PseudoNoise.ROUNDED_NORMAL, Fidelity.DEFAULT, (4, 4), (32, 32), counter(0)).long().flatten()
    words = pack_nibbles(drawn)
    assert torch.equal(unpack_nibbles(words), drawn)
    nibbles = (words.unsqueeze(-1) >> (4 * torch.arange(8))) & 15
    assert not bool((nibbles == 8).any())  # no -0
    with pytest.raises(FormatError, match="eight values"):
        pack_nibbles(torch.zeros(7, dtype=torch.int64))


def test_signs_of_zeros_are_never_drawn() -> None:
    words = [torch.randint(1 << 32, (50,)) for _ in range(16)]
    r = rounded_normal(words, Fidelity.DEFAULT).float()
    assert not bool((r.signbit() & (r == 0)).any())


@pytest.mark.parametrize(("ways", "axis"), [(1, 0), (2, 0), (4, 0), (2, 1), (4, 1)])
@pytest.mark.parametrize("noise", [PseudoNoise.ROUNDED_NORMAL, PseudoNoise.UNIFORM, PseudoNoise.NORMAL])
def test_shards_draw_what_the_whole_draws(ways: int, axis: int, noise: PseudoNoise) -> None:
    """B7: block coordinates are those of the whole weight."""
    whole = draw(noise, Fidelity.DEFAULT, (8, 8), (16, 16), counter(9))
    size = 8 // ways
    shards = []
    for k in range(ways):
        shape, origin = ((size, 8), (k * size, 0)) if axis == 0 else ((8, size), (0, k * size))
        shards.append(draw(noise, Fidelity.DEFAULT, shape, (16, 16), counter(9), origin))
    assert torch.equal(torch.cat(shards, axis), whole)


def test_layers_seeds_and_draws_share_no_noise() -> None:
    """A seed of 0 is a seed; two layers with one name are the only way to the same bits."""
    shape = (64, 64)
    drawn = {}
    for seed, name, number in itertools.product((0, 1), ("a", "b"), (0, 1, 2**32 - 1)):
        weight = NoisyWeight(shape, Plan(), seed=seed, name=name)
        set_draw_([weight], number)
        drawn[seed, name, number] = weight.noise(torch.zeros(shape))
    for one, other in itertools.combinations(drawn.values(), 2):
        assert 0.3 < float((one != other).float().mean()) < 0.7
    again = NoisyWeight(shape, Plan(), seed=0, name="a")
    assert torch.equal(again.noise(torch.zeros(shape)), drawn[0, "a", 0])
    with pytest.raises(FormatError, match="numbered from 0 to"):
        set_draw_([again], 1 << 32)


@pytest.mark.parametrize("shape", [(1, 1), (32, 32), (33, 31), (65, 7)])
def test_blocks_and_back(shape: tuple[int, int]) -> None:
    w = torch.arange(1.0, shape[0] * shape[1] + 1).view(shape)
    for block in ((32, 32), (5, 3), (1, 64)):
        blocks = to_blocks(w, block)
        assert torch.equal(from_blocks(blocks, shape, block), w)
        assert torch.equal((blocks != 0).sum(-1), elements(shape, block))
        assert blocks.shape[:2] == counts(shape, block)
