# SPDX-License-Identifier: Apache-2.0
"""Does quantized distillation do what it promises? The orderings of Polino et al. 2018 (arXiv:1802.05668).

    python -m experiments.distillation digits      --data path/to/mnist --out runs/distillation
    python -m experiments.distillation text        --data path/to/shakespeare.txt --out runs/distillation
    python -m experiments.distillation translation --data path/to/pairs --out runs/distillation
    python -m experiments.distillation images      --data path/to/cifar10 --weights resnet20.npz --out runs/distillation

    lowbits data prepare encyclopedia.txt --vocab-size 8192 --out runs/data/encyclopedia
    python -m experiments.distillation text-gpu --data runs/data/encyclopedia --out runs/distillation-gpu
    python -m experiments.distillation images-gpu --data path/to/cifar10 --weights resnet20.npz --out runs/distilled

Three seeds each; runs that are there are not repeated. Each command writes benchmarks/results/<device>/
distillation_<task>.json. Learning rates and lengths were chosen on seed 100, which is not among the three.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from experiments.distillation import arms, checks

SEEDS = (0, 1, 2)


def make(told: argparse.Namespace) -> arms.Task:
    match told.task:
        case "digits":
            from experiments.distillation.digits import Digits

            return Digits(told.data)
        case "text":
            from experiments.distillation.text import Characters

            return Characters(told.data)
        case "translation":
            from experiments.distillation.translation import Translation

            return Translation(told.data)
        case "images":
            from experiments.distillation.images import Images

            return Images(told.data, told.weights, told.out / "resnet20-logits")
        case _:
            from experiments.distillation.images import PublishedStudent

            return PublishedStudent(told.data, told.weights, told.out / "resnet20-logits", "cuda")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "text", "translation", "images", "text-gpu", "images-gpu"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the trained ResNet-20, for images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--share", type=float, default=1.0, help="of the plan's steps; another --out for each")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    if told.task == "text-gpu":
        from experiments.distillation import gpu

        gpu.main(gpu.Setting(str(told.data), told.out, share=told.share), list(told.seeds))
        return
    torch.set_num_threads(1)
    task = make(told)
    task.plan = task.plan.scaled(told.share)
    runs = arms.all_seeds(task, told.out, told.seeds)
    if len(told.seeds) == len(SEEDS):
        checks.write(task, runs, torch.device("cuda" if told.task == "images-gpu" else "cpu"))


if __name__ == "__main__":
    main()
