# SPDX-License-Identifier: Apache-2.0
"""Bytes of codes: packed and Huffman-coded streams give back what went in, and are as short as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lowbits.errors import CheckpointError, FormatError
from lowbits.export import HuffmanCode, _huffman, bit_width, pack_bits, unpack_bits
from lowbits.formats import pack
from tests.oracles.distillation import entropy, huffman_bits


@given(width=st.integers(1, 16), data=st.data())
def test_unpacking_undoes_packing(width: int, data: st.DataObject) -> None:
    codes = np.array(data.draw(st.lists(st.integers(0, 2**width - 1), max_size=70)), np.uint16)
    packed = pack_bits(codes, width)
    assert packed.size == -(-codes.size * width // 8)
    assert unpack_bits(packed, width, codes.size).tolist() == codes.tolist()


@pytest.mark.parametrize("width", [3, 8])
def test_packing_crosses_its_chunks(width: int) -> None:
    codes = np.arange((1 << 20) + 5) % (1 << width)
    assert (unpack_bits(pack_bits(codes, width), width, codes.size) == codes).all()


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_the_layout_is_that_of_formats(width: int) -> None:
    codes = torch.randint(0, 1 << width, (37,), dtype=torch.uint8)
    assert pack_bits(codes.numpy(), width).tolist() == pack(codes, width).tolist()


def test_widths_and_bad_codes() -> None:
    assert [bit_width(n) for n in (1, 2, 3, 4, 5, 16, 17, 256, 65536)] == [1, 1, 2, 2, 3, 4, 5, 8, 16]
    with pytest.raises(FormatError, match="does not fit 2 bits"):
        pack_bits(np.array([4]), 2)
    with pytest.raises(FormatError, match="17 bits"):
        pack_bits(np.array([4]), 17)
    with pytest.raises(FormatError, match="cut off"):
        unpack_bits(np.zeros(2, np.uint8), 4, 5)


@given(counts=st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_a_huffman_code_is_optimal_and_near_the_entropy(counts: list[int]) -> None:
    bits, total = HuffmanCode.of_counts(counts).bits(counts), sum(counts)
    assert bits == huffman_bits(counts)
    excess = bits / total - entropy(counts)
    assert -1e-9 <= excess < 1 or (excess == 1 and sum(map(bool, counts)) == 1)  # one symbol takes 1 bit, not 0


@given(symbols=st.lists(st.integers(0, 300), min_size=1, max_size=200))
def test_decoding_undoes_encoding(symbols: list[int]) -> None:
    code = HuffmanCode.of_counts(np.bincount(symbols).tolist())
    stream, begins = code.encode(np.array(symbols))
    assert stream.size == -(-code.bits(np.bincount(symbols).tolist()) // 8)
    assert code.decode(stream, begins, len(symbols)).tolist() == symbols


@pytest.mark.parametrize("total", [1, 4095, 4096, 4097, 3 * 4096, 20_001])
def test_chunks_are_decoded_side_by_side(total: int) -> None:
    symbols = np.random.default_rng(total).geometric(0.2, total).clip(max=40)
    code = HuffmanCode.of_counts(np.bincount(symbols).tolist())
    assert (code.decode(*code.encode(symbols), total) == symbols).all()


def test_a_message_written_in_parts_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    symbols = np.random.default_rng(0).geometric(0.3, 5 * 4096 + 17).clip(max=20)
    code = HuffmanCode.of_counts(np.bincount(symbols).tolist())
    stream, begins = code.encode(symbols)
    monkeypatch.setattr(_huffman, "_TOGETHER", 2 * 4096)
    parts, starts = code.encode(symbols)
    assert parts.tolist() == stream.tolist() and starts.tolist() == begins.tolist()
    assert (code.decode(parts, starts, symbols.size) == symbols).all()


def test_one_symbol_takes_one_bit() -> None:
    code = HuffmanCode.of_counts([0, 9, 0])
    stream, begins = code.encode(np.ones(9, int))
    assert code.lengths == (0, 1, 0) and stream.size == 2
    assert code.decode(stream, begins, 9).tolist() == [1] * 9


def test_very_long_codes() -> None:
    counts = [1, 1]
    while len(counts) < 40:
        counts.append(counts[-1] + counts[-2])  # Fibonacci: a code of 39 bits
    code = HuffmanCode.of_counts(counts)
    symbols = np.random.default_rng(0).integers(0, 40, 5000)
    assert max(code.lengths) == 39
    assert (code.decode(*code.encode(symbols), symbols.size) == symbols).all()


def test_damaged_streams_are_recognised() -> None:
    code = HuffmanCode.of_counts([5, 0, 0])
    with pytest.raises(CheckpointError, match="no code"):
        code.decode(np.array([0x40], np.uint8), np.zeros(1, np.uint64), 8)
    with pytest.raises(CheckpointError, match="ends too early"):
        code.decode(np.zeros(1, np.uint8), np.zeros(1, np.uint64), 9)
    with pytest.raises(CheckpointError, match="chunks"):
        code.decode(np.zeros(1, np.uint8), np.zeros(2, np.uint64), 8)
    with pytest.raises(FormatError, match="no prefix code"):
        HuffmanCode((1, 1, 1))
    with pytest.raises(FormatError, match="has no code"):
        code.encode(np.array([1]))
    with pytest.raises(FormatError, match="at least one symbol"):
        HuffmanCode.of_counts([0, 0])
