# SPDX-License-Identifier: Apache-2.0
"""`memory`: bytes a parameter of a real step, by CUDA's allocator; `largest`: the largest model that one GPU trains.

`memory` takes steps of few tokens, so that activations are nothing beside weights, gradients and states: what the
allocator held at the peak, over the number of parameters. Includes every temporary of a layer and of the update.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from experiments.direct_quantized_training.device import DEVICE, clear, measured
from experiments.direct_quantized_training.model import Shape
from experiments.direct_quantized_training.results import Check, Ways
from experiments.direct_quantized_training.ways import WAYS, Trained
from lowbits.data import TokenData
from lowbits.errors import RunError

MIDDLE = Shape(32_000, 4096, 11_008, 32, 32, recompute=True, sub_norms=False)
"""Llama 7B: embedding and head, which stay bfloat16, are 4 % of it."""
WIDE = Shape(32_000, 8192, 22_016, 40, 64, recompute=True, sub_norms=False)
"""The width of a 65B model; 40 layers are 32.9 billion parameters. `largest` looks for the number of layers."""
WARMUP = 10  # steps of `pretrain`
LIMITS = {"int8 AdamW8bit": 3.2, "ternary AdamW8bit": 2.5, "ternary AdamW4bit": 1.5}
FEW = (2, 5)  # layers from whose peaks `largest` tells that of any number


def bytes_a_parameter(names: Sequence[str], shape: Shape, results: Path) -> None:
    """Write <results>/<device>/dqt_memory.json, an entry as soon as it is measured."""
    file = Ways("memory", {"shape": asdict(shape), "tokens": 33}, within_limits, DEVICE, results)
    for name in names:
        found = steps(name, shape, 33, 3)
        file.add(name, found)
        print(f"{name}: {found}", flush=True)
    file.tell()


def within_limits(ways: Mapping[str, Any]) -> list[Check]:
    claims = []
    for name, limit in LIMITS.items():
        found = ways.get(name, {}).get("bytes_a_parameter")
        if found is not None:
            claims.append(Check(f"bytes {name}", f"at most {limit} bytes a parameter", f"{found:.3f}", found <= limit))
    return claims


def steps(name: str, shape: Shape, tokens: int, count: int) -> dict[str, Any]:
    """Take steps: the allocator's peak in the last, and what stays after it, over the number of parameters."""
    free, trained = clear(), None
    try:
        with measured() as building:
            trained = WAYS[name](shape, False)
        ids = torch.randint(0, shape.vocab, (1, tokens), device=DEVICE)
        for _ in range(count):
            with measured() as span:
                trained.step(ids)
        parameters = trained.parameters
    except ImportError as error:
        return {"not measured": f"{error.name} is not installed"}
    except torch.OutOfMemoryError:
        return {"not measured": "out of memory"}
    except RuntimeError as error:  # a peer that does not run here must not cost the others their turn
        return {"not measured": f"fails: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}"}
    finally:
        if trained is not None:
            trained.close()
        del trained
        clear()
    return {
        "parameters": parameters, "peak_bytes": span.peak, "resident_bytes": span.resident, "free_bytes": free,
        "bytes_a_parameter": span.peak / parameters, "resident_bytes_a_parameter": span.resident / parameters,
        "step_seconds": span.seconds, "built_in_seconds": building.seconds,
    }  # fmt: skip


def largest(names: Sequence[str], shape: Shape, tokens: int, results: Path) -> None:
    """The most layers whose training step fits, by trying: two steps each; an entry as soon as it is known."""
    setting = {"shape": asdict(replace(shape, layers=0)), "tokens": tokens}
    file = Ways("largest", setting, lambda _: [], DEVICE, results)
    for name in names:
        begin = time.perf_counter()
        found = search(name, shape, tokens)
        allocator = os.environ.get("PYTORCH_ALLOC_CONF", "")
        file.add(name, found | {"seconds": round(time.perf_counter() - begin, 1), "allocator": allocator})
        print(f"{name}: {file.ways[name]}", flush=True)
    file.tell()


def search(name: str, shape: Shape, tokens: int) -> dict[str, Any]:
    """Peaks are a line in the number of layers: begin at the number that two small models tell, and go on in 2 %."""
    small = [steps(name, replace(shape, layers=layers), tokens, 2) for layers in FEW]
    for found in small:
        if "not measured" in found:
            return found
    slope = (small[1]["peak_bytes"] - small[0]["peak_bytes"]) / (FEW[1] - FEW[0])
    room = small[0]["free_bytes"] - small[0]["peak_bytes"] + slope * FEW[0]
    guess = max(1, int(room / slope)) if slope > 0 else FEW[1]  # a CPU counts nothing
    stride, layers, best, failed = max(1, guess // 50), guess, dict[str, Any](), False
    for _ in range(6):
        found = steps(name, replace(shape, layers=layers), tokens, 2)
        if "not measured" in found:
            failed = True
            if best:
                break
            layers -= stride
        else:
            best = found | {"layers": layers}
            if failed:
                break
            layers += stride
    return {**best, "told_by_small_models": guess, "stride": stride, "found": bool(best) and failed}


def pretrain(data: Path, shape: Shape, told: Mapping[str, Any], results: Path) -> None:
    """Full training steps on real text at the chosen size; loss and peak of every step are printed and written."""
    tokens, way, peaks = TokenData.open(data), str(told["way"]), {True: told["lr"], False: told["other_lr"]}
    if tokens.vocab_size > shape.vocab:
        shape = replace(shape, vocab=-(-tokens.vocab_size // 8) * 8)
    if told["steps"] < 1:
        raise RunError(f"pretrain: at least one step, got {told['steps']}.")
    with measured() as building:
        trained: Trained = WAYS[way](shape, True)
    size = trained.parameters / 1e9
    print(f"{size:.2f}B parameters in {building.seconds:.0f} s, {building.resident / 2**30:.1f} GiB", flush=True)
    file = Ways("pretrain", {"data": tokens.fingerprint}, falling, DEVICE, results)
    losses, seconds = list[float](), list[float]()
    content: dict[str, Any] = {
        "shape": asdict(shape), "parameters": trained.parameters, **told, "losses": losses, "step_seconds": seconds,
        "peak_bytes": 0, "built_in_seconds": building.seconds, "built_peak_bytes": building.peak,
    }  # fmt: skip
    for step in range(told["steps"]):
        for group in trained.groups:
            group["lr"] = peaks[group.get("codes", False)] * min(1.0, (step + 1) / WARMUP)
        ids = tokens.batch("train", step, batch_size=told["sequences"], block=told["length"], seed=0).to(DEVICE)
        with measured() as span:
            loss = trained.step(ids)
        losses.append(float(loss))
        seconds.append(span.seconds)
        content["peak_bytes"] = peak = max(content["peak_bytes"], span.peak)
        print(f"step {step}: loss {losses[-1]:.4f}, {span.seconds:.2f} s, peak {peak / 2**30:.1f} GiB", flush=True)
        file.add(f"{way}, {size:.1f}B", content)
    trained.close()
    file.tell()


def falling(ways: Mapping[str, Any]) -> list[Check]:
    claims = []
    for name, run in ways.items():
        few = max(1, min(5, len(run["losses"]) // 2))
        first, last = sum(run["losses"][:few]) / few, sum(run["losses"][-few:]) / few
        claims += [
            Check(f"size, {name}", "at least 30 billion parameters", f"{run['parameters'] / 1e9:.2f}B",
                  run["parameters"] >= 30e9),
            Check(f"loss, {name}", f"{len(run['losses'])} steps: the mean of the last five losses is below that of the "
                  "first five", f"{first:.3f} -> {last:.3f}", last < first),
        ]  # fmt: skip
    return claims
