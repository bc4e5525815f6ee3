# SPDX-License-Identifier: Apache-2.0
"""The coordinates of the units that a period forgets, gathered into one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbits.errors import SpecError
from lowbits.methods.geta._forgetting import Pairs, Products, Rates
from lowbits.methods.geta._graph import Graph
from lowbits.methods.geta._launch import Slices, Table


class Piece(NamedTuple):
    """Slices of one parameter along one axis, of the doomed units of one dimension.

    Args:
        name: of the parameter.
        axis: number of the axis.
        rows: int64, on the parameter's device.
        dimension: number of the dimension, among those with doomed units.
        layer: number of the quantizer; -1 without.
    """

    name: str
    axis: int
    rows: Tensor
    dimension: int
    layer: int


class Parts(NamedTuple):
    """What the doomed coordinates are made of, x^Q = clipped + d * residual.

    Args:
        clipped: sgn(x) c(x), or x where nothing quantizes it.
        residual: sgn(x) R(x), or 0.
    """

    clipped: Tensor
    residual: Tensor


class Doomed:
    """Gather, measure and decay the coordinates of doomed units; each coordinate belongs to one dimension.

    Args:
        graph: of the model.
        parameters: those with slices driven to zero, by name.
        layer_of: number of the quantizer of a parameter.
        units: bool `[units]`, the doomed ones.
    """

    def __init__(
        self, graph: Graph, parameters: Mapping[str, nn.Parameter], layer_of: Mapping[str, int], units: Tensor
    ) -> None:
        self.parameters = parameters
        self.pieces, self.dimensions = _pieces(graph, parameters, layer_of, units)
        if not self.pieces:
            return
        shapes = [self._rows(parameters, piece).shape for piece in self.pieces]
        device = next(iter(parameters.values())).device
        self.shapes, self.lengths = shapes, [shape.numel() for shape in shapes]
        self.counts = torch.tensor(self.lengths, device=device)
        self.own = self._first_come().to(device)
        self.layer = torch.tensor([piece.layer for piece in self.pieces], device=device)
        self.dimension = torch.tensor([piece.dimension for piece in self.pieces], device=device)
        self.quantized = self._each(self.layer >= 0)
        keys = sorted({(piece.dimension, piece.layer) for piece in self.pieces if piece.layer >= 0})
        numbers = {key: number for number, key in enumerate(keys)}
        self.pairs = Pairs(*(torch.tensor([key[i] for key in keys], dtype=torch.int64, device=device) for i in (0, 1)))
        # Pieces without a quantizer go to one pair more, which is dropped.
        pair = [numbers.get((piece.dimension, piece.layer), len(keys)) for piece in self.pieces]
        self.pair = torch.tensor(pair, device=device)
        self.table = self._tabled()

    def _tabled(self) -> Table | None:
        """Return the pieces as the kernels read them, None where they cannot."""
        own = [self.parameters[piece.name] for piece in self.pieces]
        if not Table.takes(own):
            return None
        slices = [Slices(p, piece.axis, piece.rows, piece.layer, piece.dimension)
                  for p, piece in zip(own, self.pieces, strict=True)]  # fmt: skip
        return Table(slices, None if bool(self.own.all()) else self.own)

    @staticmethod
    def _rows(tensors: Mapping[str, Tensor], piece: Piece) -> Tensor:
        return tensors[piece.name].detach().index_select(piece.axis, piece.rows)

    def gather(self, tensors: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the doomed coordinates of the parameters, or of tensors like them, float32 `[n]`.

        Coordinates that an earlier piece has as well are 0.
        """
        if not self.pieces:
            return torch.zeros(0)
        if tensors is None and self.table is not None:
            return self.table.gather()
        found = self.parameters if tensors is None else tensors
        flat = torch.cat([self._rows(found, piece).reshape(-1).float() for piece in self.pieces])
        return flat * self.own

    def _each(self, values: Tensor) -> Tensor:
        """Repeat a value of every piece for all its coordinates; the known size spares a wait for the GPU."""
        return values.repeat_interleave(self.counts, 0, output_size=sum(self.lengths))

    def _first_come(self) -> Tensor:
        """Return 1 where a coordinate comes for the first time, 0 where an earlier piece along another axis has it."""
        crossed = [name for name in self.parameters if self._crossed(name)]
        seen = {name: torch.zeros(self.parameters[name].shape, dtype=torch.bool) for name in crossed}
        masks = []
        for piece, length in zip(self.pieces, self.lengths, strict=True):
            if piece.name not in seen:
                masks.append(torch.ones(length))
                continue
            rows = piece.rows.cpu()
            masks.append((~seen[piece.name].index_select(piece.axis, rows)).reshape(-1).float())
            seen[piece.name].index_fill_(piece.axis, rows, True)
        return torch.cat(masks)

    def _crossed(self, name: str) -> bool:
        return len({piece.axis for piece in self.pieces if piece.name == name}) > 1

    def parts(self, x: Tensor, scalars: Tensor) -> Parts:
        """Return clipped value and residual of gathered coordinates under the given scalars `[L, 3]`."""
        d, limit, exponent = self._each(scalars[self.layer.clamp_min(0)]).unbind(1)
        sign = x.sign()
        c = torch.minimum(x.abs(), limit).pow(exponent)
        residual = sign * (torch.round(c / d) - c / d)
        return Parts(torch.where(self.quantized, sign * c, x), torch.where(self.quantized, residual, 0.0))

    def products(self, before: Tensor, scalars: Tensor) -> Products:
        """Return the inner products with the gradient, after the optimizer's step.

        Args:
            before: the coordinates before it, gathered.
            scalars: of all quantizers before it, `[L, 3]`.
        Raises:
            SpecError: a parameter has no gradient any more.
        """
        missing = next((p.name for p in self.pieces if self.parameters[p.name].grad is None), None)
        if missing is not None:
            raise SpecError(
                f"Qasso: {missing} has no gradient at the optimizer's step. Zero gradients after the step, not before "
                "it, and do not step within backward."
            )
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        if self.table is not None:
            sums = self.table.products([gradients[piece.name] for piece in self.pieces], before, scalars)
        else:
            sums = self._sums(self.gather(gradients), before, self.parts(before, scalars))
        found = sums.new_zeros(self.dimensions, 5).index_add_(0, self.dimension, sums)
        a, beta, _, size, count = found.unbind(1)
        residual = sums.new_zeros(len(self.pairs.layer) + 1).index_add_(0, self.pair, sums[:, 2])
        return Products(a, beta, size / count.clamp_min(1), residual[:-1])

    def _sums(self, g: Tensor, before: Tensor, parts: Parts) -> Tensor:
        """Return the sums of g (before - now), g sgn c, g sgn R, |c| and 1 over every piece, `[P, 5]`."""
        moved = before - self.gather()
        columns = torch.stack([g * moved, g * parts.clipped, g * parts.residual, parts.clipped.abs(), self.own], 1)
        return torch.segment_reduce(columns, "sum", lengths=self.counts, axis=0, unsafe=True)

    def decay_(self, before: Tensor, scalars: Tensor, chosen: Rates) -> None:
        """x <- x - gamma x^Q.

        Args:
            before: as for `products`.
            scalars: as for `products`.
            chosen: rates and steps.
        """
        if self.table is not None:
            self.table.decay_(before, scalars, chosen.step, chosen.forgetting)
            return
        parts = self.parts(before, scalars)
        d = self._each(chosen.step[self.layer.clamp_min(0)].nan_to_num(0.0))
        gamma = self._each(chosen.forgetting[self.dimension])
        away = (-gamma * (parts.clipped + d * parts.residual)).split(self.lengths)
        for piece, shape, change in zip(self.pieces, self.shapes, away, strict=True):
            parameter = self.parameters[piece.name]
            parameter.index_add_(piece.axis, piece.rows, change.view(shape).to(parameter.dtype))


def _pieces(
    graph: Graph, parameters: Mapping[str, nn.Parameter], layer_of: Mapping[str, int], units: Tensor
) -> tuple[list[Piece], int]:
    """Return the pieces of all dimensions with doomed units, and how many such dimensions there are."""
    taken: dict[tuple[str, int], Tensor] = {}
    pieces: list[Piece] = []
    number = 0
    for dimension, part in zip(graph.dimensions, units.split([d.size for d in graph.dimensions]), strict=True):
        if not part.any():
            continue
        padded = torch.cat([part, torch.zeros(1, dtype=torch.bool)])
        for member in dimension.members:
            if member.zeroed and member.name in parameters:
                hit, key = padded[member.index], (member.name, member.axis)
                new = hit & ~taken.get(key, torch.zeros_like(hit))
                taken[key] = hit | taken.get(key, torch.zeros_like(hit))
                rows = new.nonzero().squeeze(1).to(parameters[member.name].device)
                if len(rows):
                    pieces.append(Piece(member.name, member.axis, rows, number, layer_of.get(member.name, -1)))
        number += 1
    return pieces, number
