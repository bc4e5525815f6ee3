# SPDX-License-Identifier: Apache-2.0
"""Watch codes while they train: how many change, how far, where they lie, and whether they go anywhere.

A sample of each layer's codes is compared with what it was. The counts are buffers, so that they are in every
checkpoint and a resumed run logs the same numbers; nothing here is a float tensor of a weight's size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbits.nn import Grid, QParameter

SAMPLE = 4096
"""Codes of a layer that are watched: evenly spread over it."""

SATURATED, DEAD_STEPS = 0.5, 100
"""An alarm is raised where more than this share of codes gained since the start lies at the ends, or none of a layer's
codes changed in so many steps of learning."""


@dataclass(frozen=True)
class Occupancy:
    """Where the codes of a tensor lie.

    Args:
        shares: of every code from the lowest to the highest.
        grid: the codes that there are.
    """

    shares: tuple[float, ...]
    grid: Grid

    @property
    def bottom(self) -> float:
        """Share at the lowest code."""
        return self.shares[0]

    @property
    def top(self) -> float:
        """Share at the highest code."""
        return self.shares[-1]

    @property
    def zero(self) -> float:
        """Share at zero."""
        return self.shares[-self.grid.low]


def occupancy(p: QParameter) -> Occupancy:
    """Return the share of every code, over all of a parameter.

    Args:
        p: any.
    """
    counts = torch.bincount((p.unpacked().flatten().to(torch.int16) - p.grid.low).long(), minlength=_codes(p.grid))
    return Occupancy(tuple((counts.double() / max(1, p.numel())).tolist()), p.grid)


def _codes(grid: Grid) -> int:
    return grid.high - grid.low + 1


def sample_of(p: QParameter) -> Tensor:
    """Return the watched codes of a parameter, int8 [at most SAMPLE]: whole rows where it has many, spread evenly."""
    length = p.shape[-1]
    codes = p.codes.detach().reshape(-1, p.codes.shape[-1])
    rows = max(1, min(codes.shape[0], -(-SAMPLE // length)))
    places = torch.arange(rows, device=codes.device) * codes.shape[0] // rows
    return p.grid.unpack(codes[places], length).reshape(-1)[:SAMPLE].clone()


class CodeMeter(nn.Module):
    """What is remembered of one parameter's codes.

    Args:
        p: with the codes of the start.
    Attributes:
        last: the sample after the last update; `window`: at the last reading; int8.
        counts: int64, since the last reading: updates, codes that changed, that changed by more than one, the sums of
            changes' magnitudes and squares; and, since the last change, updates.
    """

    last: Tensor
    window: Tensor
    counts: Tensor
    start: Tensor

    def __init__(self, p: QParameter) -> None:
        super().__init__()
        sample = sample_of(p)
        self.register_buffer("last", sample)
        self.register_buffer("window", sample.clone())
        self.register_buffer("counts", torch.zeros(6, dtype=torch.int64, device=sample.device))
        self.register_buffer("start", _ends(sample, p.grid))

    @torch.no_grad()
    def update_(self, p: QParameter) -> None:
        """Take note of an update of the parameter; no transfer to the host."""
        now = sample_of(p)
        change = now.to(torch.int32) - self.last.to(torch.int32)
        moved = (change != 0).sum()
        size = change.abs()
        seen = [torch.ones_like(moved), moved, (size > 1).sum(), size.sum(), change.square().sum()]
        self.counts[:5] += torch.stack(seen)
        self.counts[5] = torch.where(moved > 0, 0, self.counts[5] + 1)
        self.last.copy_(now)

    @torch.no_grad()
    def read_(self, p: QParameter) -> dict[str, float]:
        """Return the numbers since the last reading, and begin anew.

        `changed`, `jumped`: shares of codes in an average update that changed, and by more than one. `pace`: by how
        many codes a weight moved in an update, in the mean. `drift`: the mean square of the way that codes went since
        the last reading, over the sum of the squares of its steps: 1 where they only diffuse, the number of updates
        where they only drift, below 1 where steps take one another back. `bottom`, `top`, `zero`: shares of codes
        there. `saturated`: share at the ends beyond that of the start. `still`: updates since any code changed.
        """
        updates, moved, jumped, pace, path, still = self.counts.tolist()
        size = max(1, self.last.numel())
        way = int((self.last.to(torch.int32) - self.window.to(torch.int32)).square().sum())
        ends = _ends(self.last, p.grid)
        self.window.copy_(self.last)
        self.counts[:5] = 0
        shares = [float((self.last == code).sum()) / size for code in (p.grid.low, p.grid.high, 0)]
        return {
            "changed": moved / size / max(1, updates),
            "jumped": jumped / size / max(1, updates),
            "pace": pace / size / max(1, updates),
            "drift": way / path if path else 0.0,
            "bottom": shares[0],
            "top": shares[1],
            "zero": shares[2],
            "saturated": float((ends - self.start) / size),
            "still": float(still),
        }


def _ends(sample: Tensor, grid: Grid) -> Tensor:
    return ((sample == grid.low) | (sample == grid.high)).sum()


def alarms(name: str, read: Mapping[str, float]) -> list[str]:
    """Return what is wrong with a layer's codes, in words.

    Args:
        name: of the layer.
        read: what `CodeMeter.read_` returned.
    """
    found = []
    if read["top"] == 0:
        found.append(f"{name}: no weight is at the highest code; the step is larger than it need be (rescale_every)")
    if read["saturated"] > SATURATED:
        found.append(f"{name}: {read['saturated']:.0%} more codes at the ends than at the start; widen the range")
    if read["still"] >= DEAD_STEPS:
        found.append(f"{name}: no watched code has changed in {read['still']:.0f} updates; it does not learn")
    return found


def mean_of(readings: Iterable[tuple[int, Mapping[str, float]]]) -> dict[str, float]:
    """Return the means of readings.

    Args:
        readings: each with the number of weights that it stands for.
    """
    pairs = list(readings)
    total = sum(weight for weight, _ in pairs)
    keys = pairs[0][1].keys() if pairs else ()
    return {key: sum(weight * read[key] for weight, read in pairs) / total for key in keys}
