# SPDX-License-Identifier: Apache-2.0
"""Does noise on weights cost as little, and help as much, as it should? (Ahn and Yoo 2025, arXiv:2505.11170)

    lowbits data prepare speeches.txt --vocab-size 512 --out runs/data/speeches
    python -m experiments.gaussian_weight_sampling lm-cpu --data runs/data/speeches --out runs/gaussws

    python -m experiments.gaussian_weight_sampling instructions
    python -m experiments.gaussian_weight_sampling speed --seconds 300
    lowbits data prepare encyclopedia.txt --tokenizer path/to/gpt2 --out runs/data/encyclopedia
    python -m experiments.gaussian_weight_sampling lm-gpu --data runs/data/encyclopedia --seconds 560

Runs that are there are not repeated. Each command writes benchmarks/results/<device>/gaussws_<command>.json as soon as
it has something. Nothing is tuned to pass: what does not hold is written down as not holding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("lm-cpu", help="a small GPT-2 on a CPU")
    cpu.add_argument("--data", required=True)
    cpu.add_argument("--out", type=Path, required=True, help="folder of the runs")
    commands.add_parser("instructions", help="of the kernels on an H200, counted without one")
    gpu = commands.add_parser("lm-gpu", help="GPT-2 small and Llama-134M on a GPU")
    gpu.add_argument("--data", required=True)
    gpu.add_argument("--model", action="append", help="gpt2-small, llama-134m; both if not given")
    gpu.add_argument("--arm", action="append", help="all if not given")
    gpu.add_argument("--seeds", type=int, default=3)
    gpu.add_argument("--steps", type=int, default=300)
    gpu.add_argument("--batch", type=int, default=16, help="sequences a step")
    gpu.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    gpu.add_argument("--seconds", type=float, default=560.0, help="begin no run that would end later")
    speed = commands.add_parser("speed", help="kernels, a whole Llama step, memory, the same bits twice")
    speed.add_argument("--part", action="append", help="step, kernels, repeat, bits; all if not given, in this order")
    speed.add_argument("--model", default="llama-1b")
    speed.add_argument("--layers", type=int, help="of the model; all if not given")
    speed.add_argument("--batch", type=int, default=8, help="sequences of 2,048 tokens a step")
    speed.add_argument("--rounds", type=int, default=8, help="of steps in turns")
    speed.add_argument("--arm", action="append", help="of the part `step`; all if not given")
    speed.add_argument("--eager", action="store_true", help="blocks are not compiled, either")
    speed.add_argument("--seconds", type=float, default=560.0, help="begin no arm or part later")
    return parser.parse_args()


def main() -> None:
    told = arguments()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if told.command == "lm-gpu":
        from experiments.gaussian_weight_sampling import gpu_language

        setting = gpu_language.setting_of(told.steps, told.batch, told.length, device)
        names, arms = told.model or gpu_language.MODELS, told.arm or list(gpu_language.ARMS)
        gpu_language.main(told.data, names, arms, told.seeds, setting, told.seconds)
    elif told.command == "instructions":
        from experiments.gaussian_weight_sampling import instructions

        instructions.main()
    elif told.command == "speed":
        from experiments.gaussian_weight_sampling import gpu_speed

        size = gpu_speed.Size(told.model, told.layers, told.batch, told.rounds, not told.eager, device)
        gpu_speed.main(size, told.part or list(gpu_speed.PARTS), told.arm or list(gpu_speed.ARMS), told.seconds)
    else:
        torch.set_num_threads(1)
        from experiments.gaussian_weight_sampling import language

        language.main(told.data, told.out)


if __name__ == "__main__":
    main()
