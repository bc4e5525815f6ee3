# SPDX-License-Identifier: Apache-2.0
"""A character-level Llama on Shakespeare: teacher of width 96, student of width 32."""

from __future__ import annotations

import lzma
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.distillation.arms import Batch, Plan, Task, fresh, generator

BATCH, BLOCK, WINDOWS = 16, 64, 200


class Characters(Task):
    """Language modelling with a Llama of transformers."""

    name, unit, higher_is_better = "text", "validation loss, nats", False
    plan = Plan(bits=(4, 2), qd=("64",), steps=500, teacher_steps=600, dq_steps=100, lr=5e-3, teacher_lr=3e-3,
                temperature=1.0)  # fmt: skip

    def __init__(self, file: Path) -> None:
        opener = lzma.open if file.suffix == ".xz" else open
        with opener(file, "rt", encoding="utf-8") as stream:
            text = stream.read()
        alphabet = sorted(set(text))
        ids = torch.tensor([alphabet.index(c) for c in text])
        self.characters, cut = len(alphabet), int(0.9 * len(ids))
        self.ids, held = ids[:cut], ids[cut:]
        begins = torch.linspace(0, len(held) - BLOCK - 2, WINDOWS).long()
        self.held = held[begins[:, None] + torch.arange(BLOCK + 1)]

    def teacher(self, seed: int) -> nn.Module:
        return fresh(lambda: llama(self.characters, 96, 3), seed + 500)

    def student(self, seed: int) -> nn.Module:
        return fresh(lambda: llama(self.characters, 32, 2), seed)

    def batch(self, seed: int, step: int) -> Batch:
        begins = torch.randint(0, len(self.ids) - BLOCK - 1, (BATCH, 1), generator=generator(seed, step))
        ids = self.ids[begins + torch.arange(BLOCK + 1)]
        return (ids[:, :-1],), ids[:, 1:]

    def score(self, model: nn.Module) -> float:
        return cross_entropy(model(self.held[:, :-1]).flatten(0, 1), self.held[:, 1:].flatten()).item()


def llama(characters: int, width: int, layers: int) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=characters, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=width // 16, max_position_embeddings=BLOCK, tie_word_embeddings=False,
    )  # fmt: skip
    return LogitsOf(LlamaForCausalLM(config))


class LogitsOf(nn.Module):
    """Logits of a language model of transformers.

    Args:
        network: the model.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids, use_cache=False).logits
