# SPDX-License-Identifier: Apache-2.0
"""Does noise on weights cost as little, and help as much, as it should? (Ahn and Yoo 2025, arXiv:2505.11170)

    lowbits data prepare speeches.txt --vocab-size 512 --out runs/data/speeches
    python -m experiments.gaussian_weight_sampling lm-cpu --data runs/data/speeches --out runs/gaussws

    python -m experiments.gaussian_weight_sampling speed
    lowbits data prepare encyclopedia.txt --tokenizer path/to/gpt2 --out runs/data/encyclopedia
    python -m experiments.gaussian_weight_sampling lm-gpu --data runs/data/encyclopedia --out runs/gaussws-gpu

Runs that are there are not repeated. Each command writes benchmarks/results/<device>/gaussws_<command>.json. Nothing is
tuned to pass: what does not hold is written down as not holding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("lm-cpu", "lm-gpu"):
        command = commands.add_parser(name)
        command.add_argument("--data", required=True)
        command.add_argument("--out", type=Path, required=True, help="folder of the runs")
        if name == "lm-gpu":
            command.add_argument("--model", action="append", help="gpt2-small, llama-134m; both if not given")
            command.add_argument("--steps", type=int, default=400)
            command.add_argument("--seeds", type=int, default=3)
            command.add_argument("--jobs", type=int, default=1, help="runs at a time")
    speed = commands.add_parser("speed")
    speed.add_argument("--part", action="append", help="kernels, step, memory, repeat; all if not given")
    return parser.parse_args()


def main() -> None:
    told = arguments()
    if told.command == "lm-gpu":  # before torch has any threads: compare starts processes
        from experiments.gaussian_weight_sampling import gpu_language

        gpu_language.main(told.data, told.out, told.model, told.steps, told.seeds, told.jobs)
    elif told.command == "speed":
        from experiments.gaussian_weight_sampling import gpu_speed

        gpu_speed.main(told.part)
    else:
        torch.set_num_threads(1)
        from experiments.gaussian_weight_sampling import language

        language.main(told.data, told.out)


if __name__ == "__main__":
    main()
