# SPDX-License-Identifier: Apache-2.0
"""MNIST in 8 x 8 pixels: a teacher of 26,122 parameters from 60,000 images, a student of 760 from 900 of them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from experiments.distillation.arms import Batch, Plan, Task, fresh, generator

BATCH, ALL, TRAIN, TEST = 50, 60_000, 900, 5000


class Digits(Task):
    """Classification with a multi-layer perceptron."""

    name, unit, higher_is_better = "digits", "accuracy, %", True
    plan = Plan(
        bits=(4, 3, 2), qd=("256", "64"), steps=2400, teacher_steps=3600, dq_steps=240, lr=2e-3, teacher_lr=2e-3,
        extras=True,
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self.images, self.labels = read(folder, "train", ALL)
        self.test, self.truth = (part[:TEST] for part in read(folder, "t10k", 10_000))

    def teacher(self, seed: int) -> nn.Module:
        return fresh(lambda: perceptron(64, 128, 128, 10), seed + 500)

    def student(self, seed: int) -> nn.Module:
        return fresh(lambda: perceptron(64, 10, 10), seed)

    def batch(self, seed: int, step: int) -> Batch:
        """Each seed has its own images; a teacher, whose seed is in the second thousand, has all."""
        count = ALL if seed // 1000 == 1 else TRAIN
        mine = torch.randperm(ALL, generator=generator(seed % 1000, 0))[:count]
        epoch, place = divmod(step, count // BATCH)
        order = torch.randperm(count, generator=generator(seed, 1, epoch))[place * BATCH : (place + 1) * BATCH]
        return (self.images[mine[order]],), self.labels[mine[order]]

    def score(self, model: nn.Module) -> float:
        return 100 * (model(self.test).argmax(1) == self.truth).double().mean().item()


def perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def read(folder: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Images averaged to 8 x 8, [count, 1, 8, 8] with mean 0 and deviation 1, and labels."""
    with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(count, 1, 28, 28)
    with gzip.open(folder / f"{name}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    small = avg_pool2d(torch.from_numpy(pixels[:, :, 2:26, 2:26].copy()).float() / 255, 3)  # the rim is empty
    return (small - 0.18) / 0.29, torch.from_numpy(labels.copy()).long()
