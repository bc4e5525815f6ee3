# SPDX-License-Identifier: Apache-2.0
"""Block-wise codes: codes are those of the nearest points (C2), and what a block does to its values (C3)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbits.errors import SpecError
from lowbits.formats import (
    DYNAMIC4,
    DYNAMIC8,
    E4M3,
    E4M3_NO_UNDERFLOW,
    INT4,
    INT8,
    NF4,
    UDYNAMIC8,
    UINT8_NO_ZERO,
    ULINEAR4,
    Codebook,
)
from lowbits.optim import Blockwise
from lowbits.quantizers import Noise

BOOKS = [DYNAMIC8, UDYNAMIC8]
SIGNED = [DYNAMIC8, INT8, E4M3, DYNAMIC4, INT4, NF4]
UNSIGNED = [UDYNAMIC8, UINT8_NO_ZERO, E4M3_NO_UNDERFLOW, ULINEAR4]
NOISE, STEP = Noise.of(0, "x", "moment"), torch.tensor(1)


def store(codec, x):
    stored = codec.init(x)
    codec.encode_(stored, x, NOISE, STEP)
    return stored


def quotients(book, count):
    """Half of them log-uniform in [1e-8, 1], half uniform."""
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(2, count // 2, generator=generator)
    y[0] = 10 ** (8 * y[0] - 8)
    return y.view(-1) if book is UDYNAMIC8 else y.view(-1) * (1 - 2 * (torch.rand(count, generator=generator) < 0.5))


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_c2_codes_are_those_of_the_nearest_points(book):
    y = quotients(book, 1_000_000)
    points = np.array(book.points, dtype=np.float64)
    nearest = np.searchsorted((points[1:] + points[:-1]) / 2, y.double().numpy())
    if book is UDYNAMIC8:
        nearest = np.where(y.numpy() > 0, np.maximum(nearest, 1), nearest)
    codes = Blockwise(book)._codes(y).numpy().astype(int)
    assert (codes == nearest).all()


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_c2_every_code_maps_to_itself_and_the_ends_are_codes(book):
    signed = book is DYNAMIC8
    assert Blockwise(book)._codes(torch.tensor(book.points)).tolist() == list(range(256))
    ends = [-1.0, -0.0, 0.0, 1.0, 1.0 + 2**-23] if signed else [-0.0, 0.0, 1.0, 1.0 + 2**-23]
    assert Blockwise(book)._codes(torch.tensor(ends)).tolist() == [0] * signed + [127 * signed] * 2 + [255] * 2
    tiny = Blockwise(book)._codes(torch.tensor([1e-38, 1e-45, 2e-7, 2.7e-7])).tolist()
    assert tiny == ([127] * 4 if signed else [1] * 4)


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_c2_larger_quotients_never_have_smaller_codes(book):
    y = quotients(book, 200_000)
    middles = (torch.tensor(book.points[1:], dtype=torch.float64) + torch.tensor(book.points[:-1])) / 2
    around = [middles.float()]
    for _ in range(8):  # eight floats on either side of every middle
        around = [
            torch.nextafter(around[0], torch.tensor(-9.0)),
            *around,
            torch.nextafter(around[-1], torch.tensor(9.0)),
        ]
    y = torch.cat([y, *around]).sort().values
    assert (Blockwise(book)._codes(y).int().diff() >= 0).all()


def half_gap(codec, y):
    """Half the distance of the two points around y in a block of scale 1; below the lowest point the distance to it."""
    points = np.array(sorted(set(codec.points)))
    right = np.clip(np.searchsorted(points, y), 1, len(points) - 1)
    half = (points[right] - points[right - 1]) / 2
    if codec.format in UNSIGNED:  # only 0 becomes 0
        half = np.where(points[right - 1] == 0, points[right], half)
    return np.where(y < points[0], points[0] - y, half)


@settings(max_examples=60)
@given(
    st.sampled_from([*SIGNED, *UNSIGNED]),
    st.sampled_from([64, 256, 4096]),
    st.sampled_from([1, 255, 256, 257, 1000]),
    st.integers(-130, 100),
    st.integers(0, 2**32),
)
def test_c3_every_value_comes_back_within_half_the_local_gap(fmt, size, count, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 10 ** (2 * torch.randn(count, generator=generator)) * 2.0**exponent
    x = x.clamp(-1e38, 1e38) if fmt in SIGNED else x.clamp(-1e38, 1e38).abs()
    codec = Blockwise(fmt, size)
    stored = store(codec, x)
    assert stored["scale"].shape == (math.ceil(count / size),)
    scale = stored["scale"].repeat_interleave(size)[:count].double().numpy()
    back, x = codec.decode(stored, x.shape).double().numpy(), x.double().numpy()
    amax = np.array([np.abs(x[i : i + size]).max() for i in range(0, count, size)])
    np.testing.assert_array_equal(stored["scale"].numpy(), np.maximum(amax, 2.0**-126) * (amax > 0))
    y = np.divide(x, scale, out=np.zeros(count), where=scale > 0)
    # Beside half a gap: roundings of y and of the product, and what float32 loses below its normal numbers.
    allowed = half_gap(codec, y) * scale * (1 + 1e-5) + np.abs(x) * 2**-22 + 2.0**-148
    assert (np.abs(back - x) <= allowed).all()
    assert ((x > 0) <= (back >= 0)).all() and ((x < 0) <= (back <= 0)).all()


@pytest.mark.parametrize("fmt", [*SIGNED, *UNSIGNED], ids=str)
def test_a_block_of_zeros_stays_zero_and_begins_so(fmt):
    codec, x = Blockwise(fmt, 64), torch.zeros(3, 50)
    x[2, 49] = 1.0
    stored = store(codec, x)
    assert stored["scale"].tolist() == [0, 0, 1]
    assert not codec.decode(stored, x.shape).view(-1)[:128].any()
    first = codec.init(x)
    assert not codec.decode(first, x.shape).any() and {k: v.shape for k, v in first.items()} == {
        k: v.shape for k, v in stored.items()
    }


@pytest.mark.parametrize("fmt", UNSIGNED, ids=str)
def test_a_positive_second_moment_never_comes_back_as_zero(fmt):
    x = torch.tensor([1.0, 1e-12, 2e-7, 1e-30])
    assert (Blockwise(fmt).decode(store(Blockwise(fmt), x), x.shape) > 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("fmt", [*SIGNED, *UNSIGNED], ids=str)
def test_a_block_with_nan_or_infinity_is_not_finite_and_its_neighbours_are(fmt, bad):
    x = torch.ones(192)
    x[70] = bad if fmt in SIGNED else abs(bad)
    codec = Blockwise(fmt, 64)
    stored = store(codec, x)
    assert stored["scale"].isfinite().tolist() == [True, False, True]
    back = codec.decode(stored, x.shape)
    assert not back[70].isfinite() and back[:64].isfinite().all() and back[128:].isfinite().all()


def test_other_widths_and_sizes_are_refused():
    for build in (
        lambda: Blockwise(DYNAMIC8, 32), lambda: Blockwise(DYNAMIC8, 8192), lambda: Blockwise(DYNAMIC8, 100),
        lambda: Blockwise(Codebook("three", (-1.0, 0.0, 1.0))),
    ):  # fmt: skip
        with pytest.raises(SpecError, match="Blockwise"):
            build()
