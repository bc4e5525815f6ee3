# SPDX-License-Identifier: Apache-2.0
"""The dynamic code books are the published ones to the last bit, and rounding to them is nearest (checks C1 to C3)."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest
import torch

from lowbits.formats import DYNAMIC8, UDYNAMIC8
from lowbits.optim import Quantized
from lowbits.quantizers import PerBlock, QuantSpec, quantize

# SHA-256 of the 1024 bytes that the published construction gives (bitsandbytes and torchao build the same).
PUBLISHED = {
    "dynamic8": "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c",
    "udynamic8": "305f002cc11278fb769d13b25b9fd0c7c83c8402c40a878fe086f4039fde6398",
}
BOOKS = [DYNAMIC8, UDYNAMIC8]


def formula(signed: bool) -> list[float]:
    """The construction of the paper in float64."""
    values = [0.0, 1.0]
    for i in range(7):
        n = 2**i if signed else 2 ** (i + 1)
        part = [10.0 ** (i - 6) * (0.1 + 0.9 * (j + 0.5) / n) for j in range(n)]
        values += part + ([-v for v in part] if signed else [])
    return sorted(values)


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_c1_the_book_is_the_published_one(book):
    assert hashlib.sha256(struct.pack("<256f", *book.points)).hexdigest() == PUBLISHED[book.name]
    np.testing.assert_allclose(book.points, formula(book is DYNAMIC8), rtol=2 * 2**-23)  # 2 ulp, spec 2.1
    assert len(set(book.points)) == 256
    assert book.encode(torch.tensor([0.0])).item() == (127 if book is DYNAMIC8 else 0)


@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_c2_the_code_is_the_nearest(book):
    generator = torch.Generator().manual_seed(0)
    logarithmic = 10 ** (torch.rand(100_000, generator=generator) * 8 - 8)
    y = torch.cat([logarithmic, torch.rand(100_000, generator=generator)])
    if book is DYNAMIC8:
        y = y * (1 - 2 * (torch.rand(y.shape, generator=generator) < 0.5))
    points = np.array(book.points, dtype=np.float64)
    place = np.searchsorted((points[1:] + points[:-1]) / 2, y.double().numpy())
    if book.only_zero_is_zero:
        place = np.where((y.numpy() > 0) & (place == 0), 1, place)
    codes = book.encode(book.project(y)).numpy()
    assert (codes != place).mean() <= 1e-5 and abs(codes.astype(int) - place).max() <= 1
    everything = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(book.encode(book.project(book.decode(everything))), everything)


def test_c2_spot_values():
    signed = [1, 0.5, 0.1, 0.05, 0.003, 2.8e-7, 2.7e-7, 0, -2.8e-7, -0.3, -0.99, -1]
    assert DYNAMIC8.encode(DYNAMIC8.project(torch.tensor(signed))).tolist() == [
        255, 219, 190, 173, 146, 128, 127, 127, 126, 49, 0, 0,
    ]  # fmt: skip
    unsigned = [1, 0.5, 0.1, 0.05, 0.003, 1e-6, 1.7e-7]
    assert UDYNAMIC8.encode(UDYNAMIC8.project(torch.tensor(unsigned))).tolist() == [255, 183, 126, 91, 38, 2, 1]


def test_a_positive_second_moment_never_becomes_zero():
    y = torch.tensor([0.0, 1e-30, 1.6e-7, 1.0])
    assert UDYNAMIC8.encode(UDYNAMIC8.project(y)).tolist() == [0, 1, 1, 255]


@pytest.mark.parametrize("count", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("book", BOOKS, ids=str)
def test_c3_round_trip_within_half_the_local_gap(book, count):
    x = torch.randn(count)
    x = x if book is DYNAMIC8 else x.square()
    q = quantize(x, QuantSpec(book, PerBlock(256)))
    assert q.scale.numel() == -(-count // 256)
    amax = q.scale.repeat_interleave(256)[:count].double()
    points = np.array(book.points)
    right = np.clip(np.searchsorted(points, (x.double() / amax).numpy()), 1, 255)
    gap = torch.from_numpy(points[right] - points[right - 1]) * amax
    # Half a gap; below the lowest signed point (-0.993) up to 0.0071 amax; a tiny positive one is lifted by a gap.
    allowed = torch.where(x.double() / amax < points[0], 0.0071 * amax, gap / 2)
    allowed = torch.where(torch.from_numpy(right == 1) & (book is UDYNAMIC8), gap, allowed)
    assert ((q.dequantize().double() - x.double()).abs() <= allowed * (1 + 1e-5)).all()


def test_c9_two_bytes_and_a_thirty_second_a_parameter():
    like = torch.zeros(512, 1024)
    stored = [Quantized(QuantSpec(book, PerBlock(256))).init(like) for book in BOOKS]
    total = sum(part.untyped_storage().nbytes() for moment in stored for part in moment.values())
    assert total / like.numel() == 2.03125
