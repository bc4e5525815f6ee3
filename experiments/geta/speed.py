# SPDX-License-Identifier: Apache-2.0
"""`graph`: time to trace a model of 7B parameters; `overhead`: a step of the joint stage over a plain one (A20)."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.checks import Check
from experiments.eightbit_optimizers.classifiers import Block
from experiments.geta.runs import write
from lowbits import models
from lowbits.methods import geta

MINUTE, RATIO = 60.0, 1.3
ROUNDS, STEPS = 7, 5
"""Plain and joint steps take turns in blocks, since the speed of a host changes; the median of their ratios counts."""


def graph(results: Path) -> Path:
    """Trace llama-7b on the meta device, in a process that has imported everything."""
    from transformers import AutoModelForCausalLM

    rows = []
    for name in ("llama-110m", "llama-7b"):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(models.config(name, 32000, 2048), attn_implementation="sdpa")
        begun = time.perf_counter()
        found = geta.trace(model, (), {"input_ids": torch.zeros(2, 7, dtype=torch.long, device="meta")})
        rows.append({
            "model": name, "parameters": sum(p.numel() for p in model.parameters()), "units": found.units,
            "dimensions": len(found.dimensions), "seconds": round(time.perf_counter() - begun, 1),
        })  # fmt: skip
        print(rows[-1], flush=True)
    words = f"{rows[-1]['seconds']} s, {rows[-1]['parameters']:,} parameters"
    check = Check("graph", "a 7B model is traced in under a minute", words, rows[-1]["seconds"] < MINUTE)
    return write("graph", {"rows": rows}, [check], torch.device("cpu"), results)


def overhead(results: Path, device: torch.device) -> Path:
    """Time steps of a plain network and of the same one in the joint stage; write after every network."""
    rows: list[dict[str, Any]] = []
    path = Path()
    for subject in subjects(device):
        rows.append(measured(subject))
        print(rows[-1], flush=True)
        claims = [
            Check("A20", f"a step of the joint stage at most {RATIO} times a plain one, {r['model']}",
                  f"{r['plain_ms']:.1f} and {r['joint_ms']:.1f} ms: {r['ratio']:.2f}; optimizer's part "
                  f"{r['optimizer_ms']:.1f} and {r['joint_optimizer_ms']:.1f} ms", r["ratio"] <= RATIO)
            for r in rows
        ]  # fmt: skip
        path = write("overhead", {"rows": rows}, claims, device, results)
        gc.collect()
    return path


class Subject(NamedTuple):
    """A network and a batch for it."""

    name: str
    model: nn.Module
    inputs: dict[str, Tensor]
    labels: Tensor


def subjects(device: torch.device) -> Iterator[Subject]:
    """Yield a deep perceptron, ResNet-20 and a Llama, small on a CPU."""
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    width, batch = (1024, 4096) if cuda else (128, 256)
    layers = [layer for _ in range(100) for layer in (nn.Linear(width, width), nn.ReLU())]
    x = torch.randn(batch, width, device=device)
    zeros = torch.zeros(batch, dtype=torch.long, device=device)
    yield Subject("100 linear layers", nn.Sequential(*layers, nn.Linear(width, 10)).to(device), {"input": x}, zeros)
    size, block, batch = ("llama-134m", 1024, 16) if cuda else ("llama-15m", 128, 2)
    llama = models.build(size, vocab_size=32000, block=block, seed=0).to(device)  # type: ignore[arg-type]
    ids = torch.randint(0, 32000, (batch, block), device=device)
    yield Subject(f"{size}, {batch} x {block} tokens", llama, {"input_ids": ids}, ids.flatten())
    widths = [16, 16, 16, 16, 32, 32, 32, 64, 64, 64]
    blocks = [Block(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    stem = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()
    resnet = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)).to(device)
    batch = 2048 if cuda else 32
    x = torch.randn(batch, 3, 32, 32, device=device)
    yield Subject(f"ResNet-20, batch of {batch}", resnet, {"input": x}, torch.zeros(batch, dtype=torch.long).to(device))


def measured(subject: Subject) -> dict[str, Any]:
    """Return milliseconds a step, of the optimizer alone, and of the step that chooses units."""
    model, inputs, labels = subject.model, subject.inputs, subject.labels
    example = {key: value[:2, :7] if value.dtype == torch.long else value[:2] for key, value in inputs.items()}
    traced, joint = geta.trace(model, (), example), copy.deepcopy(model)
    wait = torch.cuda.synchronize if labels.is_cuda else lambda: None
    geta.quantize_(joint)
    qasso = geta.Qasso(joint, traced, geta.Target(0.5, 4, 8), geta.Schedule(0, 5, 10_000, 1, periods=10))
    plain_step = training(model, inputs, labels)
    joint_step = training(joint, inputs, labels, qasso.attach)
    timed(plain_step, 5, wait)
    timed(joint_step, 5, wait)
    choosing = timed(joint_step, 1, wait)
    timed(joint_step, 3, wait)
    assert qasso.moment.stage is geta.Stage.JOINT
    pairs = [(timed(plain_step, STEPS, wait), timed(joint_step, STEPS, wait)) for _ in range(ROUNDS)]
    parts = [(alone(plain_step, wait), alone(joint_step, wait)) for _ in range(5)]
    return {
        "model": subject.name, "units": traced.units, "plain_ms": statistics.median(a for a, _ in pairs),
        "joint_ms": statistics.median(b for _, b in pairs), "ratio": statistics.median(b / a for a, b in pairs),
        "ratios": [round(b / a, 3) for a, b in pairs], "choosing_ms": choosing,
        "optimizer_ms": statistics.median(a for a, _ in parts),
        "joint_optimizer_ms": statistics.median(b for _, b in parts),
    }  # fmt: skip


Step = Callable[..., None]


def training(
    model: nn.Module, inputs: dict[str, Tensor], labels: Tensor, attach: Callable[[Any], None] = lambda _: None
) -> Step:
    """Return a step of training, under autocast on CUDA; it calls what it is given before and after the optimizer."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)
    attach(optimizer)

    def step(before: Callable[[], None] = lambda: None, after: Callable[[], None] = lambda: None) -> None:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.is_cuda):
            out = model(**inputs)
            logits = out if isinstance(out, Tensor) else out.logits.flatten(0, 1)
            loss = cross_entropy(logits.float(), labels)
        loss.backward()
        before()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def timed(step: Step, times: int, wait: Callable[[], None]) -> float:
    """Return milliseconds a step, the device waited for at both ends alone."""
    wait()
    begun = time.perf_counter()
    for _ in range(times):
        step()
    wait()
    return 1e3 * (time.perf_counter() - begun) / times


def alone(step: Step, wait: Callable[[], None]) -> float:
    """Return milliseconds of the optimizer's part of a step."""
    at: list[float] = []

    def note() -> None:
        wait()
        at.append(time.perf_counter())

    step(note, note)
    return 1e3 * (at[1] - at[0])
