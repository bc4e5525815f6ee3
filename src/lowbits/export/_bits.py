# SPDX-License-Identifier: Apache-2.0
"""Put codes of any width from 1 to 16 bits into bytes, without a gap.

The first code sits in the lowest bits of the first byte, so for 8, 4, 2 and 1 bits these are the bytes of
`lowbits.formats.pack`.
"""

from __future__ import annotations

import numpy as np

from lowbits.errors import FormatError

_CHUNK = 1 << 20  # codes expanded to one byte a bit at a time; a multiple of 8, so every chunk ends with a byte


def bit_width(levels: int) -> int:
    """Return ceil(log2 levels), at least 1: the bits of a packed code.

    Args:
        levels: how many values a code can take, 1 to 65,536.
    """
    return max(1, (levels - 1).bit_length())


def pack_bits(codes: np.ndarray, width: int) -> np.ndarray:
    """Pack codes of `width` bits.

    Args:
        codes: integers below 2^width, 1-D.
        width: 1 to 16.
    Returns:
        uint8 [ceil(codes * width / 8)].
    Raises:
        FormatError: another width, or a code that does not fit.
    """
    _check_width(width)
    if codes.size and (int(codes.min()) < 0 or int(codes.max()) >> width):
        raise FormatError(f"a code of {int(codes.max())} does not fit {width} bits; pack with more.")
    parts = [_expand(codes[i : i + _CHUNK], width) for i in range(0, codes.size, _CHUNK)]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def unpack_bits(packed: np.ndarray, width: int, count: int) -> np.ndarray:
    """Return the first `count` codes, uint16 [count]; the inverse of `pack_bits`.

    Args:
        packed: uint8.
        width: 1 to 16.
        count: how many codes were packed.
    Raises:
        FormatError: another width, or not the bytes of so many codes.
    """
    _check_width(width)
    if packed.size != -(-count * width // 8):
        raise FormatError(
            f"{count} codes of {width} bits take {-(-count * width // 8)} bytes, got {packed.size}: "
            "packed with another width, or cut off."
        )
    weights = 1 << np.arange(width, dtype=np.uint32)
    step = _CHUNK * width // 8
    parts = []
    for begin in range(0, packed.size, step):
        some = min(_CHUNK, count - begin * 8 // width)
        bits = np.unpackbits(packed[begin : begin + step], bitorder="little", count=some * width)
        parts.append((bits.reshape(some, width) @ weights).astype(np.uint16))
    return np.concatenate(parts) if parts else np.empty(0, np.uint16)


def _expand(codes: np.ndarray, width: int) -> np.ndarray:
    bits = (codes.astype(np.uint32)[:, None] >> np.arange(width, dtype=np.uint32)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little")


def _check_width(width: int) -> None:
    if not 1 <= width <= 16:
        raise FormatError(f"codes of {width} bits cannot be packed; 1 to 16 bits can.")
