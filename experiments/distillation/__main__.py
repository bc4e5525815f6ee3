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
distillation_<task>.json; on a GPU the seeds run side by side and the file grows as they do. Learning rates and lengths
were chosen on seeds 100 and 101, which are not among the three.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from experiments.checks import RESULTS
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
        case "images-gpu":
            from experiments.distillation.images import PublishedStudent

            return PublishedStudent(told.data, told.weights, told.device)
        case _:
            from experiments.distillation.gpu import Pages

            return Pages(told.data, told.out, told.device, told.size, told.batch, told.block)


def side_by_side(told: argparse.Namespace, task: arms.Task) -> None:
    """Run each seed in a process of its own, and write what there is every ten seconds."""
    task.trained_teacher(told.seeds[0])  # now, so that the seeds find it
    running = [subprocess.Popen([sys.executable, "-m", "experiments.distillation", *sys.argv[1:], "--seeds", str(seed)])
               for seed in told.seeds]  # fmt: skip
    written: arms.Runs = {}
    while any(process.poll() is None for process in running):
        time.sleep(10)
        found = arms.collected(task.name, told.out, told.seeds)
        if len(found) > len(written) and all(process.poll() is None for process in running):
            written = found
            checks.save_runs(task, found, torch.device(told.device), told.results)
    if failed := [seed for seed, process in zip(told.seeds, running, strict=True) if process.returncode]:
        sys.exit(f"seeds {failed} failed; what all had measured is in the results.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["digits", "text", "translation", "images", "text-gpu", "images-gpu"])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, help="of the trained ResNet-20, for images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--share", type=float, default=1.0, help="of the plan's steps; another --out for each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", default="cuda", help="of the tasks for a GPU; cpu for a look")
    parser.add_argument("--size", default="llama-110m", help="of the teacher of text-gpu")
    parser.add_argument("--batch", type=int, default=16, help="sequences a step of text-gpu")
    parser.add_argument("--block", type=int, default=512, help="tokens in a sequence of text-gpu")
    told = parser.parse_args()
    told.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    task = make(told)
    task.plan = task.plan.scaled(told.share)
    gpu = told.task.endswith("-gpu")
    if gpu and len(told.seeds) > 1:
        side_by_side(told, task)
    runs = arms.all_seeds(task, told.out, told.seeds)
    if len(told.seeds) > 1:
        checks.write(task, runs, torch.device(told.device if gpu else "cpu"), told.results)


if __name__ == "__main__":
    main()
