# SPDX-License-Identifier: Apache-2.0
"""Do 8-bit optimizers keep what they promise? The checks of Dettmers et al. 2022 (arXiv:2110.02861).

    lowbits data prepare speeches.txt --vocab-size 512 --out runs/data/speeches
    python -m experiments.eightbit_optimizers lm-cpu --data runs/data/speeches --out runs/eightbit
    python -m experiments.eightbit_optimizers errors --data runs/data/speeches
    python -m experiments.eightbit_optimizers image-cpu --data path/to/cifar10 --out runs/eightbit
    python -m experiments.eightbit_optimizers text-cpu --data path/to/sst2 --weights path/to/encoder --out runs/eightbit
    python -m experiments.eightbit_optimizers memory

    lowbits data prepare encyclopedia.txt --tokenizer path/to/gpt2 --out runs/data/encyclopedia
    python -m experiments.eightbit_optimizers lm-gpu --data runs/data/encyclopedia --out runs/eightbit-gpu --jobs 3
    python -m experiments.eightbit_optimizers memory --check

Runs that are there are not repeated. Each command writes benchmarks/results/<device>/eightbit_<command>.json. Nothing
is tuned to pass: what does not hold is written down as not holding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("lm-cpu", "image-cpu", "text-cpu", "lm-gpu", "errors"):
        command = commands.add_parser(name)
        command.add_argument("--data", required=True)
        if name != "errors":
            command.add_argument("--out", type=Path, required=True, help="folder of the runs")
        if name == "text-cpu":
            command.add_argument("--weights", required=True, help="a pretrained encoder's folder")
            command.add_argument("--limit", type=int, default=6920, help="training sentences")
        if name == "lm-gpu":
            command.add_argument("--jobs", type=int, help="runs at a time")
            command.add_argument("--as-is", action="store_true", help="train nothing: report the runs that are there")
    commands.add_parser("memory").add_argument("--check", action="store_true", help="compare with a GPU")
    return parser.parse_args()


def main() -> None:
    told = arguments()
    if told.command == "lm-gpu":  # before torch has any threads: compare starts processes
        from experiments.eightbit_optimizers import gpt2

        gpt2.main(told.data, told.out, told.jobs, told.as_is)
        return
    if told.command == "memory":
        from experiments.eightbit_optimizers import memory

        memory.check() if told.check else memory.main()
        return
    torch.set_num_threads(1)
    if told.command == "lm-cpu":
        from experiments.eightbit_optimizers import language

        language.main(told.data, told.out)
    elif told.command == "errors":
        from experiments.eightbit_optimizers import states

        states.main(told.data)
    else:
        from experiments.eightbit_optimizers import classifiers

        if told.command == "image-cpu":
            classifiers.main_images(told.data, told.out)
        else:
            classifiers.main_text(told.data, told.out, told.weights, told.limit)


if __name__ == "__main__":
    main()
