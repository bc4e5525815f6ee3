# SPDX-License-Identifier: Apache-2.0
"""Direct quantized training, measured (docs/papers/direct-quantized-training.md).

    python -m experiments.direct_quantized_training cpu --data DATA --out runs/dqt-cpu     T1 to T7, on a CPU
    lowbits data prepare DATA/text/wiki.train.txt.xz --vocab-size 32000 --out TOKENS       the text of what follows

and on a GPU, where TOKENS is that folder; results go to benchmarks/results/<device>/dqt_*.json:

    ... search --data TOKENS --out FILE.json [--arms ...]                  learning rates of `gpu`
    ... gpu --data TOKENS --out FILE.json [--arms ...] [--seeds ...]       H1, H2, H6: the 130M shape
    ... gpu-report FILE.json ...                                           what all calls of `gpu` found
    ... memory                                                             bytes a parameter, and those of peers
    ... largest                                                            the largest model that fits
    ... pretrain --data TOKENS --layers 40                                 50 steps of 30 billion parameters or more
    ... update-time | layer-time                                           H3 | H4
    torchrun --nproc-per-node 2 -m experiments.direct_quantized_training ranks    H5, two GPUs
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu")
    cpu.add_argument("--data", type=Path, required=True, help="a folder with text/tinyshakespeare/input.txt.xz")
    cpu.add_argument("--out", type=Path, required=True, help="folder of the runs")
    for name in ("gpu", "search"):
        command = commands.add_parser(name)
        command.add_argument("--data", type=Path, required=True, help="a folder of tokens")
        command.add_argument("--out", type=Path, required=True, help="file of the runs")
        command.add_argument("--arms", nargs="+", default=None)
        command.add_argument("--native", action="store_true", help="fprop of codes on integer units")
        if name == "gpu":
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
            command.add_argument("--steps", type=int, default=600)
    commands.add_parser("gpu-report").add_argument("files", nargs="+", type=Path)
    memory = commands.add_parser("memory")
    memory.add_argument("--ways", nargs="+", default=None)
    memory.add_argument("--layers", type=int, default=32)
    largest = commands.add_parser("largest")
    largest.add_argument("--ways", nargs="+", default=None)
    largest.add_argument("--tokens", type=int, default=2049)
    pretrain = commands.add_parser("pretrain")
    pretrain.add_argument("--data", type=Path, required=True, help="a folder of tokens")
    pretrain.add_argument("--layers", type=int, default=40)
    pretrain.add_argument("--steps", type=int, default=50)
    pretrain.add_argument("--sequences", type=int, default=4)
    pretrain.add_argument("--length", type=int, default=512)
    pretrain.add_argument("--way", default="ternary AdamW4bit")
    pretrain.add_argument("--lr", type=float, default=1e-4)
    for name in ("update-time", "layer-time", "ranks"):
        commands.add_parser(name)
    return parser.parse_args()


def main() -> None:
    told = arguments()
    match told.command:
        case "cpu":
            from experiments.direct_quantized_training import cpu

            torch.set_num_threads(1)
            cpu.main(told.data, told.out)
        case "gpu" | "search" | "gpu-report":
            _gpu(told)
        case "memory" | "largest" | "pretrain":
            _memory(told)
        case "ranks":
            from experiments.direct_quantized_training import ranks

            ranks.main()
        case _:
            from experiments.direct_quantized_training import speed

            speed.update() if told.command == "update-time" else speed.layer()


def _gpu(told: argparse.Namespace) -> None:
    from experiments.direct_quantized_training import gpu

    if told.command == "gpu":
        gpu.main(told.data, told.out, told.arms or gpu.NAMES, told.seeds, told.steps, told.native)
    elif told.command == "search":
        gpu.search(told.data, told.out, told.arms or gpu.NAMES[:4], told.native)
    else:
        gpu.report(told.files)


def _memory(told: argparse.Namespace) -> None:
    from experiments.direct_quantized_training import memory

    if told.command == "memory":
        memory.bytes_a_parameter(told.ways or list(memory.WAYS), told.layers)
    elif told.command == "largest":
        memory.largest(told.ways or list(memory.WAYS), told.tokens, memory.GUESSES)
    else:
        memory.pretrain(told.data, told.layers, told.steps, told.sequences, told.length, told.way, told.lr)


if __name__ == "__main__":
    main()
