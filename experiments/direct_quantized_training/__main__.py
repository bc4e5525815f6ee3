# SPDX-License-Identifier: Apache-2.0
"""Direct quantized training, measured (docs/papers/direct-quantized-training.md).

    python -m experiments.direct_quantized_training cpu --data DATA --out runs/dqt-cpu     T1 to T7, on a CPU
    lowbits data prepare DATA/text/wiki.train.txt.xz --validation DATA/text/wiki.val.txt.xz --vocab-size 32000 --out TOKENS

and on a GPU, where TOKENS is that folder; the numbers are seconds, about, of an H200:

    ... memory                                        90   bytes a parameter, and those of peers
    ... pretrain --data TOKENS                       150   50 steps of 33 billion parameters
    ... update-time                                   30   H3
    ... layer-time                                    15   H4
    ... gpu-speed --data TOKENS                       40   H2, H6
    ... largest                                      400   the largest model that fits
    ... gpu --data TOKENS --out RUNS --jobs 4        400   H1: learning rates, then six arms on three seeds
    ... gpu --data TOKENS --out RUNS --arms dqt_8 --lr 0.001   90   at a rate that the search did not choose
    ... gpu-report RUNS ...                            1   what all calls of `gpu` found
    torchrun --nproc-per-node 2 -m experiments.direct_quantized_training ranks    60   H5, two GPUs

Results go to benchmarks/results/<device>/dqt_*.json as soon as there are some; a call that is cut off has written what it
has, and another call adds to it. Peers are measured where they are installed. Blocks of memory come in many sizes:
PYTORCH_ALLOC_CONF=expandable_segments:True lets `largest` go a little further, and the file says so. Every command runs
on a CPU too, at a tiny size
(`--shape 512 256 256 2 4 --results /tmp/x`), to be tried out.
"""  # noqa: E501  a command is one line

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from experiments.checks import RESULTS


def _add_sizes(parser: argparse.ArgumentParser, *needed: str) -> None:
    if "data" in needed:
        parser.add_argument("--data", type=Path, required=True, help="a folder of tokens")
    if "shape" in needed:
        parser.add_argument("--shape", nargs=5, type=int, metavar=("VOCABULARY", "WIDTH", "FFN", "LAYERS", "HEADS"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="where <device>/dqt_*.json goes")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cpu = commands.add_parser("cpu")
    cpu.add_argument("--data", type=Path, required=True, help="a folder with text/tinyshakespeare/input.txt.xz")
    cpu.add_argument("--out", type=Path, required=True, help="folder of the runs")
    for name, steps in (("gpu", 500), ("gpu-speed", 30)):
        command = commands.add_parser(name)
        _add_sizes(command, "data", "shape")
        command.add_argument("--arms", nargs="+", default=None, help="all that the claims are about, unless given")
        command.add_argument("--steps", type=int, default=steps)
        command.add_argument("--batch", type=int, default=16, help="sequences")
        command.add_argument("--length", type=int, default=512)
        if name == "gpu":
            command.add_argument("--out", type=Path, required=True, help="folder of the runs, a file each")
            command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
            command.add_argument("--jobs", type=int, default=1, help="runs at once")
            command.add_argument("--lr", type=float, help="of all arms; the best of a search unless given")
    report = commands.add_parser("gpu-report")
    report.add_argument("folders", nargs="+", type=Path)
    _add_sizes(report)
    for name in ("memory", "largest"):
        command = commands.add_parser(name)
        _add_sizes(command, "shape")
        command.add_argument("--ways", nargs="+", default=None, help="all, unless given")
        if name == "largest":
            command.add_argument("--tokens", type=int, default=2049)
    pretrain = commands.add_parser("pretrain")
    _add_sizes(pretrain, "data", "shape")
    pretrain.add_argument("--layers", type=int, default=None, help="40, which are 32.9 billion parameters")
    pretrain.add_argument("--steps", type=int, default=50)
    pretrain.add_argument("--sequences", type=int, default=4)
    pretrain.add_argument("--length", type=int, default=512)
    pretrain.add_argument("--way", default="ternary AdamW4bit")
    pretrain.add_argument("--lr", type=float, default=2e-5, help="peak of weights in codes")
    pretrain.add_argument("--other-lr", type=float, default=1e-4, help="peak of all other weights")
    update = commands.add_parser("update-time")
    update.add_argument("--width", type=int, default=2048)
    update.add_argument("--layers", type=int, default=20)
    layer = commands.add_parser("layer-time")
    layer.add_argument("--width", type=int, default=4096)
    layer.add_argument("--tokens", type=int, default=8192)
    ranks = commands.add_parser("ranks")
    ranks.add_argument("--steps", type=int, default=100)
    for command in (update, layer, ranks):
        _add_sizes(command, *(["shape"] if command is ranks else []))
    return parser.parse_args()


def main() -> None:
    told = arguments()
    match told.command:
        case "cpu":
            from experiments.direct_quantized_training import cpu

            torch.set_num_threads(1)
            cpu.main(told.data, told.out)
        case "gpu" | "gpu-speed" | "gpu-report":
            _gpu(told)
        case "memory" | "largest" | "pretrain":
            _memory(told)
        case "ranks":
            from experiments.direct_quantized_training import ranks

            ranks.main(_shape(told, ranks.SHAPE), told.steps, told.results)
        case "update-time":
            from experiments.direct_quantized_training import speed

            speed.update(told.width, told.layers, told.results)
        case _:
            from experiments.direct_quantized_training import speed

            speed.layer(told.tokens, told.width, told.results)


def _shape(told: argparse.Namespace, usual):  # noqa: ANN001, ANN202  a Shape, which is imported late
    if told.shape is None:
        return usual
    vocab, width, ffn, layers, heads = told.shape
    return replace(usual, vocab=vocab, width=width, ffn=ffn, layers=layers, heads=heads)


def _gpu(told: argparse.Namespace) -> None:
    from experiments.direct_quantized_training import gpu
    from experiments.direct_quantized_training.model import LLAMA_130M

    if told.command == "gpu-report":
        gpu.report(told.folders, told.results)
        return
    shape = _shape(told, LLAMA_130M)
    trains = told.command == "gpu"
    out, compiled = told.out if trains else Path(), trains and torch.cuda.is_available()
    sizes = gpu.Sizes(told.data, out, shape, told.steps, told.batch, told.length, compiled)
    if told.command == "gpu":
        gpu.main(sizes, told.arms or gpu.NAMES, told.seeds, told.jobs, told.lr)
    else:
        gpu.speed(sizes, told.arms or gpu.SPEEDS, told.results)


def _memory(told: argparse.Namespace) -> None:
    from experiments.direct_quantized_training import memory
    from experiments.direct_quantized_training.ways import WAYS

    if told.command == "memory":
        memory.bytes_a_parameter(told.ways or list(WAYS), _shape(told, memory.MIDDLE), told.results)
    elif told.command == "largest":
        memory.largest(told.ways or list(WAYS), _shape(told, memory.WIDE), told.tokens, told.results)
    else:
        shape = _shape(told, memory.WIDE)
        shape = shape if told.layers is None else replace(shape, layers=told.layers)
        kept = {key: getattr(told, key) for key in ("way", "lr", "other_lr", "steps", "sequences", "length")}
        memory.pretrain(told.data, shape, kept, told.results)


if __name__ == "__main__":
    main()
