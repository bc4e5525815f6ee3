# SPDX-License-Identifier: Apache-2.0
"""Code books as tables by which the kernels encode, on a GPU and on a CPU: one look-up, no search and no arithmetic."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lowbits.formats import DYNAMIC4, DYNAMIC8, UDYNAMIC8, Codebook, Format
from lowbits.optim._blockwise import Blockwise

SHIFTS: dict[Format, int] = {DYNAMIC8: 17, UDYNAMIC8: 16, DYNAMIC4: 17}
"""Code books that are looked up, with the logarithm of the numbers in a bin."""


@cache
def steps_of(codec: Blockwise, device: torch.device = torch.device("cpu")) -> Tensor:  # noqa: B008  a constant
    """Return the table of a code book.

    The float32 numbers, in their order, are cut into bins of 2^16 (2^17) numbers, in none of which more than one code
    ends. An entry holds, above these bits, the code of the bin's first number; in them, what must be added to the
    number's place in the bin to carry into the next code. It is made from the code book's own boundaries, so
    it gives the codes of its search, bit for bit.

    Args:
        codec: of a format in `SHIFTS`.
        device: of the table; one is shared by all that ask.
    Returns:
        int32 [2^15] ([2^14]): a view that begins with the bin of 0. The bins of negative numbers lie before it.
    """
    shift, book = SHIFTS[codec.format], codec.format
    assert isinstance(book, Codebook) and book.max == 1, "a quotient is looked up as it is"
    ends, bins = order(torch.tensor(book.boundaries)), torch.arange(-(1 << (31 - shift)), 1 << (31 - shift))
    entries = torch.searchsorted(ends, bins << shift) << shift
    within = (ends >> shift) + len(bins) // 2
    assert within.unique().numel() == within.numel(), f"{codec}: two codes end in one bin"
    entries[within] += ((1 << shift) - 1) - (ends & ((1 << shift) - 1))
    return entries.to(device, torch.int32)[len(bins) // 2 :]


def order(x: Tensor) -> Tensor:
    """Return int64 numbers in the order of float32 numbers: their bits, those of negative ones turned round."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
