# SPDX-License-Identifier: Apache-2.0
"""English to Spanish, short sentences, whole words: LSTMs with attention, two layers teach one."""

from __future__ import annotations

import lzma
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from experiments.distillation.arms import Batch, Plan, Task, fresh, generator

BATCH, LONGEST, WORDS, IGNORED = 64, 6, 500, -100
BEGIN, END, UNKNOWN = 0, 1, 2
Pairs = list[tuple[list[str], list[str]]]


class Translation(Task):
    """Sequence to sequence; padding of the targets counts nowhere."""

    name, unit, higher_is_better = "translation", "validation loss, nats a word", False
    plan = Plan(bits=(4, 2), qd=("64",), steps=1000, teacher_steps=1500, dq_steps=150, lr=1e-2, teacher_lr=5e-3,
                temperature=1.0)  # fmt: skip

    def __init__(self, folder: Path) -> None:
        train, held = (read(folder, name) for name in ("train", "val"))
        self.source, self.target = (vocabulary(side) for side in zip(*train, strict=True))
        self.train, self.held = (self.by_length(pairs) for pairs in (train, held))
        self.lengths = sorted(self.train)
        self.weights = torch.tensor([float(len(self.train[n][0])) for n in self.lengths])

    def by_length(self, pairs: Pairs) -> dict[int, tuple[Tensor, Tensor]]:
        """Sources of equal length need no filling: length -> (sources, targets filled with -100)."""
        found: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for source, target in pairs:
            ids = torch.tensor([*(self.target.get(word, UNKNOWN) for word in target), END])
            sources, targets = found.setdefault(len(source), ([], []))
            sources.append(torch.tensor([self.source.get(word, UNKNOWN) for word in source]))
            targets.append(pad(ids, (0, LONGEST + 1 - len(ids)), value=IGNORED))
        return {n: (torch.stack(sources), torch.stack(targets)) for n, (sources, targets) in found.items()}

    def teacher(self, seed: int) -> nn.Module:
        return fresh(lambda: Translator(len(self.source) + 3, len(self.target) + 3, 128, 2), seed + 500)

    def student(self, seed: int) -> nn.Module:
        return fresh(lambda: Translator(len(self.source) + 3, len(self.target) + 3, 48, 1), seed)

    def batch(self, seed: int, step: int) -> Batch:
        noise = generator(seed, step)
        length = self.lengths[int(torch.multinomial(self.weights, 1, generator=noise))]
        sources, targets = self.train[length]
        rows = torch.randint(0, len(sources), (BATCH,), generator=noise)
        return (sources[rows], targets[rows]), targets[rows]

    def score(self, model: nn.Module) -> float:
        nats, words = 0.0, 0
        for sources, targets in self.held.values():
            logits = model(sources, targets)
            nats += cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
            words += int((targets != IGNORED).sum())
        return nats / words


class Translator(nn.Module):
    """An LSTM reads, another writes and looks back (Luong et al. 2015, arXiv:1508.04025)."""

    def __init__(self, sources: int, targets: int, width: int, layers: int) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(sources, width), nn.Embedding(targets, width)
        self.reader = nn.LSTM(width, width, layers, batch_first=True)
        self.writer = nn.LSTM(width, width, layers, batch_first=True)
        self.joined, self.head = nn.Linear(2 * width, width), nn.Linear(width, targets)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read, state = self.reader(self.source(source))
        before = pad(target[:, :-1].clamp_min(0), (1, 0), value=BEGIN)
        written, _ = self.writer(self.target(before), state)
        seen = torch.softmax(written @ read.transpose(1, 2), -1) @ read
        return self.head(torch.tanh(self.joined(torch.cat([written, seen], -1))))


def read(folder: Path, name: str) -> Pairs:
    """Pairs of at most six words a side, in lower case, signs apart."""
    with lzma.open(folder / f"tatoeba_en-es.{name}.tsv.xz", "rt", encoding="utf-8") as file:
        lines = [line.lower().split("\t")[:2] for line in file]
    pairs = [tuple(re.findall(r"\w+|[^\w\s]", side) for side in line) for line in lines]
    return [(a, b) for a, b in pairs if 0 < len(a) <= LONGEST and 0 < len(b) <= LONGEST]


def vocabulary(sentences: tuple[list[str], ...]) -> dict[str, int]:
    """The most frequent words, numbered from 3; all others are one."""
    counts = Counter(word for sentence in sentences for word in sentence)
    return {word: number + 3 for number, (word, _) in enumerate(counts.most_common(WORDS))}
