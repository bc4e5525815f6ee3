# SPDX-License-Identifier: Apache-2.0
"""Code symbols in as few bits as a prefix code can (Huffman 1952), and decode many places of the stream at once.

The code is canonical: the lengths alone define it. Codes are written with their first bit in the highest free bit of a
byte. The stream is cut into chunks of equally many symbols and the bit at which each begins is kept, so that all chunks
are decoded side by side: 32 bits for 4,096 symbols.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count

import numpy as np

from lowbits.errors import CheckpointError, FormatError

CHUNK = 4096
_LONGEST = 56  # 8 bytes hold a code that begins at any bit of the first; a longer one needs 10^12 symbols
_PADDING = 8
_TOGETHER = 256 * CHUNK  # symbols written at a time


@dataclass(frozen=True)
class HuffmanCode:
    """A canonical prefix code.

    Args:
        lengths: bits of each symbol's code, 0 for a symbol that does not occur.
    Raises:
        FormatError: no prefix code has these lengths.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        used = [n for n in self.lengths if n]
        if not used or max(used) > _LONGEST or sum(2.0**-n for n in used) > 1:
            raise FormatError(f"no prefix code of at most {_LONGEST} bits has the lengths {self.lengths[:16]}...")

    @staticmethod
    def of_counts(counts: Sequence[int]) -> HuffmanCode:
        """Return an optimal code for symbols that occur so often; a single symbol gets 1 bit.

        Args:
            counts: of each symbol, at least one not 0.
        """
        order = count()  # breaks ties by age, so that the same counts give the same code
        heap = [(n, next(order), [symbol]) for symbol, n in enumerate(counts) if n]
        if not heap:
            raise FormatError("a Huffman code needs at least one symbol that occurs.")
        lengths = [0] * len(counts)
        if len(heap) == 1:
            lengths[heap[0][2][0]] = 1
        heapq.heapify(heap)
        while len(heap) > 1:
            (n1, _, first), (n2, _, second) = heapq.heappop(heap), heapq.heappop(heap)
            for symbol in first + second:
                lengths[symbol] += 1
            heapq.heappush(heap, (n1 + n2, next(order), first + second))
        return HuffmanCode(tuple(lengths))

    @cached_property
    def _canonical(self) -> tuple[np.ndarray, np.ndarray]:
        """(symbols in the order of their codes, code of each of them shifted to the top of 64 bits)."""
        symbols = sorted((s for s, n in enumerate(self.lengths) if n), key=lambda s: (self.lengths[s], s))
        codes, code, before = [], 0, self.lengths[symbols[0]]
        for symbol in symbols:
            code <<= self.lengths[symbol] - before
            before = self.lengths[symbol]
            codes.append(code << (64 - before))
            code += 1
        return np.array(symbols, np.int64), np.array(codes, np.uint64)

    def bits(self, counts: Sequence[int]) -> int:
        """Return the bits of a message in which each symbol occurs so often."""
        return sum(n * length for n, length in zip(counts, self.lengths, strict=True))

    def encode(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the stream and where its chunks begin.

        Args:
            symbols: integers, 1-D.
        Returns:
            uint8 [ceil(bits / 8)], and uint64 [ceil(symbols / 4096)]: the bit at which each chunk begins.
        Raises:
            FormatError: a symbol without a code.
        """
        lengths = np.array(self.lengths, np.int64)
        if symbols.size and (symbols.max() >= lengths.size or not lengths[symbols].all()):
            raise FormatError("a symbol to be coded has no code; make the code from the counts of this message.")
        table = np.zeros(lengths.size, np.uint64)
        order, codes = self._canonical
        table[order] = codes
        streams, begins, left, written = [], [], np.empty(0, np.uint8), 0
        for i in range(0, symbols.size, _TOGETHER):
            bits, starts = _bits(symbols[i : i + _TOGETHER], lengths, table)
            begins.append(starts[::CHUNK] + written)
            written += bits.size
            bits = np.concatenate([left, bits])
            whole = bits.size // 8 * 8
            streams.append(np.packbits(bits[:whole]))
            left = bits[whole:]
        stream = np.concatenate([*streams, np.packbits(left)])
        return stream, np.concatenate([np.empty(0, np.uint64), *begins]).astype(np.uint64)

    def decode(self, stream: np.ndarray, begins: np.ndarray, total: int) -> np.ndarray:
        """Return the symbols of a stream, uint16 [total]; the inverse of `encode`.

        Args:
            stream: uint8.
            begins: the bit at which each chunk begins.
            total: how many symbols were coded.
        Raises:
            CheckpointError: the stream ends before that, or holds what no code begins with.
        """
        if begins.size != -(-total // CHUNK):
            raise CheckpointError(f"{total} symbols are {-(-total // CHUNK)} chunks, got {begins.size} beginnings.")
        order, codes = self._canonical
        spans = np.array(self.lengths, np.int64)[order]
        last = np.uint64(
            int(codes[-1]) + (1 << (64 - int(spans[-1]))) - 1
        )  # the largest window that begins with a code
        padded = np.concatenate([stream, np.zeros(_PADDING + 1, np.uint8)])
        found = np.empty((CHUNK, begins.size), np.uint16)
        at = begins.astype(np.int64)
        for i in range(min(CHUNK, total)):
            live = begins.size if i < (total - 1) % CHUNK + 1 else begins.size - 1  # the last chunk may be shorter
            if live and int(at[:live].max()) >= 8 * stream.size:
                raise CheckpointError("a Huffman-coded stream ends too early; the file is damaged.")
            window = _window(padded, at[:live])
            if live and window.max() > last:
                raise CheckpointError("a Huffman-coded stream holds bits that are no code; the file is damaged.")
            which = np.searchsorted(codes, window, side="right") - 1
            found[i, :live] = order[which]
            at[:live] += spans[which]
        return found.T.reshape(-1)[:total]


def _bits(symbols: np.ndarray, lengths: np.ndarray, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bits of a message, a byte each, and where each symbol begins."""
    spans = lengths[symbols]
    ends = np.cumsum(spans)
    bits = np.zeros(int(ends[-1]), np.uint8)
    for i in range(int(spans.max())):
        some = spans > i
        bits[(ends - spans)[some] + i] = (table[symbols[some]] >> np.uint64(63 - i)) & np.uint64(1)
    return bits, ends - spans


def _window(stream: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The 64 bits from each bit position on; the lowest ones are not filled when the position is not a byte's first."""
    byte, shift = at >> 3, (at & 7).astype(np.uint64)
    window = np.zeros(at.size, np.uint64)
    for i in range(8):
        window = (window << np.uint64(8)) | stream[byte + i]
    return window << shift
