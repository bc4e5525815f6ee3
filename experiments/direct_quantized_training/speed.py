# SPDX-License-Identifier: Apache-2.0
"""`update-time` (H3): the update against torch's fused AdamW; `layer-time` (H4): GEMMs of codes against bfloat16."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.direct_quantized_training.device import DEVICE, ON_GPU, clear
from experiments.direct_quantized_training.results import Check, Ways
from lowbits import optim
from lowbits.nn import Execution, Grid, StepInit, grid_linear_, normal_parameter
from lowbits.optim import CodecOptimizer
from lowbits.quantizers import Noise

LAYERS = 20
"""1.03 billion parameters in 140 tensors at width 2048."""
GRIDS = {"int8": Grid.of(8), "int4": Grid.of(4), "ternary": Grid.of(1.58)}
Make = Callable[[list[nn.Parameter]], CodecOptimizer]
OURS: dict[str, Make] = {
    "AdamW": lambda p: optim.AdamW(p),
    "AdamW8bit": lambda p: optim.AdamW8bit(p),
    "AdamW4bit": lambda p: optim.AdamW4bit(p),
    "Lion8bit": lambda p: optim.Lion8bit(p),
    "SGD8bit": lambda p: optim.SGD8bit(p, momentum=0.9),
}
ADAFACTOR: Make = lambda p: optim.Adafactor(p)  # noqa: E731  as the others
CHANNEL = StepInit(per_channel=True)
BASE = "torch fused AdamW, bfloat16"
REPEATS, WARM = 20, 5


def milliseconds(run: Callable[[], object]) -> dict[str, float]:
    """Median and range of single calls, by CUDA events, after warm ones."""
    for _ in range(WARM):
        run()
    times = []
    for _ in range(REPEATS):
        if not ON_GPU:
            begun = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - begun))
            continue
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return {"median_ms": statistics.median(times), "lowest_ms": min(times), "highest_ms": max(times)}


def shapes(width: int, layers: int) -> list[tuple[int, int]]:
    ffn = width * 11 // 4
    return ([(width, width)] * 4 + [(ffn, width)] * 2 + [(width, ffn)]) * layers


def floats(sizes: list[tuple[int, int]], dtype: torch.dtype) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(size, device=DEVICE, dtype=dtype) * 0.02) for size in sizes]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def on_grid(sizes: list[tuple[int, int]], grid: Grid, init: StepInit) -> list[nn.Parameter]:
    made = []
    for number, size in enumerate(sizes):
        noise = Noise.of(0, str(number), "start")
        made.append(nn.Parameter(normal_parameter(size, grid, 0.02, noise, init=init, device=DEVICE)))
        made[-1].grad = torch.randn(size, device=DEVICE, dtype=torch.bfloat16) * 1e-3
    return made


def update(width: int, layers: int, results: Path) -> None:
    """Write <results>/<device>/dqt_update_time.json, an entry as soon as it is measured."""
    sizes = shapes(width, layers)
    setting = {"parameters": sum(a * b for a, b in sizes), "tensors": len(sizes)}
    file = Ways("update_time", setting, within_limit, DEVICE, results)

    def add(name: str, step: Callable[[], object]) -> None:
        file.add(name, milliseconds(step))
        print(name, file.ways[name], flush=True)

    for dtype in (torch.bfloat16, torch.float32):
        add(f"torch fused AdamW, {str(dtype).removeprefix('torch.')}",
            torch.optim.AdamW(floats(sizes, dtype), lr=1e-4, fused=True).step)  # fmt: skip
    clear()
    for grid_name, grid in GRIDS.items():
        params = on_grid(sizes, grid, StepInit())  # each optimizer goes on from where the last one left them
        for name, make in OURS.items():
            add(f"{grid_name} {name}", make(params).step)
            clear()
    add("int8 per channel AdamW8bit", optim.AdamW8bit(on_grid(sizes, GRIDS["int8"], CHANNEL)).step)
    add("int8 Adafactor, not fused", ADAFACTOR(on_grid(sizes, GRIDS["int8"], StepInit())).step)
    file.tell()


def within_limit(ways: Mapping[str, Any]) -> list[Check]:
    """Of all grids, under AdamW with exact, 8-bit and 4-bit moments, the slowest."""
    ours = {f"{grid} {name}" for grid in GRIDS for name in ("AdamW", "AdamW8bit", "AdamW4bit")}
    found = {name: ways[name]["median_ms"] for name in sorted(ours & ways.keys())}
    if BASE not in ways or not found:
        return []
    slowest, theirs = max(found, key=lambda name: found[name]), ways[BASE]["median_ms"]
    told = f"{slowest}: {found[slowest]:.2f} ms against {theirs:.2f} ms, {found[slowest] / theirs:.2f}x"
    statement = "the update of codes takes at most 1.5 times torch's fused AdamW of bfloat16 parameters"
    return [Check("H3", statement, told, found[slowest] <= 1.5 * theirs)]


def layer(tokens: int, width: int, results: Path) -> None:
    """A linear layer: bfloat16, codes cast to it, codes on integer units; <results>/<device>/dqt_layer_time.json."""
    ffn = width * 43 // 16
    file = Ways("layer_time", {"tokens": tokens, "in": width, "out": ffn}, equal, DEVICE, results)
    generator = torch.Generator(DEVICE).manual_seed(0)
    x = torch.randn(tokens, width, device=DEVICE, dtype=torch.bfloat16, generator=generator, requires_grad=True)
    weight = torch.randn(ffn, width, device=DEVICE, dtype=torch.bfloat16, generator=generator) * 0.02
    g = torch.randn(tokens, ffn, device=DEVICE, dtype=torch.bfloat16, generator=generator)
    add = _adder(file, x, g)
    add("bfloat16", _linear(weight))
    for name, grid in GRIDS.items():
        both = (Execution.SIMULATED, Execution.NATIVE)
        ways = {e: grid_linear_(_linear(weight), grid, execution=e) for e in both}
        a, b = (made(x).detach().float() for made in ways.values())
        # Where sums cancel, float32's error in them counts, not the output's own size.
        gap = (a - b).abs() / a.abs().clamp_min(1e-3 * float(a.abs().max()))
        for execution, made in ways.items():
            add(
                f"{name} {execution.value}", made, difference=float(gap.max()), unequal=float((gap > 0).double().mean())
            )
    file.tell()


def _linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight.clone())
    return made


def _adder(file: Ways, x: torch.Tensor, g: torch.Tensor) -> Callable[..., None]:
    def add(name: str, module: nn.Module, **more: float) -> None:
        forward = milliseconds(lambda: module(x))

        def both() -> None:
            x.grad = None
            module.zero_grad()
            module(x).backward(g)

        file.add(name, {"forward_ms": forward["median_ms"], "both_ms": milliseconds(both)["median_ms"]} | more)
        print(name, file.ways[name], flush=True)

    return add


def equal(ways: Mapping[str, Any]) -> list[Check]:
    differences = [found["difference"] for found in ways.values() if "difference" in found]
    if not differences:
        return []
    statement = "with codes cast to bfloat16 and on integer units, outputs differ by one rounding to bfloat16 at most"
    return [Check("H4", statement, f"largest relative difference {max(differences):.2e}", max(differences) <= 2**-7)]
