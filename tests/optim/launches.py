# SPDX-License-Identifier: Apache-2.0
"""Cases that hold the kernels of an optimizer step to the eager definition, bit for bit.

Run as a program, on CUDA, or on a CPU under Triton's interpreter:

    TRITON_INTERPRET=1 python -m tests.optim.launches [CASE ...]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lowbits.kernels.optimizer  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits import optim
from lowbits.formats import DYNAMIC4, DYNAMIC8, E4M3, INT8, UDYNAMIC8, UINT8_NO_ZERO, ULINEAR4
from lowbits.nn import Grid, QParameter, StepInit, quantize_parameter
from lowbits.optim import AdamW, Blockwise, CodecOptimizer, GlobalNorm, _compiled, _launched, _multi_tensor
from lowbits.quantizers import Rounding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Whole tiles, a rest, a tensor that keeps float32 moments, rows of odd length. Smaller ones where interpreted.
SHAPES = [(96, 64), (5000,), (100,), (257, 33), (64, 256)] if DEVICE == "cuda" else [(64, 64), (4100,), (100,)]
Make = Callable[[list[nn.Parameter]], CodecOptimizer]
Start = Callable[[Tensor], nn.Parameter]


def gradient(p: Tensor, generator: torch.Generator) -> Tensor:
    """Many magnitudes, so that codes of every decade occur."""
    spread = 10 ** (torch.randn(p.shape, generator=generator) * 0.5 - 2)
    return (torch.randn(p.shape, generator=generator) * spread).to(p.dtype).to(p.device)


def floats(dtype: torch.dtype) -> Start:
    """Start from parameters of floats."""
    return lambda x: nn.Parameter(x.to(dtype).to(DEVICE))


def codes(grid: Grid, init: StepInit) -> Start:
    """Start from parameters of codes."""
    return lambda x: nn.Parameter(quantize_parameter(x.to(DEVICE), grid, init))


def differences(make: Make, start: Start, shapes: list[tuple[int, ...]], steps: int) -> Iterator[str]:
    """Run launched and eager steps side by side and say where they differ."""
    generator = torch.Generator().manual_seed(1)
    first = [start(torch.randn(s, generator=generator) * 0.1) for s in shapes]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    launched, eager = make(first), make(second)
    for step in range(steps):
        for p, q in zip(first, second, strict=True):
            p.grad = gradient(p, generator)
            q.grad = p.grad.clone()
        with patch.object(_compiled, "update_", side_effect=AssertionError("not launched")):
            launched.step()
        with patch.object(_launched, "update_", lambda _, targets: targets):
            eager.step()
        for p, q, shape in zip(first, second, shapes, strict=True):
            pairs = {"parameter": tuple(x.codes if isinstance(x, QParameter) else x for x in (p, q))}
            pairs |= {k: (v, eager.state[q][k]) for k, v in launched.state[p].items()}
            for name, (x, y) in pairs.items():
                if not torch.equal(x, y):
                    yield f"step {step}, {shape}, {name}: {int((x != y).sum())} of {x.numel()}"


def adamw(first: Blockwise, second: Blockwise, **options: Any) -> Make:
    return lambda params: AdamW(params, lr=1e-2, weight_decay=0.1, first=first, second=second, **options)


def few_bits(name: str, **options: Any) -> Make:
    return lambda params: getattr(optim, name)(params, lr=1e-2, **options)


BOOKS = (Blockwise(DYNAMIC8), Blockwise(UDYNAMIC8))
CASES: dict[str, Make] = {
    "AdamW8bit": few_bits("AdamW8bit", weight_decay=0.1),
    "float32 moments": lambda params: AdamW(params, lr=1e-2),
    "clipped": few_bits("AdamW8bit", clip=GlobalNorm(0.05)),
    "blocks of 64": adamw(Blockwise(DYNAMIC8, 64), Blockwise(UDYNAMIC8, 64)),
    "blocks of 80": adamw(Blockwise(DYNAMIC8, 80), Blockwise(UDYNAMIC8, 80)),
    "blocks of 2048": adamw(Blockwise(DYNAMIC8, 2048), Blockwise(UDYNAMIC8, 2048)),
    "4 bits, blocks of 80": adamw(Blockwise(DYNAMIC4, 80), Blockwise(ULINEAR4, 80)),
    "linear": adamw(Blockwise(INT8), Blockwise(UINT8_NO_ZERO)),
    "AdamW4bit": few_bits("AdamW4bit"),
    "Adam8bit": few_bits("Adam8bit", weight_decay=0.1),
    "SGD8bit": few_bits("SGD8bit", momentum=0.9, weight_decay=0.1, dampening=0.5),
    "SGD8bit nesterov": few_bits("SGD8bit", momentum=0.9, nesterov=True),
    "RMSprop8bit": few_bits("RMSprop8bit", weight_decay=0.1),
    "Adagrad8bit": few_bits("Adagrad8bit", lr_decay=0.1, initial_accumulator_value=0.1),
    "Lion8bit": few_bits("Lion8bit", weight_decay=0.1),
    "AdEMAMix8bit": few_bits("AdEMAMix8bit", t_alpha=5, t_beta3=5, weight_decay=0.1),
}
"""Run with float32 parameters; those below with bfloat16 ones, which the interpreter rounds stochastically alone."""
ROUNDED: dict[str, Make] = {
    "stochastic": few_bits("AdamW8bit", rounding=Rounding.STOCHASTIC),
    "stochastic, blocks of 80": adamw(Blockwise(DYNAMIC8, 80), Blockwise(UDYNAMIC8, 80), rounding=Rounding.STOCHASTIC),
}
ON_GRIDS: dict[str, tuple[Make, Grid, StepInit]] = {
    f"{name}, {grid}{', per channel' if init.per_channel else ''}": (make, grid, init)
    for name, make, grid, init in (
        ("AdamW8bit", few_bits("AdamW8bit", weight_decay=0.1), Grid.of(8), StepInit()),
        ("AdamW8bit", few_bits("AdamW8bit"), Grid.of(1.58), StepInit(per_channel=True)),
        ("AdamW4bit", few_bits("AdamW4bit"), Grid.of(4), StepInit()),
        ("Lion8bit", few_bits("Lion8bit"), Grid.of(2), StepInit()),
        ("SGD8bit", few_bits("SGD8bit", momentum=0.9), Grid.of(3), StepInit(per_channel=True)),
        ("blocks of 80", adamw(Blockwise(DYNAMIC8, 80), Blockwise(UDYNAMIC8, 80)), Grid.of(1.58), StepInit()),
        ("float32 moments", CASES["float32 moments"], Grid.of(8, rounding=Rounding.NEAREST), StepInit()),
    )
}
"""Parameters of codes."""
ON_CUDA: dict[str, Make] = {
    "offloaded": few_bits("AdamW8bit", offload=True),
    "bfloat16": few_bits("AdamW8bit"),
    "AdamWFp8": few_bits("AdamWFp8"),
    "E4M3": adamw(Blockwise(E4M3), Blockwise(E4M3)),
}


def without_waiting() -> str | None:
    """Steps under a new learning rate each, clipped, while torch forbids to wait for the device."""
    params = [nn.Parameter(torch.randn(s, device=DEVICE)) for s in SHAPES]
    optimizer = optim.AdamW8bit(params, clip=GlobalNorm(1.0))
    for step in range(5):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step builds its tables
        optimizer.step()
    torch.cuda.set_sync_debug_mode("default")
    return None


def captured() -> str | None:
    """100 replays of a CUDA graph, with other gradients and another learning rate each, against ordinary steps."""
    first = [nn.Parameter(torch.randn(s, device=DEVICE, dtype=torch.bfloat16)) for s in SHAPES]
    second = [nn.Parameter(p.detach().clone()) for p in first]
    rates = [torch.tensor(1e-2, device=DEVICE) for _ in range(2)]
    replayed, ordinary = (
        optim.AdamW8bit(params, lr=rate, clip=GlobalNorm(1.0), rounding=Rounding.STOCHASTIC)
        for params, rate in zip((first, second), rates, strict=True)
    )
    for p, q in zip(first, second, strict=True):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    replayed.step()
    ordinary.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.step()
    for step in range(100):
        for p, q in zip(first, second, strict=True):
            p.grad.copy_(torch.randn_like(p))  # type: ignore[union-attr]
            q.grad.copy_(p.grad)  # type: ignore[union-attr, arg-type]
        for rate in rates:
            rate.fill_(1e-2 / (step + 1))
        graph.replay()
        ordinary.step()
    equal = [torch.equal(p, q) for p, q in zip(first, second, strict=True)]
    equal += [
        torch.equal(t, ordinary.state[q][name])
        for p, q in zip(first, second, strict=True) for name, t in replayed.state[p].items()
    ]  # fmt: skip
    return None if all(equal) else f"{equal.count(False)} of {len(equal)} tensors differ"


def in_backward() -> str | None:
    """Updates in the backward pass against ordinary steps, and the memory that they save."""
    models = [nn.Sequential(*[nn.Linear(2048, 2048, bias=False) for _ in range(16)]).to(DEVICE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optim.AdamW8bit(model.parameters(), lr=1e-3) for model in models]
    handle = optim.step_in_backward(models[0], optimizers[0])
    x, peaks = torch.randn(64, 2048, device=DEVICE), []
    for model, optimizer in zip(models, optimizers, strict=True):
        for _ in range(3):
            torch.cuda.reset_peak_memory_stats()
            resident = torch.cuda.memory_allocated()
            model(x).square().mean().backward()
            if optimizer is optimizers[1]:
                optimizer.step()
                optimizer.zero_grad()
        peaks.append((torch.cuda.max_memory_allocated() - resident) / 2**20)
    handle.remove()
    print(f"# peak above what stays: {peaks[0]:.0f} MiB in backward, {peaks[1]:.0f} MiB with all gradients")
    equal = all(torch.equal(p, q) for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True))
    return None if equal and peaks[0] < 0.5 * peaks[1] else f"equal: {equal}, peaks: {peaks}"


def main() -> None:
    steps = 3 if DEVICE == "cuda" else 2
    single, half = floats(torch.float32), floats(torch.bfloat16)
    plans = [(name, make, single, SHAPES, steps) for name, make in CASES.items()]
    plans += [(name, make, half, SHAPES, steps) for name, make in ROUNDED.items()]
    whole = [shape for shape in SHAPES if shape[-1] % 4 == 0]  # rows of codes end with a byte, or nothing is launched
    plans += [(name, make, codes(grid, init), whole, steps) for name, (make, grid, init) in ON_GRIDS.items()]
    if DEVICE == "cuda":
        plans += [(name, make, half, SHAPES, 3) for name, make in ON_CUDA.items()]
        plans += [
            (f"{name}, 4M", CASES[name], single, [(4096, 1024)], 20)
            for name in ("AdamW8bit", "AdEMAMix8bit", "AdamW4bit", "Lion8bit", "Adagrad8bit")
        ]
    wanted = sys.argv[1:]
    if DEVICE == "cpu":
        _multi_tensor._CHUNK = 1024  # the interpreter takes its time over empty ones
    failed = 0
    for name, make, start, shapes, steps in plans:
        if wanted and name not in wanted:
            continue
        found = next(differences(make, start, shapes, steps), None)
        failed += found is not None
        print(f"{name}: {found or 'equal'}", flush=True)
    for case in (without_waiting, captured, in_backward) if DEVICE == "cuda" and not wanted else ():
        found = case()
        failed += found is not None
        print(f"{case.__name__}: {found or 'equal'}", flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
