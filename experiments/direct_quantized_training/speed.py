# SPDX-License-Identifier: Apache-2.0
"""`update-time` (H3): the update against torch's fused AdamW; `layer-time` (H4): GEMMs of codes against bfloat16."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import nn

from experiments.direct_quantized_training.results import Check, write
from lowbits import optim
from lowbits.nn import Execution, Grid, grid_linear_, normal_parameter
from lowbits.optim import CodecOptimizer
from lowbits.quantizers import Noise

SHAPES = [(2048, 2048)] * 4 + [(5632, 2048)] * 2 + [(2048, 5632)]
LAYERS = 20
"""1.03 billion parameters in 140 tensors."""
GRIDS = {"int8": Grid.of(8), "int4": Grid.of(4), "ternary": Grid.of(1.58)}
OURS: dict[str, Callable[[list[nn.Parameter]], CodecOptimizer]] = {
    "AdamW": lambda p: optim.AdamW(p),
    "AdamW8bit": lambda p: optim.AdamW8bit(p),
    "AdamW4bit": lambda p: optim.AdamW4bit(p),
    "Lion8bit": lambda p: optim.Lion8bit(p),
    "SGD8bit": lambda p: optim.SGD8bit(p, momentum=0.9),
}
REPEATS, WARM = 20, 5


def milliseconds(run: Callable[[], object]) -> dict[str, float]:
    """Median and spread of single calls, by CUDA events, after warm ones."""
    for _ in range(WARM):
        run()
    times = []
    for _ in range(REPEATS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    low, high = min(times), max(times)
    return {"median_ms": statistics.median(times), "lowest_ms": low, "highest_ms": high}


def floats(dtype: torch.dtype) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.randn(s, device="cuda", dtype=dtype) * 0.02) for s in SHAPES * LAYERS]
    for p in made:
        p.grad = torch.randn_like(p) * 1e-3
    return made


def on_grid(grid: Grid, per_channel: bool = False) -> list[nn.Parameter]:
    from lowbits.nn import StepInit

    made = []
    for number, shape in enumerate(SHAPES * LAYERS):
        noise, init = Noise.of(0, str(number), "start"), StepInit(per_channel=per_channel)
        made.append(nn.Parameter(normal_parameter(shape, grid, 0.02, noise, init=init, device="cuda")))
        made[-1].grad = torch.randn(shape, device="cuda", dtype=torch.bfloat16) * 1e-3
    return made


def update() -> None:
    """Write benchmarks/results/<device>/dqt_update_time.json."""
    found: dict[str, dict[str, float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        params = floats(dtype)
        step = torch.optim.AdamW(params, lr=1e-4, fused=True).step
        found[f"torch fused AdamW, {str(dtype).removeprefix('torch.')}"] = milliseconds(step)
        del params, step
        torch.cuda.empty_cache()
    for grid_name, grid in GRIDS.items():
        for name, make in OURS.items():
            params = on_grid(grid)
            found[f"{grid_name} {name}"] = milliseconds(make(params).step)
            print(grid_name, name, found[f"{grid_name} {name}"], flush=True)
            del params
            torch.cuda.empty_cache()
    params = on_grid(Grid.of(8), per_channel=True)
    found["int8 per channel AdamW8bit"] = milliseconds(optim.AdamW8bit(params).step)
    theirs = found["torch fused AdamW, bfloat16"]["median_ms"]
    worst = max(found[f"{grid} {name}"]["median_ms"] for grid in GRIDS for name in ("AdamW", "AdamW8bit", "AdamW4bit"))
    count = sum(p.numel() for p in params)
    claim = Check("H3", "the update of codes takes at most 1.5 times torch's fused AdamW of bfloat16 parameters",
                  f"{worst:.2f} ms against {theirs:.2f} ms", worst <= 1.5 * theirs)  # fmt: skip
    write("update_time", {"parameters": count, "tensors": len(params), "ways": found}, [claim], torch.device("cuda"))


def layer() -> None:
    """One layer of 4096 x 11008 on 8192 tokens: bfloat16, codes cast to it, codes on integer units."""
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.manual_seed(0)
    plain = nn.Linear(4096, 11_008, bias=False, device="cuda", dtype=torch.bfloat16)
    layers: dict[str, nn.Module] = {"bfloat16": plain}
    for name, grid in GRIDS.items():
        for execution in Execution:
            made = nn.Linear(4096, 11_008, bias=False, device="cuda", dtype=torch.bfloat16)
            made.weight = nn.Parameter(plain.weight.detach().clone())
            layers[f"{name} {execution.value}"] = grid_linear_(made, grid, execution=execution)
    found: dict[str, dict[str, float]] = {}
    for name, module in layers.items():
        y = module(x)
        g = torch.randn_like(y)
        forward = milliseconds(lambda m=module: m(x))

        def both(m: nn.Module = module, g: torch.Tensor = g) -> None:
            m(x).backward(g)

        found[name] = {"forward_ms": forward["median_ms"], "both_ms": milliseconds(both)["median_ms"]}
        print(name, found[name], flush=True)
    worst = 0.0
    for name in GRIDS:
        a, b = (layers[f"{name} {execution.value}"](x).float() for execution in Execution)
        worst = max(worst, float(((a - b).abs() / a.abs().clamp_min(1e-3)).max()))
    claim = Check("H4", "simulated and on integer units, outputs are equal up to bfloat16's rounding (2^-8)",
                  f"largest relative difference {worst:.2e}", worst <= 2**-7)  # fmt: skip
    write("layer_time", {"tokens": 8192, "in": 4096, "out": 11_008, "ways": found}, [claim], torch.device("cuda"))
