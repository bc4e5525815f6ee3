# SPDX-License-Identifier: Apache-2.0
"""`resnet-gpu`: ResNet-20 on CIFAR-10 from scratch, units and bits against accuracy, beside the two separate orders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from experiments.checks import Check
from experiments.eightbit_optimizers.classifiers import DEVIATION, MEAN, Block
from experiments.geta.arms import ARMS, Arm, Result, Task, joint
from experiments.geta.classifiers import checks, scored
from experiments.geta.runs import Runs, Study, mean, told

LARGEST_DROP = 0.8


class Cifar(Task):
    """He et al.'s ResNet-20, option A; 10,000 images to train."""

    name, steps, batch, lr = "resnet20", 1000, 256, 0.2

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.device = device
        (self.x, self.y), (self.test_x, self.test_y) = (images(folder, f"{n}_10000", device) for n in ("train", "test"))

    def model(self, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
            widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
            blocks = [Block(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
            return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(
                self.device
            )

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.test_x[:2],), {}

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        noise = torch.Generator().manual_seed(seed << 20 | step)
        chosen = torch.randint(0, len(self.y), (self.batch,), generator=noise).to(self.device)
        right, down, mirrored = (int(v) for v in torch.randint(0, 9, (3,), generator=noise))
        x = pad(self.x[chosen], (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
        return cross_entropy(model(x.flip(3) if mirrored % 2 else x), self.y[chosen])

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), self.lr, momentum=0.9, weight_decay=5e-4)

    def score(self, network: nn.Module) -> Result:
        with torch.no_grad():
            return scored(torch.cat([network(x) for x in self.test_x.split(1000)]), self.test_y)


def images(folder: Path, name: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """Read `name.npy` (uint8 [count, 32, 32, 3]) or the mosaic `name.webp`, and the labels; images normalized."""
    if (folder / f"{name}.npy").exists():
        pixels = np.load(folder / f"{name}.npy")
    else:
        from PIL import Image

        mosaic = np.asarray(Image.open(folder / f"{name}.webp").convert("RGB"))
        pixels = mosaic.reshape(-1, 32, 100, 32, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 32, 32, 3)
    x = torch.from_numpy(pixels.copy()).to(device).permute(0, 3, 1, 2).float() / 255
    center, deviation = (torch.tensor(v, device=device).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (x - center) / deviation, torch.from_numpy(np.load(folder / f"{name}_labels.npy")).long().to(device)


def arms() -> dict[str, Arm]:
    """The arms of the CPU, and the published setting: 35 % of the units, 4 bits."""
    return {**ARMS, "GETA 10 %, 4 to 8 bits": Arm(0.1, 4, 8, joint), "GETA 35 %, 4 bits": Arm(0.35, 4, 4, joint)}


def claims(runs: Runs) -> list[Check]:
    """The published setting first, then what is claimed on the CPU."""
    name = "GETA 35 %, 4 bits"
    drop = mean(runs, "dense", "accuracy") - mean(runs, name, "accuracy")
    published = Check(
        "H200", f"35 % of the units, 4 bits: at most {LARGEST_DROP} points below dense (published: 0.28)",
        f"dense {told(runs, 'dense', 'accuracy')}; GETA {told(runs, name, 'accuracy')}; relative BOPs "
        f"{100 * mean(runs, name, 'relative_bops'):.2f} % (published 4.5, by others 8.4)", drop <= LARGEST_DROP,
    )  # fmt: skip
    return [published, *(replace(check, id=f"H200 {check.id}") for check in checks(runs, 2.0))]


def study(folder: Path, out: Path, results: Path, device: torch.device, steps: int | None = None) -> Study:
    """Return all arms."""
    task = Cifar(folder, device)
    task.steps = steps or task.steps
    setting = {"model": "ResNet-20", "steps": task.steps, "batch": task.batch, "lr": task.lr,
               "data": f"CIFAR-10, {len(task.y):,} to train, {len(task.test_y):,} held out"}  # fmt: skip
    return Study("resnet", task, lambda _: arms(), claims, setting, out, results)
