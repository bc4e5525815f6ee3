# SPDX-License-Identifier: Apache-2.0
"""One run of an arm: the loop, what is measured in it, and what remains."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from experiments.direct_quantized_training.arms import Arm, Kind, linears
from experiments.direct_quantized_training.device import Span, measured
from experiments.direct_quantized_training.model import Llama, Shape, start_
from lowbits.formats import TERNARY
from lowbits.methods.dqt import Environment, codes_of, ternary_weights
from lowbits.nn import Grid, QParameter, StepInit, quantize_parameter

Result = dict[str, float]
Batch = Callable[[str, int], Tensor]
"""`(split, index) -> ids`."""


@dataclass(frozen=True)
class Plan:
    """What all arms have in common.

    Args:
        shape: of the model.
        steps: updates.
        warmup: of them.
        other_lr: peak learning rate of everything but the weights of linear layers.
        hyper: of AdamW.
        clip: largest norm of all gradients.
        validation: batches of an evaluation.
        watch_every: updates between two looks at what changes.
        half: compute in bfloat16, whatever the arm's environment says of gradients.
        compiled: torch.compile on every block in training.
    """

    shape: Shape
    steps: int
    warmup: int
    other_lr: float
    hyper: dict[str, object] = field(default_factory=lambda: {"betas": (0.9, 0.95), "weight_decay": 0.01})
    clip: float = 1.0
    validation: int = 20
    watch_every: int = 25
    half: bool = False
    compiled: bool = False

    def autocast(self, arm: Arm, device: torch.device) -> AbstractContextManager[object]:
        """Float32 arithmetic only where neither plan nor arm computes in bfloat16."""
        halves = self.half or arm.environment is not Environment.FP32 or arm.kind is Kind.BF16_SR
        return torch.autocast(device.type, torch.bfloat16, enabled=halves)


def run(arm: Arm, plan: Plan, lr: float, seed: int, batch: Batch, device: torch.device) -> Result:
    """Train one arm and return its losses, shares of changed codes, and speed."""
    model = Llama(plan.shape)
    start_(model, seed)
    arm.prepare_(model)
    model.to(device)
    if plan.compiled:
        for block in model.blocks:
            block.compile()
    optimizer = arm.optimizer(model, lr, plan.other_lr, seed=seed, **plan.hyper)
    peaks = [group["lr"] for group in optimizer.param_groups]
    shares: list[tuple[int, float]] = []
    losses, begun, spans = [], time.perf_counter(), list[Span]()
    for step in range(plan.steps):
        arm.schedule_(optimizer.param_groups, peaks, step, plan.steps, factor(step, plan))
        looks = step % plan.watch_every == plan.watch_every - 1 or step in (plan.warmup, plan.steps - 1)
        before = snapshot(model, arm) if looks else {}
        with measured() as span:
            with plan.autocast(arm, device):
                loss = model(batch("train", step))
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], plan.clip)
            optimizer.step()
            optimizer.zero_grad()
        spans.append(span)
        losses.append(loss.detach())
        if looks:
            shares.append((step, share_changed(before, snapshot(model, arm))))
    trained, timed = torch.stack(losses).tolist(), spans[5:] or spans
    found: Result = {
        "val": validate(model, arm, plan, batch, device),
        "train": sum(trained[-20:]) / len(trained[-20:]),
        "changed_at_peak": next(share for step, share in shares if step >= plan.warmup),
        "changed_at_end": shares[-1][1],
        "seconds": round(time.perf_counter() - begun, 1),
        "step_ms": 1e3 * statistics.median(span.seconds for span in timed),
        "resident_bytes": timed[-1].resident,
        "peak_bytes": max(span.peak for span in timed),
        "weight_bytes": sum(stored(layer.weight) for layer in linears(model).values()),
        "state_bytes": sum(t.nbytes for state in optimizer.state.values() for t in state.values()),
        "finite": float(all(map(math.isfinite, trained))),
    }
    found |= {f"train_{step}": trained[step] for step in range(0, plan.steps, max(1, plan.steps // 20))}
    with as_ternary(model, arm):
        found["val_ternary"] = validate(model, arm, plan, batch, device)
    for p in list(codes_of(model).values())[:1]:
        found["lr_in_codes"] = lr * float((1 / p.step).mean())
    return found


def stored(weight: Tensor) -> int:
    return weight.stored_bytes if isinstance(weight, QParameter) else weight.nbytes


def factor(step: int, plan: Plan) -> float:
    """A linear warm-up and a half cosine to 0."""
    if step < plan.warmup:
        return (step + 1) / plan.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - plan.warmup) / max(1, plan.steps - plan.warmup)))


@torch.no_grad()
def validate(model: nn.Module, arm: Arm, plan: Plan, batch: Batch, device: torch.device) -> float:
    with plan.autocast(arm, device), torch.compiler.set_stance("force_eager"):
        losses = [model(batch("val", i)) for i in range(plan.validation)]
    return float(torch.stack(losses).mean())


def snapshot(model: nn.Module, arm: Arm) -> dict[str, Tensor]:
    """Codes of every linear weight; of masters, the ternary codes that they give; none of floats."""
    if arm.kind is Kind.BITNET:
        return {name: ternary_codes(layer.weight) for name, layer in linears(model).items()}
    if arm.kind is Kind.BF16_SR:
        return {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    return {name: p.codes.clone() if p.grid.per_byte == 1 else p.unpacked() for name, p in codes_of(model).items()}


def ternary_codes(weight: Tensor) -> Tensor:
    return quantize_parameter(weight.detach().float(), Grid(TERNARY), StepInit()).unpacked()


def share_changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    total = sum(t.numel() for t in before.values())
    return sum(int((a != b).sum()) for a, b in zip(before.values(), after.values(), strict=True)) / max(1, total)


@contextmanager
def as_ternary(model: nn.Module, arm: Arm) -> Iterator[None]:
    """Run with ternary weights: of codes as published; of floats the same arithmetic, after training."""
    if arm.kind is Kind.BITNET:  # they are
        yield
        return
    if arm.kind is Kind.DQT:
        with ternary_weights(model):
            yield
        return
    kept = {name: layer.weight for name, layer in linears(model).items()}
    for layer in linears(model).values():
        weight = quantize_parameter(layer.weight.detach().float(), Grid(TERNARY), StepInit())
        assert isinstance(weight, QParameter)
        layer.weight = nn.Parameter(weight.dequantize().to(layer.weight.dtype))
    try:
        yield
    finally:
        for name, layer in linears(model).items():
            layer.weight = kept[name]
