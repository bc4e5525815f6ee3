# SPDX-License-Identifier: Apache-2.0
"""Say which elements share a scale.

Every granularity is one broadcast: `view` reshapes a tensor so that the elements which share a scale lie along
`dims`; a scale has that view's rank and extent 1 along `dims`. `restore` undoes it. Any shape works: what does not
fill its last group, tile or block is filled up with zeros, which change no amax.

The LAST axis of a tensor is the one that its GEMM contracts (K), all axes before it are rows. So in every GEMM
`PerTensor` and `PerRow` scales can be taken out of the sum, and the others cannot. In the words of the papers:

    operand                      per token    per channel    per column
    X in fprop  [tokens, in]     PerRow                      PerColumn
    W in fprop  [out, in]                     PerRow         PerColumn
    G in dgrad  [tokens, out]    PerRow                      PerColumn
    W in dgrad  [in, out]                     PerColumn      PerRow
    G in wgrad  [out, tokens]    PerColumn                   PerRow
    X in wgrad  [in, tokens]     PerColumn                   PerRow
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import pad

from lowbits.errors import ShapeError, SpecError


def restore(view: Tensor, like: Tensor, granularity: Granularity) -> Tensor:
    """Undo `granularity.view`: return `view` in the shape of `like`, without what filled it up."""
    match granularity:
        case PerGroup():
            return view.flatten(-2)[..., : like.shape[-1]]
        case PerTile():
            return view.flatten(-2).flatten(-3, -2)[..., : like.shape[-2], : like.shape[-1]]
        case PerBlock():
            return view.reshape(-1)[: like.numel()].view(like.shape)
    return view


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return `x` viewed so that `dims` hold the elements of one scale, and `dims`."""
        return x, tuple(range(x.ndim))


@dataclass(frozen=True)
class PerRow:
    """One scale for each vector that the GEMM contracts: a token of X, an output channel of W."""

    def view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """See `PerTensor.view`."""
        return x, (-1,)


@dataclass(frozen=True)
class PerColumn:
    """One scale for each index of the contraction. No GEMM can take it out of its sum: simulation only."""

    def view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """See `PerTensor.view`."""
        if x.ndim < 2:
            raise ShapeError(f"PerColumn needs at least 2 dimensions, got shape {tuple(x.shape)}. Use PerTensor().")
        return x, tuple(range(x.ndim - 1))


@dataclass(frozen=True)
class PerGroup:
    """One scale for every `size` consecutive elements along the contraction (MX, NVFP4, grouped INT4)."""

    size: int

    def __post_init__(self) -> None:
        _positive(self, self.size)

    def view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """See `PerTensor.view`."""
        return pad(x, (0, -x.shape[-1] % self.size)).unflatten(-1, (-1, self.size)), (-1,)


@dataclass(frozen=True)
class PerBlock:
    """One scale for every `size` consecutive elements of the flattened tensor (8-bit optimizer states)."""

    size: int

    def __post_init__(self) -> None:
        _positive(self, self.size)

    def view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """See `PerTensor.view`."""
        return pad(x.reshape(-1), (0, -x.numel() % self.size)).view(-1, self.size), (-1,)


@dataclass(frozen=True)
class PerTile:
    """One scale for every tile of `rows` x `columns` of the last two axes; the same for a transposed square tile."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        _positive(self, self.rows)
        _positive(self, self.columns)

    def view(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """See `PerTensor.view`."""
        if x.ndim < 2:
            raise ShapeError(f"{self} needs at least 2 dimensions, got shape {tuple(x.shape)}. Use PerGroup(size).")
        x = pad(x, (0, -x.shape[-1] % self.columns, 0, -x.shape[-2] % self.rows))
        return x.unflatten(-1, (-1, self.columns)).unflatten(-3, (-1, self.rows)), (-3, -1)


Granularity = PerTensor | PerRow | PerColumn | PerGroup | PerBlock | PerTile


def _positive(granularity: object, size: int) -> None:
    if size < 1:
        raise SpecError(f"{granularity}: a size is at least 1.")
