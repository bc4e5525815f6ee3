# SPDX-License-Identifier: Apache-2.0
"""What does it cost to measure the errors of every operand of every layer, in the time of a training step?

    python benchmarks/telemetry.py                      # gpt2-nano on a CPU, gpt2-small on CUDA
    python benchmarks/telemetry.py --compile            # compiled runs measure in an eager pass of their own

Ordinary and sampled steps take turns; the medians of each, and the share of training time that sampling every 100
steps takes. On CUDA, how often the host waits for the device within a step, too: sampling must not add to it but for
the one transfer at its end. Writes benchmarks/results/<device>/telemetry.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbits import models
from lowbits.analysis import causal_loss, device_name, provenance
from lowbits.nn import convert_, set_step_
from lowbits.optim import AdamW, param_groups
from lowbits.recipes import named
from lowbits.train._monitor import Sample

RESULTS = Path(__file__).parent / "results"
RECIPES = ("w8a8", "int8_rowwise", "nvfp4")
EVERY = 100
VOCABULARY = {"cpu": 4096, "cuda": 50257}


class Step:
    """One optimizer step of a model under a recipe, as `lowbits.train` takes it."""

    def __init__(self, settings: argparse.Namespace, recipe: str, device: torch.device) -> None:
        vocabulary = VOCABULARY[device.type]
        self.model = models.build(settings.model, vocabulary, settings.block, seed=0).to(device)  # type: ignore[arg-type]
        convert_(self.model, named(recipe), verbose=False)
        self.optimizer = AdamW(param_groups(self.model, 0.1), lr=6e-4)
        self.ids = torch.randint(0, vocabulary, (settings.batch, settings.block), device=device)
        self.compiled, self.device, self.number = settings.compile, device, 0
        if self.compiled:
            for module in self.model.modules():
                if type(module).__name__ == "GPT2Block":
                    module.compile()

    def loss(self) -> Tensor:
        set_step_(self.model, self.number)
        with torch.autocast(self.device.type, torch.bfloat16):
            return causal_loss(self.model, self.ids)

    def take(self, sample: Sample | None) -> None:
        """Take the step; the sums of a sample stay on the device."""
        if sample is not None and self.compiled:
            sample.measure_apart(self.loss)
        with nullcontext() if sample is None or self.compiled else sample.watching():
            loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.number += 1

    def timed(self, sampled: bool) -> float:
        """Milliseconds of a step, transfer included."""
        wait = torch.cuda.synchronize if self.device.type == "cuda" else lambda: None
        wait()
        start = time.perf_counter()
        sample = Sample(self.model) if sampled else None
        self.take(sample)
        if sample is not None:
            sample.transfer()
        wait()
        return (time.perf_counter() - start) * 1e3

    def waits(self, sampled: bool) -> int:
        """How often the host waits for the device within a step, the transfer left out."""
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                self.take(Sample(self.model) if sampled else None)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(warning.message) for warning in caught)


def measure(settings: argparse.Namespace, recipe: str, device: torch.device) -> dict[str, object]:
    """Time ordinary and sampled steps, taking turns so that both see the same machine."""
    step = Step(settings, recipe, device)
    for sampled in (False, True) * 2:
        step.timed(sampled)
    pairs = [(step.timed(False), step.timed(True)) for _ in range(settings.repeats)]
    ordinary, sampled = (statistics.median(column) for column in zip(*pairs, strict=True))
    extra = statistics.median(b - a for a, b in pairs)
    result: dict[str, object] = {
        "step_ms": ordinary,
        "sampled_step_ms": sampled,
        "extra_ms": extra,
        "extra_ms_range": [min(b - a for a, b in pairs), max(b - a for a, b in pairs)],
        "share_of_training_time": extra / (EVERY * ordinary),
    }
    if device.type == "cuda":
        result["waits"] = {"ordinary": step.waits(False), "sampled": step.waits(True)}
    return result


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-small" if on_cuda else "gpt2-nano")
    parser.add_argument("--batch", type=int, default=8 if on_cuda else 16)
    parser.add_argument("--block", type=int, default=1024 if on_cuda else 128)
    parser.add_argument("--repeats", type=int, default=15 if on_cuda else 9)
    parser.add_argument("--compile", action="store_true", help="compile the blocks")
    settings = parser.parse_args()
    device = torch.device("cuda" if on_cuda else "cpu")
    path = RESULTS / device_name(device) / "telemetry.json"
    found = json.loads(path.read_text(encoding="utf-8")).get("recipes", {}) if path.exists() else {}
    for recipe in RECIPES:
        key = f"{recipe}, {'compiled' if settings.compile else 'eager'}"
        found[key] = measure(settings, recipe, device)
        row = found[key]
        print(f"{key:24} step {row['step_ms']:8.1f} ms, sampled {row['sampled_step_ms']:8.1f} ms, "
              f"{row['share_of_training_time']:.2%} of training time", flush=True)  # fmt: skip
        shape = {key: getattr(settings, key) for key in ("model", "batch", "block", "repeats")} | {"every": EVERY}
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"provenance": provenance(device), "shape": shape, "recipes": found}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
