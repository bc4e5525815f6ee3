# SPDX-License-Identifier: Apache-2.0
"""Make 32 rounded-normal numbers at a time from random words, by AND and OR.

R = round(Z / 2), Z ~ N(0, 1), takes the values 0, +-1, +-2 with the probabilities 0.68269, 0.31461, 0.00270 (larger
ones, 5.7e-7, are cut off). A bit that is 1 with probability n / 2^k is k random bits, folded along the binary digits of
n from the lowest up: acc = 0; digit 1: acc |= word; digit 0: acc &= word. One bit of a word an element:

    m1 = bernoulli(|R| >= 1),  m2 = m1 & bernoulli(|R| = 2 given |R| >= 1),  s = one word
    |R| = m1 + m2,  the sign is s

The paper (arXiv:2505.11170) generates R by bitwise operations too; its circuit was not at hand, this one is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from lowbits.errors import FormatError

LANES = 32
# Nibble: magnitude in the bits 0 and 1, sign in bit 3.
_SIGN_OF_NIBBLE = 8


class Odds(NamedTuple):
    """The probability numerator / 2^digits."""

    numerator: int
    digits: int

    @property
    def value(self) -> Fraction:
        """The probability, exactly."""
        return Fraction(self.numerator, 1 << self.digits)


class Fidelity(Enum):
    """How closely the circuit follows the rounded normal: 12, 16 or 21 random words for 32 elements.

    The total variation to the exact distribution is 0.0048, 0.0009 and 0.0001.
    """

    LITE = "lite"
    DEFAULT = "default"
    FINE = "fine"

    @property
    def one(self) -> Odds:
        """Of |R| >= 1."""
        return {"lite": Odds(5, 4), "default": Odds(81, 8), "fine": Odds(325, 10)}[self.value]

    @property
    def two(self) -> Odds:
        """Of |R| = 2 where |R| >= 1."""
        return Odds(9, 10) if self is Fidelity.FINE else Odds(1, 7)

    @property
    def words(self) -> int:
        """Random words for 32 elements."""
        return self.one.digits + self.two.digits + 1

    @property
    def calls(self) -> int:
        """Calls of Philox, four words each."""
        return -(-self.words // 4)

    @property
    def probabilities(self) -> tuple[float, float, float]:
        """P(|R| = 0), P(|R| = 1), P(|R| = 2), exactly what the circuit does."""
        one, two = self.one.value, self.one.value * self.two.value
        return float(1 - one), float(one - two), float(two)

    @property
    def variance(self) -> float:
        """E[R^2]."""
        _, one, two = self.probabilities
        return one + 4 * two


def bernoulli(words: Sequence[Tensor], odds: Odds) -> Tensor:
    """Return words whose bits are 1 with probability `odds`, independently.

    Args:
        words: `odds.digits` random words, int64 of one shape, used in order.
        odds: n / 2^k.
    """
    acc = torch.zeros_like(words[0])
    for place, word in enumerate(words[: odds.digits]):
        acc = acc | word if odds.numerator >> place & 1 else acc & word
    return acc


def rounded_normal(words: Sequence[Tensor], fidelity: Fidelity) -> Tensor:
    """Return R of every bit of the words.

    Args:
        words: `fidelity.words` random words, int64 of one shape; more are ignored.
        fidelity: which circuit.
    Returns:
        int64 [*shape, 32] of -2 .. 2; element j of the last axis is bit j.
    """
    ones, twos = fidelity.one.digits, fidelity.two.digits
    m1 = bernoulli(words, fidelity.one)
    m2 = m1 & bernoulli(words[ones:], fidelity.two)
    lane = torch.arange(LANES, dtype=torch.int64, device=m1.device)
    bit1, bit2, sign = ((word.unsqueeze(-1) >> lane) & 1 for word in (m1, m2, words[ones + twos]))
    return (bit1 + bit2) * (1 - 2 * sign)


def pack_nibbles(r: Tensor) -> Tensor:
    """Pack eight values of R into a word: element j in the bits 4j .. 4j + 3, magnitude below, sign above; no -0.

    Args:
        r: integers from -3 to 3, [..., 8 n].
    Returns:
        int64 [..., n] below 2^32.
    Raises:
        FormatError: another length, or values beyond.

    >>> hex(pack_nibbles(torch.tensor([0, 1, -1, 2, -2, 0, 1, -2])).item())
    '0xa10a2910'
    """
    if r.shape[-1] % 8 or int(r.abs().max()) > 3:
        raise FormatError(f"eight values from -3 to 3 make a word, got {r.shape[-1]} up to {int(r.abs().max())}.")
    r = r.to(torch.int64)
    nibbles = (r.abs() | torch.where(r < 0, _SIGN_OF_NIBBLE, 0)).unflatten(-1, (-1, 8))
    return (nibbles << (4 * torch.arange(8, device=r.device))).sum(-1)


def unpack_nibbles(words: Tensor) -> Tensor:
    """Return int64 [..., 8 n] from words [..., n]: the inverse of `pack_nibbles`."""
    nibbles = (words.unsqueeze(-1) >> (4 * torch.arange(8, device=words.device))) & 15
    return ((nibbles & 3) * (1 - 2 * (nibbles >> 3))).flatten(-2)
