# SPDX-License-Identifier: Apache-2.0
"""`llama-gpu`: a Llama on real text, 10 to 70 % of its units, beside the two separate orders; tokens a second."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.checks import Check
from experiments.geta.arms import Arm, Result, Task, dense, joint, prune_then_quantize, quantize_then_prune
from experiments.geta.runs import Runs, Study, mean, told
from lowbits import models
from lowbits.data import TokenData

SEEDS = (0, 1)


class Tokens(Task):
    """llama-42m on prepared tokens, bf16 autocast."""

    name, steps, batch, block, lr, size = "llama", 600, 32, 512, 1e-3, "llama-42m"

    def __init__(self, folder: Path, device: torch.device, **changes: Any) -> None:
        self.data, self.device = TokenData.open(folder), device
        for name, value in changes.items():
            if value is not None:
                setattr(self, name, value)
        self.held = [ids.to(device) for ids in self.data.val_batches(16, self.block, limit=256)]

    def model(self, seed: int) -> nn.Module:
        return models.build(self.size, self.data.vocab_size, self.block, seed).to(self.device)  # type: ignore[arg-type]

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"input_ids": self.held[0][:2, : self.block - 1]}

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        ids = self.data.batch("train", step, batch_size=self.batch, block=self.block, seed=seed).to(self.device)
        return self.nats(model, ids)

    def nats(self, network: nn.Module, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = network(input_ids=ids).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), self.lr, betas=(0.9, 0.95), weight_decay=0.1)

    def score(self, network: nn.Module) -> Result:
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        with torch.no_grad():
            losses = [self.nats(network, ids).item() for ids in self.held]
            seconds = []
            for _ in range(7):
                wait()
                begun = time.perf_counter()
                self.nats(network, self.held[0])
                wait()
                seconds.append(time.perf_counter() - begun)
        found = {"loss": sum(losses) / len(losses), "tokens_per_second": self.held[0].numel() / min(seconds)}
        return found if self.device.type != "cuda" else {**found, "activation_bytes": self.peak(network)}

    @torch.no_grad()
    def peak(self, network: nn.Module) -> int:
        """Return the most bytes that a forward pass has beside all tensors that were there before."""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.nats(network, self.held[0])
        return torch.cuda.max_memory_allocated() - before


ARMS: dict[str, Arm] = {
    "dense": Arm(0.0, 16, 16, dense),
    **{f"GETA {s} %, 4 to 8 bits": Arm(s / 100, 4, 8, joint) for s in (10, 30, 50, 70)},
    "GETA 30 %, 4 bits": Arm(0.3, 4, 4, joint),
    "prune 30 %, then quantize to 4 bits": Arm(0.3, 4, 4, prune_then_quantize),
    "quantize to 4 bits, then prune 30 %": Arm(0.3, 4, 4, quantize_then_prune),
}


def checks(runs: Runs) -> list[Check]:
    both, rounded, healed = list(ARMS)[-3:]
    curve = [name for name in runs if "4 to 8" in name]
    means = {name: mean(runs, name, "loss") for name in runs}
    speed = {name: mean(runs, name, "tokens_per_second") for name in runs}
    return [
        Check("H200", "joint beats prune-then-quantize at 30 % and 4 bits, nats",
              f"{told(runs, both, 'loss')} against {told(runs, rounded, 'loss')}", means[both] < means[rounded]),
        Check("H200", "joint beats quantize-then-prune at 30 % and 4 bits, nats",
              f"{told(runs, both, 'loss')} against {told(runs, healed, 'loss')}", means[both] < means[healed]),
        Check("3.2", "loss rises with sparsity from 10 to 70 %",
              "; ".join(f"{name[5:9]} {told(runs, name, 'loss')}" for name in curve) + f"; dense {means['dense']:.4g}",
              [means[n] for n in curve] == sorted(means[n] for n in curve)),
        Check("H200", "70 % of the units gone show in wall time, weights unpacked at every pass",
              f"dense {speed['dense']:,.0f} tokens/s, {speed[curve[-1]]:,.0f}", speed[curve[-1]] > speed["dense"]),
    ]  # fmt: skip


def study(folder: Path, out: Path, results: Path, device: torch.device, **changes: Any) -> Study:
    """Return all arms.

    Args:
        folder: prepared tokens.
        out: of the runs.
        results: folder of results files.
        device: where to train.
        changes: of the task: steps, batch, block, size.
    """
    task = Tokens(folder, device, **changes)
    setting = {"model": task.size, "steps": task.steps, "batch": task.batch, "block": task.block, "lr": task.lr,
               "parameters": sum(p.numel() for p in task.model(0).parameters())}  # fmt: skip
    return Study("llama", task, lambda _: ARMS, checks, setting, out, results)
