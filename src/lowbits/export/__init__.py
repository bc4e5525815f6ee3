# SPDX-License-Identifier: Apache-2.0
"""Weights as they are stored: packed or Huffman-coded codes in checksummed files, and their exact sizes."""

from lowbits.export._bits import bit_width, pack_bits, unpack_bits
from lowbits.export._disk import write_whole
from lowbits.export._file import CodedModel, Coding, coded_sizes, even_points, load_coded, save_coded
from lowbits.export._huffman import HuffmanCode
from lowbits.export._points import (
    Buckets,
    PointTensor,
    between,
    bucketed,
    flattened,
    gradient_bucketed,
    num_buckets,
)
from lowbits.export._sizes import Sizes, published_bytes, published_ratio

__all__ = [
    "Buckets",
    "CodedModel",
    "Coding",
    "HuffmanCode",
    "PointTensor",
    "Sizes",
    "between",
    "bit_width",
    "bucketed",
    "coded_sizes",
    "even_points",
    "flattened",
    "gradient_bucketed",
    "load_coded",
    "num_buckets",
    "pack_bits",
    "published_bytes",
    "published_ratio",
    "save_coded",
    "unpack_bits",
    "write_whole",
]
