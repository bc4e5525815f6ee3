# SPDX-License-Identifier: Apache-2.0
"""Say where the bytes of a file are, to the byte, and what the paper's formula would have said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from lowbits.export._huffman import HuffmanCode


@dataclass(frozen=True)
class Sizes:
    """Where the bytes of a coded model are.

        file = codes + begins + ranges + points + lengths + plain + header

    Args:
        codes: packed codes or Huffman streams.
        begins: where chunks of the streams begin, which lets them be decoded side by side.
        ranges: `low` and `high` of every bucket.
        points: tables of learned points.
        lengths: the Huffman code.
        plain: what is not coded.
        header: names, shapes and checksums.
        dense: bytes of the same tensors uncoded.
        elements: how many weights are coded.
        entropy: of the codes, bits a weight, one histogram over all tensors.
        mean_length: of their Huffman code, bits a weight.
    """

    codes: int
    begins: int
    ranges: int
    points: int
    lengths: int
    plain: int
    header: int
    dense: int
    elements: int
    entropy: float
    mean_length: float

    @property
    def file(self) -> int:
        """Bytes of the file."""
        return self.codes + self.begins + self.ranges + self.points + self.lengths + self.plain + self.header

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the uncoded tensors."""
        return self.dense / self.file

    @property
    def bits_a_weight(self) -> float:
        """Bits of the file for each coded weight, without what is not coded."""
        return 8 * (self.file - self.plain) / self.elements

    def __str__(self) -> str:
        """Tell it in one line."""
        return (
            f"{self.file:,} bytes, {self.ratio:.2f} times smaller than {self.dense:,}; {self.bits_a_weight:.3f} bits a "
            f"coded weight (codes {8 * self.codes / self.elements:.3f}, entropy {self.entropy:.3f})"
        )


def published_ratio(bits: float, bucket: int) -> float:
    """Return the paper's compression factor, k f / (k b + 2 f) with f = 32   (arXiv:1802.05668, sec. 4).

    It leaves out partial buckets, point tables, the Huffman code, and what is not coded.

    Args:
        bits: of a code; the mean length where it is Huffman-coded.
        bucket: weights that share a range.
    """
    return bucket * 32 / (bucket * bits + 64)


def published_bytes(plain: int, coded: int, bits: float, bucket: int) -> float:
    """Return the paper's size in bytes: 4 N_plain + bits N_coded / 8 + 8 N_coded / k.

    Args:
        plain: how many parameters are not coded.
        coded: how many are.
        bits: mean bits of a code.
        bucket: weights that share a range.
    """
    return 4 * plain + bits * coded / 8 + 8 * coded / bucket


def measure(tensors: Mapping[str, Tensor], file: int, counts: Sequence[int], dense: int) -> Sizes:
    """Return the sizes of a file.

    Args:
        tensors: all that are in it.
        file: its bytes.
        counts: how often each code occurs.
        dense: bytes of the same model uncoded.
    """
    found: dict[str, int] = dict.fromkeys(("codes", "begins", "ranges", "points", "lengths", "plain"), 0)
    for key, tensor in tensors.items():
        kind = key.split("/")[0]
        found["ranges" if kind in ("low", "high") else kind] += tensor.nbytes
    total = sum(counts)
    entropy = -sum(n / total * math.log2(n / total) for n in counts if n)
    return Sizes(
        **found,
        header=file - sum(found.values()),
        dense=dense,
        elements=total,
        entropy=entropy + 0.0,
        mean_length=HuffmanCode.of_counts(counts).bits(counts) / total,
    )
