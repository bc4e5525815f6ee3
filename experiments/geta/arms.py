# SPDX-License-Identifier: Apache-2.0
"""What is compared: the joint run, the two orders of doing one after the other, and the dense network."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.methods import geta

Result = dict[str, Any]


class Task(ABC):
    """A network, its data and its optimizer.

    Attributes:
        steps: optimizer steps of every arm.
        name: of the files of its runs.
        device: where it is trained.
    """

    steps: int
    name: str
    device = torch.device("cpu")

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return the network at its start."""

    @abstractmethod
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return an input to trace with and to count for."""

    @abstractmethod
    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        """Return the loss on the batch of a step."""

    @abstractmethod
    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return the optimizer, at its largest learning rate."""

    @abstractmethod
    def score(self, network: nn.Module) -> Result:
        """Return what is measured on held-out data."""

    def rate(self, t: float) -> float:
        """Return the share of the learning rate at a share of the run: up for a tenth, then down in a straight line."""
        return min(t / 0.1 + 0.02, (1 - t) / 0.9 + 0.02)


@dataclass(frozen=True)
class Arm:
    """One way to a small network.

    Args:
        sparsity: share of the units that go.
        lowest: fewest bits.
        highest: most bits.
        run: how.
    """

    sparsity: float
    lowest: float
    highest: float
    run: Callable[[Task, Arm, int], tuple[nn.Module, geta.Graph, Tensor]]
    score: Callable[..., Tensor] = geta.saliency

    @property
    def target(self) -> geta.Target:
        return geta.Target(self.sparsity, self.lowest, self.highest)


def train(task: Task, model: nn.Module, seed: int, steps: range, attach: Callable[[Any], None] | None = None) -> None:
    """Train over some steps of the run; the optimizer is new."""
    optimizer = task.optimizer(model)
    if attach is not None:
        attach(optimizer)
    peak = [group["lr"] for group in optimizer.param_groups]
    model.train()
    for step in steps:
        for group, lr in zip(optimizer.param_groups, peak, strict=True):
            group["lr"] = lr * task.rate(step / task.steps)
        task.loss(model, step, seed).backward()
        optimizer.step()
        optimizer.zero_grad()


def started(task: Task, seed: int) -> tuple[nn.Module, geta.Graph]:
    """Return a network with quantizers, and its graph."""
    model = task.model(seed)
    graph = geta.trace(model, *task.example())
    geta.quantize_(model)
    return model, graph


def joint(task: Task, arm: Arm, seed: int) -> tuple[nn.Module, geta.Graph, Tensor]:
    """GETA."""
    model, graph = started(task, seed)
    qasso = geta.Qasso(model, graph, arm.target, geta.Schedule.of(task.steps), score=arm.score)
    train(task, model, seed, range(task.steps), qasso.attach)
    return model, graph, qasso.keep


def prune_then_quantize(task: Task, arm: Arm, seed: int) -> tuple[nn.Module, geta.Graph, Tensor]:
    """The same stages at 16 bits; then every weight is rounded, with the range that leaves the least squared error."""
    model, graph = started(task, seed)
    qasso = geta.Qasso(model, graph, geta.Target(arm.sparsity, 16, 16), geta.Schedule.of(task.steps))
    train(task, model, seed, range(task.steps), qasso.attach)
    for layer in geta.quantized_layers(model).values():
        fit_(layer.weight_quantizer, layer.weight.detach(), arm.lowest)
    return model, graph, qasso.keep


def quantize_then_prune(task: Task, arm: Arm, seed: int) -> tuple[nn.Module, geta.Graph, Tensor]:
    """Half of the steps bring the bits down; then the units go at once, and the rest of the steps heal."""
    model, graph = started(task, seed)
    half = task.steps // 2
    first = geta.Qasso(model, graph, geta.Target(0.0, arm.lowest, arm.lowest), geta.Schedule.of(half))
    train(task, model, seed, range(half), first.attach)
    periods = len(arm.target.ceilings())
    schedule = geta.Schedule(0, periods, 1, task.steps - half - periods - 1, periods=1)
    second = geta.Qasso(model, graph, geta.Target(arm.sparsity, arm.lowest, arm.lowest), schedule)
    train(task, model, seed, range(half, task.steps), second.attach)
    return model, graph, second.keep


@torch.no_grad()
def fit_(quantizer: geta.Quantizer, weight: Tensor, bits: float) -> None:
    """Choose the range with the least squared error."""
    largest = float(weight.abs().max())
    errors = {}
    for share in torch.linspace(0.3, 1.0, 36).tolist():
        quantizer.set_range_(share * largest, bits)
        errors[share] = float((quantizer(weight) - weight).square().sum())
    quantizer.set_range_(min(errors, key=errors.__getitem__) * largest, bits)


def dense(task: Task, arm: Arm, seed: int) -> tuple[nn.Module, geta.Graph, Tensor]:
    """No quantizer, nothing cut."""
    model = task.model(seed)
    graph = geta.trace(model, *task.example())
    train(task, model, seed, range(task.steps))
    return model, graph, torch.ones(graph.units, dtype=torch.bool)


def measured(task: Task, arm: Arm, seed: int) -> Result:
    """Train, build the sub-network, and measure it."""
    begun = time.perf_counter()
    model, graph, keep = arm.run(task, arm, seed)
    small = geta.construct(graph, model.eval(), keep)
    args, kwargs = task.example()
    whole, found = geta.dense_cost(graph), geta.cost(small, args, kwargs)
    works = [work for work in found.works if work.layer]
    return {
        **task.score(small),
        "units": graph.units,
        "pruned": int((~keep).sum()),
        "relative_bops": found.relative_bops(whole),
        "relative_complete_bops": found.relative_complete_bops(whole),
        "relative_macs": found.macs / whole.macs,
        "relative_bytes": found.stored_bytes / whole.stored_bytes,
        "mean_bits": sum(work.weight_bits for work in works) / len(works),
        "parameters": found.parameters,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def random_score(seed: int) -> Callable[..., Tensor]:
    """Return a choice of units by chance, for comparison."""
    noise = torch.Generator().manual_seed(seed)
    return lambda norm2, *_: torch.rand(norm2.shape, generator=noise)


ARMS: dict[str, Arm] = {
    "dense": Arm(0.0, 16, 16, dense),
    "GETA 30 %, 4 to 8 bits": Arm(0.3, 4, 8, joint),
    "GETA 50 %, 4 to 8 bits": Arm(0.5, 4, 8, joint),
    "GETA 70 %, 4 to 8 bits": Arm(0.7, 4, 8, joint),
    "GETA 50 %, 4 bits": Arm(0.5, 4, 4, joint),
    "prune 50 %, then quantize to 4 bits": Arm(0.5, 4, 4, prune_then_quantize),
    "quantize to 4 bits, then prune 50 %": Arm(0.5, 4, 4, quantize_then_prune),
}
