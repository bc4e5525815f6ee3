# SPDX-License-Identifier: Apache-2.0
"""Moments in 8 or 4 bits, every block of the flattened tensor with a scale of its own (arXiv:2110.02861, sec. 2.1).

N = max |x| over the block;   y = x * (1 / N);   code = nearest point of the format to y max;   x ~ point / max * N
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.formats import Format, pack, packed_bytes, unpack
from lowbits.optim._codec import Stored
from lowbits.quantizers import Noise

SMALLEST_SCALE = 2.0**-126
"""Scales of blocks that are not all zero are normal float32 numbers: below, 1 / N would overflow."""


@cache
def _digest(points: tuple[float, ...]) -> str:
    return hashlib.sha256(struct.pack(f"<{len(points)}f", *points)).hexdigest()[:16]


@dataclass(frozen=True, repr=False)
class Blockwise:
    """Store a moment in blocks of a flattened tensor.

    Codes have the parameter's shape (4-bit ones lie two to a byte: flat). Where whole blocks make up its rows, scales
    are [rows, blocks of a row] and packed codes [rows, bytes of a row], so that they can be sharded like it.

    A block of zeros has scale 0. NaN or infinity makes the scale of its block NaN or infinity and what is decoded there
    not finite; other blocks are as they were.

    Args:
        format: 8- or 4-bit codes; `DYNAMIC8` for moments of both signs and `UDYNAMIC8` for others are the published
            ones. Its largest value stands for the block's largest magnitude.
        size: elements that share a scale, 64 to 4096 and a multiple of 16.
    Raises:
        SpecError: another width or size.

    >>> from lowbits.formats import DYNAMIC8
    >>> Blockwise(DYNAMIC8).bytes_per_element
    1.015625
    """

    format: Format
    size: int = 256

    def __post_init__(self) -> None:
        if self.format.bits not in (4, 8):
            raise SpecError(f"Blockwise: codes of 8 or 4 bits, {self.format.name} has {self.format.bits}.")
        if not 64 <= self.size <= 4096 or self.size % 16:
            raise SpecError(f"Blockwise: a block has 64 to 4096 elements, a multiple of 16, got {self.size}.")

    def __repr__(self) -> str:
        return f"Blockwise({self.format.name}, {self.size})"

    @property
    def bytes_per_element(self) -> float:
        """Codes and scales, for a tensor of whole blocks."""
        return self.format.bits / 8 + 4 / self.size

    @property
    def layout(self) -> str:
        """See `StateCodec.layout`: the version of the layout, the block size, and what tells the points apart."""
        return f"blockwise v1, {self.format.name} {_digest(self.points)}, blocks of {self.size}"

    @cached_property
    def points(self) -> tuple[float, ...]:
        """What each code stands for in a block of scale 1; float32."""
        values = torch.tensor(self.format.code_values, dtype=torch.float32)
        return tuple((values * (1 / self.format.max)).nan_to_num(nan=0.0).tolist())

    def init(self, like: Tensor) -> Stored:
        """See `StateCodec.init`."""
        (zero,) = self._codes(torch.zeros(1)).tolist()
        fill = zero if self.format.bits == 8 else zero * 17
        codes, scale = self.shapes(like.shape)
        return {
            "codes": torch.full(codes, fill, dtype=torch.uint8, device=like.device),
            "scale": torch.zeros(scale, dtype=torch.float32, device=like.device),
        }

    def decode(self, stored: Stored, shape: torch.Size) -> Tensor:
        """See `StateCodec.decode`."""
        count = shape.numel()
        codes = stored["codes"].reshape(-1)
        if self.format.bits == 4:
            codes = unpack(codes, 4, count)
        points = torch.tensor(self.points, dtype=torch.float32, device=codes.device)
        values = points[codes.long()]
        scale = stored["scale"].reshape(-1).repeat_interleave(self.size)[:count]
        return (values * scale).view(shape)

    def encode_(self, stored: Stored, value: Tensor, noise: Noise, step: Tensor) -> None:
        """See `StateCodec.encode_`."""
        flat = value.reshape(-1)
        count = flat.numel()
        blocks = torch.nn.functional.pad(flat, (0, -count % self.size)).view(math.ceil(count / self.size), self.size)
        amax = blocks.abs().amax(1, keepdim=True)
        scale = torch.where(amax > 0, amax.clamp_min(SMALLEST_SCALE), amax)
        y = blocks * torch.where(scale > 0, 1 / scale, 0.0)
        codes = self._codes(y).view(-1)[:count]
        if self.format.bits == 4:
            codes = pack(codes, 4)
        stored["codes"].copy_(codes.view(stored["codes"].shape))
        stored["scale"].copy_(scale.view(stored["scale"].shape))

    def _codes(self, y: Tensor) -> Tensor:
        return self.format.encode(self.format.project(y * self.format.max)).to(torch.uint8)

    def shapes(self, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of codes and scale for a parameter's shape."""
        row, count, bits = math.prod(shape[1:]), shape.numel(), self.format.bits
        if len(shape) > 1 and row and row % self.size == 0:
            packed, scale = (shape[0], packed_bytes(row, bits)), (shape[0], row // self.size)
        else:
            packed, scale = (packed_bytes(count, bits),), (math.ceil(count / self.size),)
        return tuple(shape) if bits == 8 else packed, scale
