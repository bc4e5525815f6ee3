# SPDX-License-Identifier: Apache-2.0
"""Telemetry: what the recipe does to weights, inputs and output gradients, measured while a step trains.

The layers hand over each operand and its quantized form as they multiply them, so what is measured is what was
multiplied, random draws included, and nothing is quantized twice. All sums stay on the device until the step is over;
then one transfer takes them. Training is not touched: nothing here draws a random bit or changes a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lowbits.analysis import TensorErrors, error_sums
from lowbits.nn import QuantizedLayer, quantized_layers
from lowbits.quantizers import PerTensor, PerTile, QTensor, QuantSpec, Rounding
from lowbits.train._guard import Event

Errors: TypeAlias = dict[str, dict[str, float | None]]
ROLES = {
    "input": ("fprop.lhs", "wgrad.rhs"),
    "weight": ("fprop.rhs", "dgrad.rhs"),
    "grad": ("dgrad.lhs", "wgrad.lhs"),
}
"""Role -> the operands of GEMMs that it is."""


class Operand(NamedTuple):
    """An operand of one layer's GEMM."""

    layer: str
    name: str  # fprop.lhs, ...


class Sample:
    """The errors of every operand that one micro-batch quantizes.

    Only the first micro-batch of a step is watched, in every process: all are alike.

    Args:
        model: converted, not wrapped.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._operands: list[Operand] = []
        self._sums: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the forward passes within the block, and what backward does for them later, not what it recomputes."""
        layers = quantized_layers(self._model)
        for name, layer in layers.items():
            layer.observer = partial(self._take, name, layer)
        try:
            yield
        finally:
            for layer in layers.values():
                layer.observer = None

    def measure_apart(self, loss_of_batch: Callable[[], Tensor]) -> None:
        """Watch an eager pass of its own, where the step's own is compiled; gradients and buffers are as before.

        Args:
            loss_of_batch: runs the forward pass and returns the loss; no gradients are there yet.
        """
        buffers = {name: buffer.clone() for name, buffer in self._model.named_buffers()}
        with torch.compiler.set_stance("force_eager"):
            with self.watching():
                loss = loss_of_batch()
            loss.backward()
        self._model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in self._model.named_buffers():
                buffer.copy_(buffers[name])

    def _take(self, name: str, layer: QuantizedLayer, operand: str, x: Tensor, q: QTensor) -> None:
        recipe = layer.active  # of this very step: a phase may have begun with it
        if operand == "dgrad.rhs" and _same_both_ways(recipe.fprop.rhs, recipe.dgrad.rhs):
            return
        self._operands.append(Operand(name, operand))
        self._sums.append(error_sums(x.detach(), q))

    def transfer(self) -> list[tuple[Operand, list[float]]]:
        """Return what was measured, moved to the host at once: plain numbers that processes can exchange."""
        rows = torch.stack(self._sums).tolist() if self._sums else []
        return list(zip(self._operands, rows, strict=True))


def errors_by_operand(found: Sequence[list[tuple[Operand, list[float]]]]) -> dict[Operand, TensorErrors]:
    """Add up what the processes measured.

    Args:
        found: `Sample.transfer` of each.
    Returns:
        Errors in the order of the step: first forward, then backward.
    """
    rows: dict[Operand, list[list[float]]] = {}
    for measured in found:
        for operand, row in measured:
            rows.setdefault(Operand(*operand), []).append(row)
    return {operand: TensorErrors.of_sums(parts) for operand, parts in rows.items()}


def layer_errors(model: nn.Module, measured: dict[Operand, TensorErrors]) -> dict[str, Errors]:
    """Return the errors as the log has them.

    Args:
        model: names the layers and their order.
        measured: what `errors_by_operand` returned.
    Returns:
        Layer -> `input`, `weight`, `grad` -> numbers of `TensorErrors`; an operand in high precision has none. Where a
        role is quantized differently for two GEMMs, it has the numbers of the worse, and both follow by their names:
        `dgrad.lhs`, `wgrad.lhs`.
    """
    report: dict[str, Errors] = {}
    for layer in quantized_layers(model):
        here = {name: errors for (of, name), errors in measured.items() if of == layer}
        apart: Errors = {}
        report[layer] = {}
        for role, names in ROLES.items():
            both = {name: here[name] for name in names if name in here}
            report[layer][role] = min(both.values(), key=_quality).as_json() if both else {}
            if len(both) > 1:
                apart |= {name: errors.as_json() for name, errors in both.items()}
        report[layer] |= apart
    return report


def first_nonfinite(measured: dict[Operand, TensorErrors]) -> Event | None:
    """Return an event for the first operand that is not finite, or whose quantized form is not; None if all are.

    Args:
        measured: what `errors_by_operand` returned.
    """
    bad = [(o, e) for o, e in measured.items() if e.nonfinite or e.overflowed]
    if not bad:
        return None
    operand, errors = bad[0]
    role = next(role for role, names in ROLES.items() if operand.name in names)
    how = f"{errors.nonfinite:.2%} of it is NaN or infinite" if errors.nonfinite else "finite, but not once quantized"
    others = f"; {len(bad) - 1} more operands after it" if len(bad) > 1 else ""
    return Event("nonfinite", f"{role} of {operand.layer} ({operand.name}): {how}{others}", operand.layer, role)


def _quality(errors: TensorErrors) -> float:
    return float("-inf") if errors.nonfinite or errors.overflowed else errors.sqnr_db


def _same_both_ways(spec: QuantSpec | None, turned: QuantSpec | None) -> bool:
    """Whether a tensor and its transpose become the same numbers."""
    if spec is None or spec != turned or spec.rounding is not Rounding.NEAREST or spec.transform is not None:
        return False
    tile = spec.granularity
    return isinstance(tile, PerTensor) or (isinstance(tile, PerTile) and tile.rows == tile.columns)
