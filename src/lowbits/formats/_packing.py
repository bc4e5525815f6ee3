# SPDX-License-Identifier: Apache-2.0
"""Put codes of 4, 2, 1 and 1.6 bits into bytes.

The first code of a byte sits in its lowest bits. At 1.6 bits a byte holds five ternary codes as base-3 digits
w + 1, the lowest digit first. Any length works: the last byte is filled up, and `unpack` takes the true count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbits.errors import FormatError

_TRITS_PER_BYTE = 5  # 3^5 = 243 <= 256: 1.6 bits a code


def packed_bytes(count: int, bits: float) -> int:
    """Return how many bytes `count` codes of `bits` (8, 4, 2, 1, or 1.6 for base 3) take."""
    return -(-count // _per_byte(bits))


def pack(codes: Tensor, bits: float) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, any shape, read in row-major order; each below 2^bits, or for 1.6 bits one of `TERNARY`'s
            codes 3, 0, 1 (that is -1, 0, 1 in two's complement).
        bits: 8, 4, 2, 1, or 1.6.
    Returns:
        uint8 [packed_bytes(codes.numel(), bits)].
    Raises:
        FormatError: another width.

    >>> pack(torch.tensor([1, 2, 3], dtype=torch.uint8), 4).tolist()
    [33, 3]
    """
    per_byte = _per_byte(bits)
    flat = codes.reshape(-1)
    if per_byte == 1:
        return flat.clone()
    if bits == 1.6:
        flat = (flat + 1) & 3  # two's complement to w + 1
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % per_byte)).view(-1, per_byte)
    return (padded.to(torch.int32) * _weights(bits, codes.device)).sum(1).to(torch.uint8)


def unpack(packed: Tensor, bits: float, count: int) -> Tensor:
    """Return the first `count` codes of `packed`, uint8 [count]; the inverse of `pack`.

    Raises:
        FormatError: another width, or fewer codes than `count` in `packed`.
    """
    per_byte = _per_byte(bits)
    if packed.numel() != packed_bytes(count, bits):
        raise FormatError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {packed.numel()}: "
            "the tensor was packed with another width or is cut off."
        )
    if per_byte == 1:
        return packed.clone()
    base = 3 if bits == 1.6 else 1 << int(bits)
    digits = packed.to(torch.int32)[:, None] // _weights(bits, packed.device) % base
    codes = digits.to(torch.uint8).reshape(-1)[:count]
    return (codes + 3) & 3 if bits == 1.6 else codes


def _per_byte(bits: float) -> int:
    if bits == 1.6:
        return _TRITS_PER_BYTE
    if bits not in (1, 2, 4, 8):
        raise FormatError(f"codes of {bits} bits have no packed layout; there is one for 8, 4, 2, 1 and 1.6 bits.")
    return 8 // int(bits)


def _weights(bits: float, device: torch.device) -> Tensor:
    base = 3 if bits == 1.6 else 1 << int(bits)
    return torch.tensor([base**i for i in range(_per_byte(bits))], dtype=torch.int32, device=device)
