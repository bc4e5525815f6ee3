# SPDX-License-Identifier: Apache-2.0
"""CIFAR-10: a trained ResNet-20 teaches a small convolutional network, from a cache of its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, relu

from experiments.distillation.arms import Batch, Plan, Task, fresh, generator
from lowbits.methods.distillation import CacheSettings, Teacher, TeacherCache, TopK

BATCH = 100
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Images(Task):
    """Classification of images, mirrored at random; the teacher sees each image and its mirror image once."""

    name, unit, higher_is_better = "images", "accuracy, %", True
    plan = Plan(bits=(4, 2), qd=("256",), steps=200, teacher_steps=0, dq_steps=50, lr=5e-3, teacher_lr=0.0)

    def __init__(self, folder: Path, weights: Path, cache: Path) -> None:
        self.load(folder, weights, "cpu")
        self.cache = TeacherCache.create(cache, CacheSettings("ResNet-20", 10, 10, self.plan.temperature))

    def load(self, folder: Path, weights: Path, device: str) -> None:
        self.images, self.labels = (part.to(device) for part in mosaic(folder, "train_10000"))
        self.test, self.truth = (part.to(device) for part in mosaic(folder, "test_10000"))
        self.device, self.weights = device, weights

    def resnet(self) -> nn.Module:
        model = ResNet20()
        with np.load(self.weights) as stored:
            model.load_state_dict({key: torch.from_numpy(stored[key]) for key in stored}, strict=False)
        return model.to(self.device)

    def teacher(self, seed: int) -> nn.Module:
        model = self.resnet()
        teacher = Teacher(model)
        for begin in range(0, len(self.images), 500):  # goes on where an earlier run ended
            for flip in (0, 1):
                keys = [2 * i + flip for i in range(begin, begin + 500)]
                if self.cache.missing(keys):
                    x = self.images[begin : begin + 500]
                    self.cache.append(keys, teacher(x.flip(3) if flip else x))
        all_ = self.cache.read(list(range(2 * len(self.images))))
        log_probs, classes, rest = (part.to(self.device) for part in (all_.log_probs, all_.classes, all_.rest))
        self.told = TopK(log_probs, classes, rest, all_.num_classes, all_.temperature)
        return model

    def student(self, seed: int) -> nn.Module:
        def make() -> nn.Sequential:
            layers: list[nn.Module] = []
            for wide, narrow in ((3, 16), (16, 32), (32, 48)):
                layers += [nn.Conv2d(wide, narrow, 3, 2, 1), nn.BatchNorm2d(narrow), nn.ReLU()]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, 10))

        return fresh(make, seed).to(self.device)

    def drawn(self, seed: int, step: int) -> tuple[Tensor, bool]:
        noise = generator(seed, step)
        flip = bool(torch.rand((), generator=noise) < 0.5)
        return torch.randint(0, len(self.images), (BATCH,), generator=noise).to(self.device), flip

    def batch(self, seed: int, step: int) -> Batch:
        rows, flip = self.drawn(seed, step)
        x = self.images[rows]
        return (x.flip(3) if flip else x,), self.labels[rows]

    def soft(self, teacher: Teacher, seed: int, step: int, inputs: tuple[Tensor, ...]) -> TopK:
        rows, flip = self.drawn(seed, step)
        all_, keys = self.told, 2 * rows + int(flip)
        return TopK(all_.log_probs[keys], all_.classes[keys], all_.rest[keys], all_.num_classes, all_.temperature)

    def score(self, model: nn.Module) -> float:
        found = torch.cat([model(self.test[i : i + 1000]).argmax(1) for i in range(0, len(self.test), 1000)])
        return 100 * (found == self.truth).double().mean().item()


class PublishedStudent(Images):
    """The paper's first student, 1 M parameters, for a GPU; but from 10,000 images, and a ResNet-20 teaches.

    Images are mirrored and shifted by up to four pixels, and the teacher sees them so.
    """

    name = "images_gpu"
    plan = Plan(bits=(4, 2), qd=("256",), steps=3000, teacher_steps=0, dq_steps=300, lr=2e-3, teacher_lr=0.0)

    def __init__(self, folder: Path, weights: Path, device: str) -> None:
        self.load(folder, weights, device)

    def teacher(self, seed: int) -> nn.Module:
        return self.resnet()

    def student(self, seed: int) -> nn.Module:
        def make() -> nn.Sequential:
            layers: list[nn.Module] = []
            for wide, narrow, pool in ((3, 75, 2), (75, 50, 1), (50, 50, 2), (50, 25, 1)):
                layers += [nn.Conv2d(wide, narrow, 5, padding=2), nn.BatchNorm2d(narrow), nn.ReLU(), nn.MaxPool2d(pool)]
            head = [nn.Flatten(), nn.Linear(25 * 64, 500), nn.BatchNorm1d(500), nn.ReLU(), nn.Linear(500, 10)]
            return nn.Sequential(*layers, *head)

        return fresh(make, seed).to(self.device)

    def batch(self, seed: int, step: int) -> Batch:
        rows, flip = self.drawn(seed, step)
        down, right = torch.randint(0, 9, (2,), generator=generator(seed, step, 1)).tolist()
        x = self.images[rows]
        x = pad(x.flip(3) if flip else x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
        return (x,), self.labels[rows]

    def soft(self, teacher: Teacher, seed: int, step: int, inputs: tuple[Tensor, ...]) -> Tensor:  # type: ignore[override]
        return teacher(*inputs)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al. 2016, arXiv:1512.03385, option A)."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.stride, self.more = narrow // wide, narrow - wide
        self.conv1 = nn.Conv2d(wide, narrow, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(narrow)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(narrow)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        half = self.more // 2
        return relu(y + pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half)))


class ResNet20(nn.Module):
    """Under the names of the stored weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def mosaic(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Images of a mosaic of 100 a row, normalized, [count, 3, 32, 32], and labels."""
    from PIL import Image

    whole = np.asarray(Image.open(folder / f"{name}.webp").convert("RGB"))
    rows = whole.shape[0] // 32
    pixels = whole.reshape(rows, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))
    scaled = (torch.from_numpy(pixels.copy()).float() / 255 - mean) / deviation
    return scaled, torch.from_numpy(np.load(folder / f"{name}_labels.npy")).long()
