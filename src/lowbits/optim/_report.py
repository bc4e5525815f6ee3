# SPDX-License-Identifier: Apache-2.0
"""List how every moment of an optimizer is stored, in how many bytes, and why not in fewer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbits.optim._optimizer import CodecOptimizer, parts_of
from lowbits.optim._sharding import local


@dataclass(frozen=True)
class MomentReport:
    """How one moment of one parameter is stored.

    Args:
        parameter: its name, or its number where no model was given.
        shape: of the whole parameter.
        moment: the rule's name of it.
        layout: what is stored.
        bytes: on this rank.
        reason: why it is not stored as the parameter's group says; empty if it is.
    """

    parameter: str
    shape: tuple[int, ...]
    moment: str
    layout: str
    bytes: int
    reason: str


@dataclass(frozen=True)
class StateReport:
    """All moments of an optimizer; printed, a line each.

    Args:
        moments: in the optimizer's order.
        elements: of all trained parameters on this rank.
    """

    moments: tuple[MomentReport, ...]
    elements: int

    @property
    def bytes(self) -> int:
        """Of all moments on this rank."""
        return sum(row.bytes for row in self.moments)

    @property
    def bytes_per_element(self) -> float:
        """Bytes of moments for an element of the trained parameters."""
        return self.bytes / max(1, self.elements)

    def __str__(self) -> str:
        lines = [
            f"{row.parameter} {list(row.shape)} {row.moment}: {row.layout}, {row.bytes} bytes"
            + (f" ({row.reason})" if row.reason else "")
            for row in self.moments
        ]
        return "\n".join([*lines, f"{self.bytes} bytes, {self.bytes_per_element:.3f} a parameter"])


def state_report(optimizer: CodecOptimizer, model: nn.Module | None = None) -> StateReport:
    """Return how every moment is stored; before the first step, how it will be.

    Args:
        optimizer: of this package.
        model: whose names the parameters go by.

    >>> from lowbits.optim import AdamW8bit
    >>> model = nn.Linear(1024, 8)
    >>> print(state_report(AdamW8bit(model.parameters()), model))  # doctest: +ELLIPSIS
    weight [8, 1024] first: blockwise v1, dynamic8 ..., blocks of 256, 8320 bytes
    weight [8, 1024] second: blockwise v1, udynamic8 ..., blocks of 256, 8320 bytes
    bias [8] first: float32, 32 bytes (fewer than 4096 elements)
    bias [8] second: float32, 32 bytes (fewer than 4096 elements)
    16704 bytes, 2.037 a parameter
    """
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    rows, elements = [], 0
    trained = [(p, group) for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    for number, (p, group) in enumerate(trained):
        elements += local(p).numel()
        state = optimizer.state.get(p, {})
        for moment, (codec, reason) in optimizer.storage(p, group).items():
            stored = parts_of(state, moment) or codec.init(torch.empty_like(local(p), device="meta"))
            name = names.get(id(p), str(number))
            rows.append(MomentReport(name, tuple(p.shape), moment, codec.layout, _bytes(stored.values()), reason))
    return StateReport(tuple(rows), elements)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
