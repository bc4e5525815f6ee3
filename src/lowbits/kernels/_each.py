# SPDX-License-Identifier: Apache-2.0
"""Quantize many matrices as `quantize_both` does one, in one launch or two for all.

A model's weights are many and small beside its activations: a launch each would take the host longer than the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbits.kernels._coded import ALIGNED, Coded
from lowbits.kernels._launch import launch
from lowbits.kernels._rows import Made, made_of, magnitudes, quantize_both, scale_shape, tile_for
from lowbits.kernels._units import kernels, launches
from lowbits.quantizers import QuantSpec


class _Table(NamedTuple):
    """Where the matrices and their tiles are, see `lowbits.kernels.rows`; and how large their results are."""

    matrices: Tensor
    tiles: Tensor
    largest: int
    codes: list[int]
    scales_k: list[int]
    scales_r: list[int]


def quantize_each(
    matrices: Sequence[Tensor], along_k: QuantSpec | None, along_r: QuantSpec | None
) -> list[tuple[Coded | None, Coded | None]]:
    """Return `quantize_both` of every matrix.

    Args:
        matrices: [R, K] each, of one dtype, on one device.
        along_k: as in `quantize_both`.
        along_r: likewise.
    """
    made, together = made_of(along_k, along_r), [i for i, x in enumerate(matrices) if _suits(x, matrices[0])]
    found: dict[int, tuple[Coded | None, Coded | None]] = {}
    if made is not None and along_k is not None and along_r is not None and len(together) > 1:
        found = dict(zip(together, _at_once([matrices[i] for i in together], made, along_k, along_r), strict=True))
    return [found.get(i) or quantize_both(x, along_k, along_r, None, None) for i, x in enumerate(matrices)]


def _suits(x: Tensor, first: Tensor) -> bool:
    """Whether a launch for many covers it, together with the first."""
    sides = not (x.shape[0] % ALIGNED or x.shape[1] % ALIGNED) and x.numel() > 0
    known = x.dtype == first.dtype and x.dtype in (torch.bfloat16, torch.float32)
    return launches("rows", x.device) and known and sides and x.is_contiguous() and x.data_ptr() % 16 == 0


def _at_once(
    matrices: Sequence[Tensor], made: tuple[Made, Made], along_k: QuantSpec, along_r: QuantSpec
) -> list[tuple[Coded, Coded]]:
    (of_k, of_r), first = (axis.of for axis in made), matrices[0]
    table = _table(tuple((x.data_ptr(), *x.shape) for x in matrices), (of_k, of_r), first.device)
    codes_k, codes_r = (first.new_empty(sum(table.codes), dtype=axis.dtype) for axis in made)
    scales_k, scales_r = (first.new_empty(sum(n), dtype=torch.float32) for n in (table.scales_k, table.scales_r))
    _launch(table, made, (codes_k, scales_k, codes_r, scales_r), first)
    parts = zip(
        matrices, codes_k.split(table.codes), scales_k.split(table.scales_k), codes_r.split(table.codes),
        scales_r.split(table.scales_r), strict=True,
    )  # fmt: skip
    return [
        (
            Coded(a.view(x.shape), _shaped(u, of_k, *x.shape), along_k, x.shape[1]),
            Coded(b.view(x.shape[::-1]), _shaped(v, of_r, *x.shape[::-1]), along_r, x.shape[0]),
        )
        for x, a, u, b, v in parts
    ]


def _shaped(scale: Tensor, of: str, rows: int, length: int) -> Tensor:
    shape = scale_shape(of, rows, length)
    scale = scale[: shape[0] * shape[1]]
    return scale.view(shape[::-1]).t() if of == "GROUP" else scale.view(shape)


@lru_cache(maxsize=16)
def _table(known: tuple[tuple[int, int, int], ...], of: tuple[str, str], device: torch.device) -> _Table:
    """Say where the matrices are, and their tiles. Addresses of parameters stay, and so does a table of them."""
    (br, bk), _ = tile_for(*of)
    largest = [magnitudes(of[0], rows) + magnitudes(of[1], columns) for _, rows, columns in known]
    codes = [rows * columns for _, rows, columns in known]
    scales_k, scales_r = (
        [_words(scale_shape(of[i], *(sides if i == 0 else sides[::-1]))) for _, *sides in known] for i in (0, 1)
    )
    begins = [[0, *accumulate(n)][:-1] for n in (largest, codes, scales_k, scales_r)]
    rows_of = [
        [address, rows // ALIGNED, columns // ALIGNED, of_largest, at // ALIGNED, at // ALIGNED, at_k, at_r]
        for (address, rows, columns), of_largest, at, at_k, at_r in zip(known, *begins, strict=True)
    ]
    tiles = []
    for number, (_, rows, columns) in enumerate(known):
        across, down = -(-columns // bk), -(-rows // br)
        place = torch.arange(across * down, dtype=torch.int32)
        tiles.append(torch.stack([torch.full_like(place, number), place % across, place // across], 1))
    matrices = torch.tensor(rows_of, dtype=torch.int64)
    return _Table(matrices.to(device), torch.cat(tiles).to(device), sum(largest), codes, scales_k, scales_r)


def _words(shape: tuple[int, int]) -> int:
    """Numbers that scales take: cuBLAS wants the first at a multiple of 16 bytes."""
    return -(-shape[0] * shape[1] // 4) * 4


def _launch(table: _Table, made: tuple[Made, Made], results: tuple[Tensor, ...], first: Tensor) -> None:
    k = kernels("rows")
    assert k is not None
    (of_k, of_r), grid = (axis.of for axis in made), (len(table.tiles), 1, 1)
    (br, bk), warps = tile_for(of_k, of_r)
    shared: dict[str, Any] = {"OF_K": of_k, "OF_R": of_r, "BR": br, "BK": bk, "num_warps": warps,
                              "BF16": first.dtype == torch.bfloat16}  # fmt: skip
    largest = results[1]  # nothing reads it
    if table.largest:
        largest = torch.zeros(table.largest, dtype=torch.int32, device=first.device)
        key = tuple(shared.values())
        launch(k.amax_each, grid, (table.tiles, table.matrices, largest), lambda: shared, key, first.device)
    constants = shared | made[0].constants | made[1].constants | {"enable_fp_fusion": False}
    arguments = table.tiles, table.matrices, largest, *results
    launch(k.quantize_each, grid, arguments, lambda: constants, tuple(constants.values()), first.device)
