# SPDX-License-Identifier: Apache-2.0
"""Train a language model under a method, evaluate it, and store it in few bits: one run of both studies."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch
from torch import nn

from experiments.gaussian_weight_sampling.casting import FORMATS, cast_losses, ladder_losses
from lowbits.analysis import causal_loss
from lowbits.data import TokenData
from lowbits.methods import Method, Position
from lowbits.methods.gaussws import noisy
from lowbits.nn import Recipe, convert_
from lowbits.nn._blocks import blocks
from lowbits.optim import AdamW

Costs = dict[str, list[dict[str, float]]]
"""Losses and casts of every arm, seed by seed."""


@dataclass(frozen=True)
class Setting:
    """How long and on what a model is trained; bfloat16 under autocast, AdamW, clipped at 1.

    Args:
        steps: updates.
        warmup: of them, linear; then a cosine down to a tenth.
        batch: sequences a step.
        length: tokens a sequence.
        lr: peak.
        validation: batches of an evaluation.
        device: as torch says it.
        compiled: torch.compile on every block in training.
    """

    steps: int
    warmup: int
    batch: int
    length: int
    lr: float
    validation: int
    device: str = "cpu"
    compiled: bool = False

    def share(self, step: int) -> float:
        """Return the share of the peak that the learning rate has."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup)))


def train_(model: nn.Module, data: TokenData, method: Method, seed: int, setting: Setting) -> nn.Module:
    """Train a model in place and return it.

    Args:
        model: as it begins, on the CPU.
        data: real text.
        method: what is done to its weights.
        seed: of the order of the text and of the noise.
        setting: how long.
    """
    convert_(model, Recipe(), seed=seed, verbose=False)
    method.prepare_(model, seed)
    model.to(setting.device).train()
    if setting.compiled:
        for name in blocks(model):
            model.get_submodule(name).compile()
    optimizer = AdamW(method.param_groups(model, 0.1), lr=setting.lr, betas=(0.9, 0.95))
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(setting.steps):
        ids = data.batch("train", step, batch_size=setting.batch, block=setting.length, seed=seed).to(setting.device)
        method.before_forward_(model, Position(step, setting.steps, step))
        with torch.autocast(ids.device.type, torch.bfloat16):
            method.loss(model, ids).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * setting.share(step)
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def evaluate(data: TokenData, model: nn.Module, setting: Setting) -> float:
    """Return the validation loss in bfloat16."""
    losses = []
    with torch.autocast(torch.device(setting.device).type, torch.bfloat16), torch.compiler.set_stance("force_eager"):
        for ids in data.val_batches(setting.batch, setting.length, setting.validation * setting.batch):
            losses.append(causal_loss(model, ids.to(setting.device)).item())
    return statistics.fmean(losses)


def measure(model: nn.Module, data: TokenData, method: Method, seed: int, setting: Setting) -> dict[str, float]:
    """Train, evaluate and cast: loss, what every format makes of it, bits at the end."""
    train_(model, data, method, seed, setting)
    result = cast_losses(model, lambda other: evaluate(data, other, setting))
    weights = [weight for weight in noisy(model) if weight.b_i is not None]
    if weights:
        bits = torch.cat([weight.bits().flatten() for weight in weights])
        result |= {"bits": bits.mean().item(), "lowest": bits.amin().item(), "highest": bits.amax().item()}
        result["above the target"] = (bits > weights[0].plan.b_target + 1e-3).float().mean().item()
        result |= ladder_losses(model, lambda other: evaluate(data, other, setting))
    return result | {k: v for k, v in method.metrics(model).items() if k == "size, MB"}


def increase(costs: Costs, arm: str, fmt: str) -> list[float]:
    """Return what a cast adds to the loss of an arm, seed by seed."""
    return [found[fmt] - found["loss"] for found in costs[arm]]


def cast_claims(costs: Costs, arm: str, formats: list[str] | None = None) -> list[tuple[str, str, bool]]:
    """Claim that a cast costs an arm less than bf16: in words, as measured, and whether it holds in every seed."""
    told = []
    for fmt in formats or FORMATS:
        pairs = {name: increase(costs, name, fmt) for name in (arm, "bf16")}
        words = "; ".join(f"{name} {' '.join(f'{cost:+.4f}' for cost in found)}" for name, found in pairs.items())
        less = all(a < b for a, b in zip(*pairs.values(), strict=True))
        told.append((f"{fmt} costs {arm} less than bf16, in every seed", words, less))
    return told


def six_bits(costs: Costs, arm: str) -> tuple[str, str, bool]:
    """Claim that FP6 costs an arm at most 0.7 of what it costs bf16; a cast that costs bf16 nothing decides nothing."""
    ours, base = (statistics.fmean(increase(costs, name, "FP6 e3m2")) for name in (arm, "bf16"))
    measured = f"{ours:+.5f} and {base:+.5f}" + (f", {ours / base:.2f}" if base > 0 else "")
    return f"FP6 costs {arm} at most 0.7 of what it costs bf16", measured, base > 0 and ours <= 0.7 * base
