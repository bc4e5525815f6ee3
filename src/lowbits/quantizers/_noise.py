# SPDX-License-Identifier: Apache-2.0
"""Draw the random bits of stochastic rounding from a counter.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a block cipher run on a counter.
Every draw is a pure function of (seed, name, role, step, element), so it is the same on every device, under
`torch.compile`, in whatever chunks a tensor is processed, on however many ranks, and after a resume.

    key      = 64 bits of BLAKE2b(seed, name, role)
    counter  = (element // 4: 64 bits, step: 64 bits);   the element's word is number element % 4
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(counter: Sequence[Tensor | int], key: tuple[Tensor | int, Tensor | int]) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32-10.

    Args:
        counter: four words below 2^32, int64 tensors that broadcast (or ints, at least one tensor).
        key: two words below 2^32, likewise.
    Returns:
        Four int64 tensors of values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap around; the wrapped 64 bits are the right ones, and the mask drops the sign's copies.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) & _LOW) ^ c1 ^ k0, p1 & _LOW, ((p0 >> 32) & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3  # type: ignore[return-value]


@dataclass(frozen=True)
class Noise:
    """A stream of random bits; make one with `Noise.of`.

    Args:
        key: the two 32-bit words of the Philox key; int64 scalar tensors keep them out of a compiled graph's constants.
    """

    key: tuple[Tensor | int, Tensor | int]

    @staticmethod
    def of(seed: int, name: str, role: str) -> Noise:
        """Return the stream of one tensor.

        Args:
            seed: the run's seed, any int.
            name: the layer or parameter, for example `transformer.h.0.mlp.c_fc`.
            role: what is rounded there, for example `dgrad.lhs`.
        """
        digest = hashlib.blake2b(f"{seed}\0{name}\0{role}".encode(), digest_size=8).digest()
        return Noise((int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")))

    def bits(
        self, shape: Sequence[int], step: int | Tensor, *, offset: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return 32 random bits an element.

        Args:
            shape: of the result.
            step: which draw, a non-negative int or an int64 scalar tensor.
            offset: index of the first element in the whole tensor, when this is a chunk of it.
            device: of the result.
        Returns:
            int64 values below 2^32.
        """
        count = math.prod(shape)
        first = offset // 4
        index = torch.arange(first, (offset + count + 3) // 4, dtype=torch.int64, device=device)
        words = philox((index & _LOW, index >> 32, step & _LOW, step >> 32), self.key)
        return torch.stack(words, -1).view(-1)[offset - 4 * first :][:count].view(*shape)

    def bits16(
        self, shape: Sequence[int], step: int | Tensor, *, offset: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return 16 random bits an element: `bits` cut in halves, the lower half first; a counter serves 8 elements.

        Args and Returns: as `bits`; values below 2^16.
        """
        first, last = offset // 2, (offset + math.prod(shape) + 1) // 2
        words = self.bits((last - first,), step, offset=first, device=device)
        halves = torch.stack((words & 0xFFFF, words >> 16), -1).view(-1)
        return halves[offset - 2 * first :][: math.prod(shape)].view(*shape)

    def bits8(
        self, shape: Sequence[int], step: int | Tensor, *, offset: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return 8 random bits an element: `bits` cut in bytes, the lowest first; a counter serves 16 elements.

        Args and Returns: as `bits`; values below 2^8.
        """
        first, last = offset // 4, (offset + math.prod(shape) + 3) // 4
        words = self.bits((last - first,), step, offset=first, device=device)
        parts = torch.stack([(words >> shift) & 0xFF for shift in (0, 8, 16, 24)], -1).view(-1)
        return parts[offset - 4 * first :][: math.prod(shape)].view(*shape)

    def uniform(
        self, shape: Sequence[int], step: int | Tensor, *, offset: int = 0, device: torch.device | str = "cpu"
    ) -> Tensor:
        """Return float32 values k / 2^24, k = 0 .. 2^24 - 1: the top 24 of `bits`, so exact and below 1."""
        # A mask, not a shift: inductor's C++ (torch 2.13) moved a shift behind the conversion and did not compile.
        top = self.bits(shape, step, offset=offset, device=device) & 0xFFFFFF00
        return top.to(torch.float32) * 2.0**-32
