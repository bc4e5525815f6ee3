# SPDX-License-Identifier: Apache-2.0
"""What one linear layer costs, forward and backward, under every recipe that runs natively or emulates FP4.

    python benchmarks/linear.py --peers
    python benchmarks/linear.py --shapes gpt2-small gpt2-xl 4096x14336 --arms int8_rowwise --modes eager

The layer has bfloat16 parameters and no bias; x and the gradient of the result are random normal. `ms`: of calls in a
row, so the host's time where that is longer; `device`: the GPU's alone. Ratios are to bf16 in the same mode and run;
above 1 is faster. Weights are quantized in every call, as in a step without gradient accumulation.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable

import torch
from measuring import (
    FAILURES,
    Report,
    Row,
    copy_gb_per_s,
    device_ms,
    first_line,
    gemm_tflops,
    missing,
    number,
    parser,
    sizes,
    steady_ms,
)
from peers import TORCHAO, Convert
from torch import nn

from lowbits.nn import convert_
from lowbits.recipes import named

LLAMA = {"llama-2048": (2048, 5632), "llama-4096": (4096, 14336)}
GPT2 = {"gpt2-small": 768, "gpt2-medium": 1024, "gpt2-large": 1280, "gpt2-xl": 1600}
# Inputs and outputs of the layers of a block.
SHAPES: dict[str, list[tuple[int, int]]] = {
    **{name: [(w, w), (w, ffn), (ffn, w)] for name, (w, ffn) in LLAMA.items()},
    **{name: [(w, 3 * w), (w, w), (w, 4 * w), (4 * w, w)] for name, w in GPT2.items()},
}
ARMS = ("fp8_rowwise", "fp8_rowwise_hp_wgrad", "fp8_tensorwise", "fp8_block", "int8_rowwise", "w8a8_faithful", "nvfp4")
CPU_ARMS = ("int8_rowwise", "w8a8_faithful")


def ours(recipe: str) -> Convert:
    def convert(model: nn.Module) -> nn.Module:
        convert_(model, named(recipe), verbose=False)
        return model

    return convert


def layer(shape: tuple[int, ...], tokens: int, device: torch.device, convert: Convert | None) -> nn.Module:
    torch.manual_seed(0)
    made: nn.Module = nn.Sequential(nn.Linear(*shape, bias=False, device=device, dtype=torch.bfloat16))
    return made if convert is None else convert(made)


def measure(
    convert: Convert | None, shape: tuple[int, ...], mode: str, options: argparse.Namespace, device: torch.device
) -> Row:
    model = layer(shape, options.tokens, device, convert)
    if mode == "compiled":
        model.compile(dynamic=False)
    x = torch.randn(options.tokens, shape[0], device=device, dtype=torch.bfloat16, requires_grad=True)
    g = torch.randn(options.tokens, shape[1], device=device, dtype=torch.bfloat16)

    def work() -> None:
        model(x).backward(g)
        model.zero_grad(set_to_none=True)
        x.grad = None

    row: Row = {"shape": "x".join(map(str, shape)), "mode": mode, "ms": steady_ms(work, device, options.repeat)}
    if device.type == "cuda":
        row["device_ms"] = device_ms(work, device, options.repeat)
    row["tflops"] = 6 * options.tokens * shape[0] * shape[1] / row.get("device_ms", row["ms"]) / 1e9
    row["runs"] = str(next(model.children()).extra_repr()) if convert else "bf16"  # type: ignore[operator]
    return row


def finish(row: Row, base: Row | None, gemm: float) -> Row:
    """Add ratios to bf16, and what they mean."""
    row["of_bf16_gemm"] = row["tflops"] / gemm
    if base is None:
        return row
    ratios = {f"{key}_over_bf16": base[key] / row[key] for key in ("ms", "device_ms") if key in row}
    fast = ratios.get("device_ms_over_bf16", ratios["ms_over_bf16"])
    return row | ratios | {"advice": "" if fast >= 1 else "leave in bf16"}


def shapes(asked: list[str]) -> dict[str, tuple[int, ...]]:
    """Layers by name."""
    found: dict[str, tuple[int, ...]] = {}
    for word in asked:
        if word in SHAPES:
            found |= {f"{word} {k}x{n}": (k, n) for k, n in SHAPES[word]}
        elif not word.replace("x", "").isdigit():
            raise SystemExit(f"--shapes: {word} is none of {', '.join(SHAPES)}, nor a size such as 4096x14336")
        else:
            found[word] = sizes([word], 2)[0]
    return found


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--shapes", nargs="+", metavar="NAME", help=f"{', '.join(SHAPES)}, or inputs x outputs")
    made.add_argument("--arms", nargs="+", metavar="RECIPE", help="recipes beside bf16")
    made.add_argument("--tokens", type=int, help="rows of x")
    made.add_argument("--modes", nargs="+", choices=("eager", "compiled"), help="default: both; eager on a CPU")
    options = made.parse_args()
    device = torch.device(options.device)
    cuda = device.type == "cuda"
    options.shapes = options.shapes or (list(LLAMA) if cuda else ["768x768", "768x3072", "3072x768"])
    options.arms = options.arms or (ARMS if cuda else CPU_ARMS)
    options.tokens = options.tokens or (16384 if cuda else 512)
    options.modes = options.modes or (["eager", "compiled"] if cuda else ["eager"])
    arms: dict[str, tuple[Convert | None, bool]] = {"bf16": (None, False)}
    arms |= {name: (ours(name), False) for name in options.arms if name != "bf16"}
    if options.peers and not missing("torchao"):
        arms |= {name: (convert, True) for name, convert in TORCHAO.items()}
    return table(arms, options, device)


def table(arms: dict[str, tuple[Convert | None, bool]], options: argparse.Namespace, device: torch.device) -> int:
    columns: dict[str, Callable[[Row], str]] = {
        "ms": number("ms", ".3f"), "over bf16": number("ms_over_bf16"), "device ms": number("device_ms", ".3f"),
        "over bf16, device": number("device_ms_over_bf16"), "TFLOP/s": number("tflops", ".4g"),
        "of bf16 GEMM": number("of_bf16_gemm", ".0%"),
        "": lambda row: row.get("advice", ""),
    }  # fmt: skip
    rates = gemm_tflops(device)
    ceilings = {"copy_gb_per_s": copy_gb_per_s(device), "gemm_tflops": rates}
    report = Report("linear", device, options, ceilings, columns)
    for mode in options.modes:
        for label, shape in shapes(options.shapes).items():
            base: Row | None = None
            for name, (convert, peer) in arms.items():
                # Their documentation has them compiled; eagerly they are not meant to be fast.
                key = f"{label} {mode} {name}"
                if (peer and mode == "eager") or not (report.wants(key) or name == "bf16"):
                    continue
                task = functools.partial(measure, convert, shape, mode, options, device)
                row = report.measure(
                    key, lambda task=task, base=base: finish(task(), base, rates["bf16"]), may_fail=peer
                )
                base = row if name == "bf16" else base
    return report.show(f"One linear layer, forward and backward, {options.tokens} tokens")


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except FAILURES as failure:
        raise SystemExit(first_line(failure)) from failure
