# SPDX-License-Identifier: Apache-2.0
"""Does GETA (arXiv:2502.16638) keep what it promises? On a CPU, in minutes:

    python -m experiments.geta image-cpu --data path/to/mnist --out runs/geta
    python -m experiments.geta image-longer-cpu --data path/to/mnist --out runs/geta
    python -m experiments.geta text-cpu --data path/to/sst2 --out runs/geta
    python -m experiments.geta language-cpu --data path/to/text --out runs/geta
    python -m experiments.geta graph
    python -m experiments.geta overhead

On one GPU:

    python -m experiments.geta resnet-gpu --data path/to/cifar10 --out runs/geta-gpu
    python -m experiments.geta llama-gpu --data runs/data/encyclopedia --out runs/geta-gpu
    python -m experiments.geta overhead

Runs that are there are not repeated. Each command writes benchmarks/results/<device>/geta_<command>.json. Nothing is
tuned to pass: what does not hold is written down as not holding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

TRAINED = ("image-cpu", "image-longer-cpu", "text-cpu", "language-cpu", "resnet-gpu", "llama-gpu")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in TRAINED:
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
        command.add_argument("--steps", type=int, help="fewer than the default, to try it out")
    for name in ("graph", "overhead"):
        commands.add_parser(name)
    return parser.parse_args()


def main() -> None:
    told = arguments()
    if not told.command.endswith("gpu"):
        torch.set_num_threads(1)
    if told.command in ("image-cpu", "text-cpu"):
        from experiments.geta import classifiers

        classifiers.main(told.command, told.data, told.out, told.steps)
    elif told.command == "image-longer-cpu":
        from experiments.geta import classifiers

        classifiers.longer(told.data, told.out, told.steps)
    elif told.command == "language-cpu":
        from experiments.geta import language

        language.main(told.data, told.out, told.steps)
    elif told.command == "resnet-gpu":
        from experiments.geta import resnet

        resnet.main(told.data, told.out, told.steps)
    elif told.command == "llama-gpu":
        from experiments.geta import llama

        llama.main(told.data, told.out, told.steps)
    else:
        from experiments.geta import speed

        {"graph": speed.graph, "overhead": speed.overhead}[told.command]()


if __name__ == "__main__":
    main()
