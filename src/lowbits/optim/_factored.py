# SPDX-License-Identifier: Apache-2.0
"""Store a second moment as the means of its rows and columns: what Adafactor needs, and a codec for any rule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbits.optim._codec import FLOAT32, StateCodec, Stored
from lowbits.optim._tensorwise import outer
from lowbits.quantizers import Noise


@dataclass(frozen=True)
class Factored:
    """Store a matrix without negative elements in rank one (Shazeer and Stern 2018, arXiv:1804.04235, sec. 3).

        R_i = mean_j v_ij;   C_j = mean_i v_ij;   v_ij ~ R_i C_j / mean(C)

    Means are linear, and those of what is decoded are R and C again: a moving average of v is stored as the moving
    averages of R and C, as published. Tensors of more dimensions are stacks of matrices, the last two; those of fewer
    are stored by another codec.

    Args:
        otherwise: of tensors that are no matrices.
    """

    otherwise: StateCodec = FLOAT32

    @property
    def layout(self) -> str:
        """See `StateCodec.layout`."""
        return f"factored v1, else {self.otherwise.layout}"

    def init(self, like: Tensor) -> Stored:
        """See `StateCodec.init`."""
        if like.ndim < 2:
            return self.otherwise.init(like)
        shapes = {"row": like.shape[:-1], "column": like.shape[:-2] + like.shape[-1:]}
        return {name: torch.zeros(shape, dtype=torch.float32, device=like.device) for name, shape in shapes.items()}

    def decode(self, stored: Stored, shape: torch.Size) -> Tensor:
        """See `StateCodec.decode`."""
        if len(shape) < 2:
            return self.otherwise.decode(stored, shape)
        return outer(stored["row"].unsqueeze(-1), stored["column"].unsqueeze(-2))

    def encode_(self, stored: Stored, value: Tensor, noise: Noise, step: Tensor) -> None:
        """See `StateCodec.encode_`."""
        if value.ndim < 2:
            self.otherwise.encode_(stored, value, noise, step)
            return
        stored["row"].copy_(value.mean(-1))
        stored["column"].copy_(value.mean(-2))
