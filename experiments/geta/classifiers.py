# SPDX-License-Identifier: Apache-2.0
"""`image-cpu`: a residual network on MNIST under SGD; `text-cpu`: a BERT from scratch on SST-2 under AdamW."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.checks import Check
from experiments.geta.arms import ARMS, Result, Task
from experiments.geta.runs import Runs, Study, mean, told


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def network(width: int = 12) -> nn.Sequential:
    """Two stages of one residual block, 28x28 pixels to 7x7."""

    def down(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(*down(1, width), Residual(width), *down(width, 2 * width), Residual(2 * width),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))  # fmt: skip


def digits(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read MNIST: images [count, 1, 28, 28], standardized, and labels."""
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
    pixels = torch.from_numpy(np.frombuffer(images, np.uint8).copy()).view(-1, 1, 28, 28).float() / 255
    return (pixels - 0.1307) / 0.3081, torch.from_numpy(np.frombuffer(labels, np.uint8).copy()).long()


class Images(Task):
    name, steps, batch, lr = "image", 500, 64, 0.05

    def __init__(self, folder: Path) -> None:
        (self.x, self.y), (self.test_x, self.test_y) = (digits(folder, name) for name in ("train", "t10k"))

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return network()

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.test_x[:2],), {}

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        chosen = torch.randint(
            0, len(self.y), (self.batch,), generator=torch.Generator().manual_seed(seed << 20 | step)
        )
        return cross_entropy(model(self.x[chosen]), self.y[chosen])

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, momentum=0.9, weight_decay=1e-4)

    def score(self, network: nn.Module) -> Result:
        with torch.no_grad():
            logits = torch.cat([network(x) for x in self.test_x.split(500)])
        return scored(logits, self.test_y)


class Texts(Task):
    name, steps, batch, lr, length, words = "text", 400, 32, 1.5e-3, 32, 4000

    def __init__(self, folder: Path) -> None:
        train, labels = sentences(folder, "train")
        test, self.test_y = sentences(folder, "dev")
        self.vocabulary = known(train, self.words)
        self.x, self.y, self.test_x = self.numbers(train), labels, self.numbers(test)

    def numbers(self, texts: list[str]) -> dict[str, Tensor]:
        """Return ids [count, length] and their mask; 0 pads, 1 begins, 2 is a rare word."""
        rows = [[1, *(self.vocabulary.get(word, 2) for word in text.split())][: self.length] for text in texts]
        ids = torch.tensor([row + [0] * (self.length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    def model(self, seed: int) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=self.words, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256,
            max_position_embeddings=self.length,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return BertForSequenceClassification(config)

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {name: value[:2] for name, value in self.test_x.items()}

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed << 20 | step)
        chosen = torch.randint(0, len(self.y), (self.batch,), generator=noise)
        with torch.random.fork_rng(devices=[]):  # dropout, the same for all arms of a seed
            torch.manual_seed(seed << 20 | step)
            logits = model(**{name: value[chosen] for name, value in self.x.items()}).logits
        return cross_entropy(logits, self.y[chosen])

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), self.lr, weight_decay=0.01)

    def score(self, network: nn.Module) -> Result:
        count = len(self.test_y)
        with torch.no_grad():
            parts = [
                network(**{n: v[i : i + 200] for n, v in self.test_x.items()}).logits for i in range(0, count, 200)
            ]
        return scored(torch.cat(parts), self.test_y)


def sentences(folder: Path, split: str) -> tuple[list[str], Tensor]:
    """Read sst2_<split>.jsonl.gz."""
    with gzip.open(folder / f"sst2_{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["sentence"].lower() for row in rows], torch.tensor([row["label"] for row in rows])


def known(texts: list[str], size: int) -> dict[str, int]:
    """Number the most frequent words."""
    counts: dict[str, int] = {}
    for word in (word for text in texts for word in text.split()):
        counts[word] = counts.get(word, 0) + 1
    return {word: i + 3 for i, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[: size - 3])}


def scored(logits: Tensor, labels: Tensor) -> Result:
    """Return accuracy in percent, and the mean loss."""
    right = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": 100 * right, "loss": cross_entropy(logits.float(), labels).item()}


def checks(runs: dict[str, list[Result]], most_lost: float) -> list[Check]:
    """A14 and A16, and the orders that the paper claims."""
    joint, rounded, healed = (
        "GETA 50 %, 4 bits", "prune 50 %, then quantize to 4 bits", "quantize to 4 bits, then prune 50 %"
    )  # fmt: skip
    means = {name: mean(runs, name, "accuracy") for name in runs}
    words = {name: f"{told(runs, name, 'accuracy')} (mean {means[name]:.2f})" for name in runs}
    curve = [f"GETA {s} %, 4 to 8 bits" for s in (30, 50, 70)]
    exact = all(
        r["pruned"] == int(float(n.split("%")[0].split()[-1]) / 100 * r["units"]) for n in curve for r in runs[n]
    )
    return [
        Check("A14", f"half the units, 4 to 8 bits: at most {most_lost:g} points below dense",
              f"dense {words['dense']}; GETA {words[curve[1]]}", means[curve[1]] >= means["dense"] - most_lost),
        Check("A16", "joint beats prune-then-quantize, same units and bits",
              f"{words[joint]} against {words[rounded]}", means[joint] > means[rounded]),
        Check("3.1", "joint beats quantize-then-prune, same units and bits",
              f"{words[joint]} against {words[healed]}", means[joint] > means[healed]),
        Check("3.2", "accuracy falls with sparsity", "; ".join(f"{n[5:9]} {words[n]}" for n in curve),
              means[curve[0]] >= means[curve[1]] >= means[curve[2]]),
        Check("A8", "exactly floor(s N) units are gone", ", ".join(str(runs[n][0]["pruned"]) for n in curve)
              + f" of {runs[curve[0]][0]['units']}", exact),
    ]  # fmt: skip


def longer(folder: Path, out: Path, results: Path, steps: int | None = None) -> Study:
    """Return three times as long on images: the dense network and half of it alone."""
    task = Images(folder)
    task.name, task.steps = "image-longer", steps or 3 * task.steps
    names = ("dense", "GETA 50 %, 4 to 8 bits")

    def claims(runs: Runs) -> list[Check]:
        means = [mean(runs, name, "accuracy") for name in names]
        words = "; ".join(
            f"{name} {told(runs, name, 'accuracy')} (mean {m:.2f})" for name, m in zip(names, means, strict=True)
        )
        return [Check("A14", "three times as long: at most 1.5 points below dense", words, means[1] >= means[0] - 1.5)]

    setting = {"steps": task.steps, "batch": task.batch}
    return Study("image_longer_cpu", task, lambda _: {n: ARMS[n] for n in names}, claims, setting, out, results)


def study(kind: str, folder: Path, out: Path, results: Path, steps: int | None = None) -> Study:
    """Return all arms of one task."""
    images = kind == "image-cpu"
    task: Images | Texts = Images(folder) if images else Texts(folder)
    task.steps = steps or task.steps
    setting = {
        "model": "residual network" if images else "BERT, 2 layers of 64, from scratch",
        "parameters": sum(p.numel() for p in task.model(0).parameters()), "steps": task.steps, "batch": task.batch,
        "lr": task.lr, "optimizer": "SGD, momentum" if images else "AdamW",
        "data": f"{'MNIST' if images else 'SST-2'}, {len(task.y):,} to train, {len(task.test_y):,} held out",
    }  # fmt: skip
    lost = 1.5 if images else 2.0
    return Study(kind.replace("-", "_"), task, lambda _: ARMS, lambda r: checks(r, lost), setting, out, results)
