# SPDX-License-Identifier: Apache-2.0
"""`image-cpu`: a ResNet on CIFAR-10 under SGD with momentum; `text-cpu`: a Transformer fine-tuned on SST-2 under AdamW.

Each with 32-bit moments and with 8-bit ones, under three seeds, with the same hyper-parameters.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from experiments.eightbit_optimizers.runs import Check, Result, Runs, column, each, gaps, write
from lowbits.optim import SGD, AdamW, AdamW8bit, SGD8bit, param_groups

ARMS = ("32-bit", "8-bit")

# --- images ---------------------------------------------------------------------------------------------------------
IMAGE_EPOCHS, IMAGE_BATCH, IMAGE_LR, IMAGE_DECAY, MOMENTUM = 8, 128, 0.1, 5e-4, 0.9
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Block(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al. 2016, arXiv:1512.03385, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride, self.more = outputs // inputs, outputs - inputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        shortcut = pad(
            x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2)
        )
        return torch.relu(self.body(x) + shortcut)


def resnet(seed: int, width: int = 16) -> nn.Sequential:
    """ResNet-8: one block a stage."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        stages = Block(width, width), Block(width, 2 * width), Block(2 * width, 4 * width)
        return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))


def images(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    """Read a mosaic of 100 images a row and its labels; images normalized, [count, 3, 32, 32]."""
    from PIL import Image

    mosaic = np.asarray(Image.open(folder / f"{name}.webp").convert("RGB"))
    rows = mosaic.shape[0] // 32
    pixels = mosaic.reshape(rows, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    mean, deviation = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, DEVIATION))
    scaled = (torch.from_numpy(pixels.copy()).float() / 255 - mean) / deviation
    return scaled, torch.from_numpy(np.load(folder / f"{name}_labels.npy")).long()


def shifted(x: Tensor, noise: torch.Generator) -> Tensor:
    """Move a batch by up to four pixels each way and mirror it: one draw a batch."""
    right, down = torch.randint(0, 9, (2,), generator=noise).tolist()
    x = pad(x, (4, 4, 4, 4))[:, :, down : down + 32, right : right + 32]
    return x.flip(3) if torch.rand((), generator=noise) < 0.5 else x


def train_images(arm: str, seed: int, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Result:
    """Train with momentum under a one-cycle learning rate, and return accuracy and loss on the test images."""
    model, noise = resnet(seed), torch.Generator().manual_seed(seed)
    make = SGD8bit if arm == "8-bit" else SGD
    optimizer = make(param_groups(model, IMAGE_DECAY), IMAGE_LR, MOMENTUM)
    batches = math.ceil(len(train[1]) / IMAGE_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: one_cycle(t / (IMAGE_EPOCHS * batches)))
    for _ in range(IMAGE_EPOCHS):
        for chosen in torch.randperm(len(train[1]), generator=noise).split(IMAGE_BATCH):
            cross_entropy(model(shifted(train[0][chosen], noise)), train[1][chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    with torch.no_grad():
        logits = torch.cat([model.eval()(x) for x in test[0].split(500)])
    return score(logits, test[1]) | {"state_bytes": state_bytes(optimizer)}


def one_cycle(t: float) -> float:
    """Up for the first fifth, then down to zero in a straight line."""
    return min(t / 0.2, (1 - t) / 0.8)


# --- text -----------------------------------------------------------------------------------------------------------
TEXT_EPOCHS, TEXT_BATCH, TEXT_LR, TEXT_DECAY, TEXT_LENGTH = 1, 32, 5e-5, 0.01, 48


def sentences(folder: Path, split: str) -> tuple[list[str], Tensor]:
    """Read sst2_<split>.jsonl.gz."""
    with gzip.open(folder / f"sst2_{split}.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [row["sentence"] for row in rows], torch.tensor([row["label"] for row in rows])


def train_text(arm: str, seed: int, weights: str, folder: Path, limit: int) -> Result:
    """Fine-tune a pretrained encoder with a fresh head, and return accuracy and loss on the dev sentences."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(weights, num_labels=2, attn_implementation="sdpa")
    model.eval()  # no dropout: nothing but the storage of the moments tells the arms apart
    make = AdamW8bit if arm == "8-bit" else AdamW
    optimizer = make(param_groups(model, TEXT_DECAY), TEXT_LR)

    def logits(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).logits.float()

    texts, labels = sentences(folder, "train")
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[:limit].repeat(TEXT_EPOCHS)
    batches = order.split(TEXT_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: one_cycle(t / len(batches)))
    for chosen in batches:
        cross_entropy(logits([texts[i] for i in chosen]), labels[chosen]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    texts, labels = sentences(folder, "dev")
    with torch.no_grad():
        found = torch.cat([logits(texts[i : i + 100]) for i in range(0, len(texts), 100)])
    return score(found, labels) | {"state_bytes": state_bytes(optimizer)}


# --- both -----------------------------------------------------------------------------------------------------------
def score(logits: Tensor, labels: Tensor) -> Result:
    """Return accuracy in percent, and the mean loss."""
    right = (logits.argmax(1) == labels).double().mean().item()
    return {"accuracy": 100 * right, "loss": cross_entropy(logits.float(), labels).item()}


def state_bytes(optimizer: torch.optim.Optimizer) -> float:
    """Return the bytes of moments a parameter, over all tensors."""
    held = sum(t.nbytes for state in optimizer.state.values() for name, t in state.items() if name != "step")
    return held / sum(p.numel() for p in optimizer.state)


def check(runs: Runs) -> Check:
    """3.6b: the mean accuracies differ by less than two standard errors of a difference of means over seeds."""
    by_arm = {arm: column(runs, arm, "accuracy") for arm in ARMS}
    means = {arm: statistics.fmean(values) for arm, values in by_arm.items()}
    variance = statistics.fmean(statistics.variance(values) for values in by_arm.values())
    noise = 2 * math.sqrt(2 * variance / len(by_arm["8-bit"]))
    gap = means["8-bit"] - means["32-bit"]
    words = ", ".join(f"{arm} {mean:.2f} %" for arm, mean in means.items())
    by_seed = " ".join(f"{value:+.2f}" for value in gaps(runs, "8-bit", "32-bit", "accuracy"))
    measured = f"{words}; by seed {by_seed}; noise {noise:.2f}"
    return Check("3.6b", "8 bits within seed noise of 32 bits, same hyper-parameters", measured, abs(gap) <= noise)


def main_images(folder: str, out: Path) -> Path:
    """Compare SGD and SGD8bit."""
    train, test = (images(Path(folder), name) for name in ("train_10000", "test_10000"))
    runs = each(out / "image-cpu", ARMS, lambda arm, seed: train_images(arm, seed, train, test))
    setting = {
        "model": "ResNet-8", "parameters": sum(p.numel() for p in resnet(0).parameters()), "optimizer": "SGD, momentum",
        "data": f"CIFAR-10, {len(train[1]):,} images of the training set, all {len(test[1]):,} of the test set",
        "epochs": IMAGE_EPOCHS, "batch": IMAGE_BATCH, "lr": IMAGE_LR, "momentum": MOMENTUM, "weight_decay": IMAGE_DECAY,
    }  # fmt: skip
    return write("image_cpu", {"setting": setting, "runs": runs}, [check(runs)], torch.device("cpu"))


def main_text(folder: str, out: Path, weights: str, limit: int) -> Path:
    """Compare AdamW and AdamW8bit."""
    runs = each(out / "text-cpu", ARMS, lambda arm, seed: train_text(arm, seed, weights, Path(folder), limit))
    setting = {
        "model": Path(weights).name, "optimizer": "AdamW", "data": f"SST-2, {limit:,} sentences, dev set",
        "epochs": TEXT_EPOCHS, "batch": TEXT_BATCH, "lr": TEXT_LR, "weight_decay": TEXT_DECAY, "length": TEXT_LENGTH,
        "autocast": "bf16",
    }  # fmt: skip
    return write("text_cpu", {"setting": setting, "runs": runs}, [check(runs)], torch.device("cpu"))
