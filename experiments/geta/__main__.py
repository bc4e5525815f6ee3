# SPDX-License-Identifier: Apache-2.0
"""Does GETA (arXiv:2502.16638) keep what it promises? On a CPU, in minutes:

    python -m experiments.geta image-cpu --data path/to/mnist --out runs/geta
    python -m experiments.geta image-longer-cpu --data path/to/mnist --out runs/geta
    python -m experiments.geta text-cpu --data path/to/sst2 --out runs/geta
    python -m experiments.geta language-cpu --data path/to/text --out runs/geta
    python -m experiments.geta graph
    python -m experiments.geta overhead --device cpu

On one GPU; seeds run side by side, `--steps` says how long:

    python -m experiments.geta overhead
    python -m experiments.geta resnet-gpu --data path/to/cifar10 --out runs/geta-gpu
    python -m experiments.geta llama-gpu --data runs/data/encyclopedia --out runs/geta-gpu

Runs that are there are not repeated. Each command writes <results>/<device>/geta_<command>.json as soon as it has
something. Nothing is tuned to pass: what does not hold is written down as not holding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from experiments.checks import RESULTS
from experiments.geta.runs import SEEDS, Study, side_by_side


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("image-cpu", "image-longer-cpu", "text-cpu", "language-cpu", "resnet-gpu", "llama-gpu"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
        command.add_argument("--steps", type=int, help="of every run, 70 at least")
        command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
        command.add_argument("--only", type=int, help="carry out this seed alone; the others are another process's")
    for name, command in commands.choices.items():
        if name == "llama-gpu":
            command.add_argument("--size", help="of the Llama")
            command.add_argument("--batch", type=int)
            command.add_argument("--block", type=int)
    for name in ("graph", "overhead"):
        commands.add_parser(name)
    for name, command in commands.choices.items():
        command.add_argument("--results", type=Path, default=RESULTS, help="folder of results files")
        if name in ("resnet-gpu", "llama-gpu", "overhead"):
            command.add_argument("--device", type=torch.device, default=torch.device("cuda"), help="cpu for a look")
    return parser.parse_args()


def study(told: argparse.Namespace) -> Study:
    match told.command:
        case "image-cpu" | "text-cpu":
            from experiments.geta import classifiers

            return classifiers.study(told.command, told.data, told.out, told.results, told.steps)
        case "image-longer-cpu":
            from experiments.geta import classifiers

            return classifiers.longer(told.data, told.out, told.results, told.steps)
        case "language-cpu":
            from experiments.geta import language

            return language.study(told.data, told.out, told.results, told.steps)
        case "resnet-gpu":
            from experiments.geta import resnet

            return resnet.study(told.data, told.out, told.results, told.device, told.steps)
        case _:
            from experiments.geta import llama

            changes = {name: getattr(told, name) for name in ("steps", "size", "batch", "block")}
            return llama.study(told.data, told.out, told.results, told.device, **changes)


def main() -> None:
    told = arguments()
    torch.set_num_threads(1)
    if told.command in ("graph", "overhead"):
        from experiments.geta import speed

        speed.graph(told.results) if told.command == "graph" else speed.overhead(told.results, told.device)
    elif told.only is not None:
        study(told).carry_out_one(told.only, told.seeds)
    elif told.command.endswith("gpu") and len(told.seeds) > 1:
        side_by_side(study(told), told.seeds)
    else:
        study(told).carry_out(told.seeds)


if __name__ == "__main__":
    main()
