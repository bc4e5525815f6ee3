# SPDX-License-Identifier: Apache-2.0
"""What a recipe costs in time, GEMM by GEMM and for a whole training step: H4, H5, H7 of the study.

    python benchmarks/linear_recipes.py                 # on whatever device there is
    python benchmarks/linear_recipes.py --model gpt2-nano --batch 4 --block 128 --compile

Every figure is a median over repeats in one process, and every ratio is against bf16 in the same run. Simulated recipes
are said to be simulated: they show the price of looking, not a speed-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lowbits import models
from lowbits.analysis import causal_loss, provenance
from lowbits.formats import E4M3, INT8
from lowbits.kernels import Coded, Execution, quantize_both, scaled_mm
from lowbits.nn import Recipe, convert_
from lowbits.optim import AdamW, param_groups
from lowbits.quantizers import PerRow, QuantSpec
from lowbits.recipes import named

SIZES = {"cuda": (4096, 8192), "cpu": (1024,)}


def median_ms(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median wall time of `work` in milliseconds, the device idle before and after each."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def coded(x: torch.Tensor, spec: QuantSpec) -> Coded:
    """What a GEMM that contracts the last axis multiplies."""
    found, _ = quantize_both(x, spec, None, None, None)
    assert found is not None
    return found


def gemms(device: torch.device, repeats: int) -> list[dict[str, object]]:
    """H4: M = N = K; bf16, and INT8 and FP8 with quantization of both operands and the epilogue included."""
    rows = []
    for n in SIZES[device.type]:
        x, w = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        base = median_ms(lambda x=x, w=w: x @ w.t(), device, repeats)
        row: dict[str, object] = {"size": n, "bf16_ms": base}
        formats = [("int8", INT8)] + ([("e4m3", E4M3)] if device.type == "cuda" else [])
        for name, fmt in formats:
            spec = QuantSpec(fmt, PerRow())

            def multiply(x: torch.Tensor = x, w: torch.Tensor = w, spec: QuantSpec = spec) -> torch.Tensor:
                return scaled_mm(coded(x, spec), coded(w, spec), torch.bfloat16)

            fused = torch.compile(multiply)
            q_x, q_w = coded(x, spec), coded(w, spec)
            row[f"{name}_gemm_ms"] = median_ms(lambda a=q_x, b=q_w: scaled_mm(a, b, torch.bfloat16), device, repeats)
            row[f"{name}_with_quantize_ms"] = median_ms(multiply, device, repeats)
            row[f"{name}_with_quantize_compiled_ms"] = median_ms(fused, device, repeats)
        print(row, flush=True)
        rows.append(row)
    return rows


def recipes(device: torch.device) -> dict[str, Recipe]:
    """The arms: simulated weights and activations, and what this device runs natively."""
    w8a8 = named("w8a8")
    arms = {
        "bf16": named("bf16"), "w8a8 (native fprop)": replace(w8a8, execution=Execution.NATIVE),
        "int8_rowwise_native": named("int8_rowwise_native"),
    }  # fmt: skip
    if device.type == "cuda":
        arms |= {name: named(name) for name in ("fp8_tensorwise_native", "fp8_rowwise_native")}
    arms |= {name: named(name) for name in ("w8_tensor", "w8_channel", "w8a8", "w8a8_faithful", "int8_rowwise")}
    if device.type == "cuda":
        arms["fp8_rowwise"] = named("fp8_rowwise")
    return arms


def training_step(arm: Recipe, settings: argparse.Namespace, device: torch.device, compiled: bool) -> dict[str, object]:
    """One optimizer step of a GPT-2 under bf16 autocast: time, tokens a second, peak memory."""
    torch._dynamo.reset()
    model = models.build(settings.model, 50257 if device.type == "cuda" else 4096, settings.block, seed=0).to(device)
    convert_(model, arm, verbose=False)
    optimizer = AdamW(param_groups(model, 0.1), lr=6e-4)
    if compiled:
        for block in model.transformer.h:
            block.compile()
    ids = torch.randint(0, 4096, (settings.batch, settings.block), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = causal_loss(model, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, device, settings.repeats)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    return {"ms": ms, "tokens_per_second": ids.numel() / ms * 1e3, "peak_bytes": peak}


def main() -> None:
    on_cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gpt2-small" if on_cuda else "gpt2-nano")
    parser.add_argument("--batch", type=int, default=8 if on_cuda else 4)
    parser.add_argument("--block", type=int, default=1024 if on_cuda else 128)
    parser.add_argument("--repeats", type=int, default=15 if on_cuda else 5)
    parser.add_argument("--compile", action="store_true", default=on_cuda, help="also compiled (minutes on a CPU)")
    settings = parser.parse_args()
    device = torch.device("cuda" if on_cuda else "cpu")
    told = provenance(device)
    shape = {k: getattr(settings, k) for k in ("model", "batch", "block", "repeats")}
    path = Path(__file__).parent / "results" / str(told["device"]) / "linear_recipes.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    gemm_rows = gemms(device, settings.repeats)
    steps: dict[str, dict[str, object]] = {}
    for compiled in (False, True) if settings.compile else (False,):
        base = 0.0
        for name, arm in recipes(device).items():
            result = training_step(arm, settings, device, compiled)
            base = base or float(str(result["ms"]))
            result |= {
                "execution": "bf16" if arm.plain else arm.execution.value,
                "time_over_bf16": float(str(result["ms"])) / base,
            }
            key = f"{name}, {'compiled' if compiled else 'eager'}"
            steps[key] = result
            print(
                f"{key:32} {result['ms']:8.1f} ms {result['time_over_bf16']:5.2f} x bf16  {result['execution']}",
                flush=True,
            )
            # After every arm: compiling takes minutes, and what is measured should not be lost with the rest.
            result_file = {"provenance": told, "shape": shape, "gemms": gemm_rows, "steps": steps}
            path.write_text(json.dumps(result_file, indent=1) + "\n", encoding="utf-8")
    print(path)


if __name__ == "__main__":
    main()
