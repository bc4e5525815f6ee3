# SPDX-License-Identifier: Apache-2.0
"""`language-cpu`: a toy Llama on characters; does the saliency beat a choice by chance (A15)?"""

from __future__ import annotations

import lzma
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.checks import Check
from experiments.geta.arms import Arm, Result, Task, joint, random_score
from experiments.geta.runs import Runs, Study, mean, told

TOY = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4,
       "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip


class Characters(Task):
    """Next-character prediction; grouped queries, rotary positions, gated feed-forward."""

    name, steps, batch, block, lr = "language", 500, 16, 64, 3e-3

    def __init__(self, folder: Path) -> None:
        text = read(folder)
        letters = sorted(set(text))
        numbers = {letter: i for i, letter in enumerate(letters)}
        data = torch.tensor([numbers[letter] for letter in text])
        self.letters, cut = len(letters), len(data) * 9 // 10
        self.train, self.held = data[:cut], data[cut:]

    def model(self, seed: int) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(vocab_size=self.letters, **TOY, **no_tokens))

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {"input_ids": self.held[: 2 * 31].view(2, 31)}

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed << 20 | step)
        begin = torch.randint(0, len(self.train) - self.block - 1, (self.batch, 1), generator=noise)
        return nats(model, self.train[begin + torch.arange(self.block + 1)])

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=0.01)

    def score(self, network: nn.Module) -> Result:
        size = self.block + 1
        windows = self.held[: len(self.held) // size * size].view(-1, size)[:512]
        with torch.no_grad():
            found = [nats(network, part).item() for part in windows.split(64)]
        return {"loss": sum(found) / len(found)}


def nats(network: nn.Module, ids: Tensor) -> Tensor:
    """Return the mean cross entropy of the next character."""
    logits = network(input_ids=ids[:, :-1]).logits
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def read(path: Path) -> str:
    """Return the text of a file, compressed or not, or of the first one in a folder."""
    if path.is_dir():
        path = min(p for p in path.rglob("*") if p.suffix in (".txt", ".xz"))
    return lzma.open(path, "rt", encoding="utf-8").read() if path.suffix == ".xz" else path.read_text(encoding="utf-8")


def arms(seed: int) -> dict[str, Arm]:
    return {
        "0 %": Arm(0.0, 4, 8, joint),
        "40 %": Arm(0.4, 4, 8, joint),
        "40 % by chance": Arm(0.4, 4, 8, joint, random_score(seed)),
    }


def checks(runs: Runs) -> list[Check]:
    whole, chosen, chance = (mean(runs, name, "loss") for name in ("0 %", "40 %", "40 % by chance"))
    words = "; ".join(f"{name}: {told(runs, name, 'loss')}" for name in runs)
    return [
        Check("A15", "40 % by saliency at least 0.1 nats better than by chance", words, chosen <= chance - 0.1),
        Check("A15", "40 % within 0.12 nats of 0 %", f"{chosen:.3f} and {whole:.3f}", chosen <= whole + 0.12),
    ]


def study(folder: Path, out: Path, results: Path, steps: int | None = None) -> Study:
    """Return all arms."""
    task = Characters(folder)
    task.steps = steps or task.steps
    setting = {
        "model": "Llama, 2 layers of 64", "parameters": sum(p.numel() for p in task.model(0).parameters()),
        "steps": task.steps, "batch": task.batch, "block": task.block, "lr": task.lr, "optimizer": "AdamW",
        "data": f"{len(task.train):,} characters to train, {task.letters} different",
    }  # fmt: skip
    return Study("language_cpu", task, arms, checks, setting, out, results)
