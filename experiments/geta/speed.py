# SPDX-License-Identifier: Apache-2.0
"""`graph`: time to trace a model of 7B parameters; `overhead`: a step of the joint stage over a plain one (A20)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.geta.runs import Check, write
from lowbits import models
from lowbits.methods import geta

MINUTE, RATIO = 60.0, 1.3


def graph() -> Path:
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
    return write("graph", {"rows": rows}, [check], torch.device("cpu"))


def overhead() -> Path:
    """Time steps of a plain network, and of the same one in each stage."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    rows = [row(name, model, inputs, labels) for name, model, inputs, labels in subjects(device)]
    checks = [
        Check("A20", f"a step of the joint stage at most {RATIO} times a plain one, {r['model']}",
              f"{r['plain_ms']:.1f} and {r['joint_ms']:.1f} ms: {r['ratio']:.2f}; optimizer's part "
              f"{r['optimizer_ms']:.1f} and {r['joint_optimizer_ms']:.1f} ms", r["ratio"] <= RATIO)
        for r in rows
    ]  # fmt: skip
    return write("overhead", {"rows": rows}, checks, device)


def subjects(device: torch.device) -> list[tuple[str, nn.Module, dict[str, torch.Tensor], torch.Tensor]]:
    """A deep perceptron on any device; a Llama on a GPU."""
    torch.manual_seed(0)
    width, batch = (1024, 4096) if device.type == "cuda" else (128, 256)
    layers = [layer for _ in range(100) for layer in (nn.Linear(width, width), nn.ReLU())]
    deep = nn.Sequential(*layers, nn.Linear(width, 10)).to(device)
    found = [("100 linear layers", deep, {"input": torch.randn(batch, width, device=device)},
              torch.zeros(batch, dtype=torch.long, device=device))]  # fmt: skip
    if device.type == "cuda":
        llama = models.build("llama-134m", vocab_size=32000, block=1024, seed=0).to(device)
        ids = torch.randint(0, 32000, (16, 1024), device=device)
        found.append(("llama-134m, 16 x 1024 tokens", llama, {"input_ids": ids}, ids.flatten()))
    return found


def row(name: str, model: nn.Module, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> dict[str, object]:
    """Return milliseconds a step, whole and of the optimizer alone."""
    example = {key: value[:2, :7] if value.dtype == torch.long else value[:2] for key, value in inputs.items()}
    traced = geta.trace(model, (), example)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def backward() -> None:
        with torch.autocast(labels.device.type, torch.bfloat16, enabled=labels.device.type == "cuda"):
            out = model(**inputs)
            logits = out if isinstance(out, torch.Tensor) else out.logits.flatten(0, 1)
            loss = cross_entropy(logits.float(), labels)
        loss.backward()

    plain, plain_optimizer = timed(backward, optimizer, labels.device)
    geta.quantize_(model)
    fresh = torch.optim.AdamW(model.parameters(), 1e-4)
    qasso = geta.Qasso(model, traced, geta.Target(0.5, 4, 8), geta.Schedule(0, 5, 10_000, 1, periods=10))
    qasso.attach(fresh)
    for _ in range(6):  # the fifth begins the joint stage
        backward()
        fresh.step()
        fresh.zero_grad()
    joint, joint_optimizer = timed(backward, fresh, labels.device)
    assert qasso.moment.stage is geta.Stage.JOINT
    return {"model": name, "plain_ms": plain, "joint_ms": joint, "ratio": joint / plain, "units": traced.units,
            "optimizer_ms": plain_optimizer, "joint_optimizer_ms": joint_optimizer}  # fmt: skip


def timed(backward: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device) -> tuple[float, float]:
    """Return the median time of a step and of the optimizer's part, of 20 after 5."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    whole, part = [], []
    for _ in range(25):
        wait()
        begun = time.perf_counter()
        backward()
        wait()
        middle = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        whole.append(1e3 * (time.perf_counter() - begun))
        part.append(1e3 * (time.perf_counter() - middle))
    return statistics.median(whole[5:]), statistics.median(part[5:])
