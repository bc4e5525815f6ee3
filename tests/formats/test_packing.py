# SPDX-License-Identifier: Apache-2.0
"""Packing round-trips at odd lengths and takes the bytes it says (U10)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.errors import FormatError
from lowbits.formats import TERNARY, pack, packed_bytes, unpack

WIDTHS = {8: range(256), 4: range(16), 2: range(4), 1: range(2), 1.6: (3, 0, 1)}


@given(st.data(), st.sampled_from(sorted(WIDTHS)), st.integers(0, 67))
def test_round_trip(data, bits, count):
    codes = data.draw(st.lists(st.sampled_from(list(WIDTHS[bits])), min_size=count, max_size=count))
    tensor = torch.tensor(codes, dtype=torch.uint8)
    packed = pack(tensor, bits)
    assert packed.untyped_storage().nbytes() == packed_bytes(count, bits)
    assert unpack(packed, bits, count).tolist() == codes


def test_layout_is_the_documented_one():
    assert pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist() == [0x21, 0x03]
    assert pack(torch.tensor([1, 2, 3, 0, 1], dtype=torch.uint8), 2).tolist() == [0b00111001, 0b01]
    # ternary -1, 0, 1, 1, -1 as digits 0, 1, 2, 2, 0, lowest first
    trits = TERNARY.encode(torch.tensor([-1.0, 0.0, 1.0, 1.0, -1.0]))
    assert pack(trits, 1.6).tolist() == [0 + 1 * 3 + 2 * 9 + 2 * 27 + 0]


def test_wrong_widths_and_lengths_are_refused():
    with pytest.raises(FormatError, match="no packed layout"):
        pack(torch.zeros(3, dtype=torch.uint8), 3)
    with pytest.raises(FormatError, match="cut off"):
        unpack(torch.zeros(2, dtype=torch.uint8), 4, 5)
