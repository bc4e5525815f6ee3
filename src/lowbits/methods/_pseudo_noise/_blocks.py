# SPDX-License-Identifier: Apache-2.0
"""Cut a matrix into blocks: square ones are the same blocks of the transpose."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lowbits.errors import ShapeError

Block = tuple[int, int]


def counts(shape: torch.Size | tuple[int, int], block: Block) -> tuple[int, int]:
    """Return how many blocks there are down and across; those at the edges may be partial.

    Raises:
        ShapeError: no matrix.
    """
    if len(shape) != 2:
        raise ShapeError(f"blocks are cut from a matrix, got the shape {tuple(shape)}.")
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def to_blocks(w: Tensor, block: Block) -> Tensor:
    """Return the elements of every block in a row: [down, across, rows x columns], zeros where a block is partial."""
    down, across = counts(w.shape, block)
    padded = functional.pad(w, (0, across * block[1] - w.shape[1], 0, down * block[0] - w.shape[0]))
    return padded.view(down, block[0], across, block[1]).transpose(1, 2).reshape(down, across, -1)


def from_blocks(blocks: Tensor, shape: torch.Size | tuple[int, int], block: Block) -> Tensor:
    """Return the matrix again: the inverse of `to_blocks`."""
    down, across, _ = blocks.shape
    whole = blocks.view(down, across, *block).transpose(1, 2).reshape(down * block[0], across * block[1])
    return whole[: shape[0], : shape[1]].contiguous()


def elements(shape: torch.Size | tuple[int, int], block: Block, device: torch.device | str = "cpu") -> Tensor:
    """Return how many elements each block has, int64 [down, across]."""
    down, across = counts(shape, block)
    rows = (shape[0] - torch.arange(down, device=device) * block[0]).clamp(max=block[0])
    columns = (shape[1] - torch.arange(across, device=device) * block[1]).clamp(max=block[1])
    return rows[:, None] * columns[None, :]
