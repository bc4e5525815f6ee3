# SPDX-License-Identifier: Apache-2.0
"""Run directories with known numbers, written as docs/architecture.md says."""

from __future__ import annotations

import json
import math
from pathlib import Path

LAYERS = [
    f"transformer.h.{block}.{part}"
    for block in range(4)
    for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]
TOKENS_A_STEP = 2048
QUANTIZED = {"w": "weight", "a": "input", "g": "grad"}


def write_comparison(root: Path, arms: list[dict[str, object]], command: str = "lowbits compare") -> Path:
    """Write comparison.json; missing fields of an arm get the obvious values."""
    root.mkdir(parents=True, exist_ok=True)
    full = [
        {"recipe": arm["name"], "role": "baseline" if i == 0 else "recipe", "seeds": [0, 1, 2], "quantizes": ""} | arm
        for i, arm in enumerate(arms)
    ]
    (root / "comparison.json").write_text(json.dumps({"arms": full, "command": command, "base": {}}))
    return root


def write_run(root: Path, arm: str, seed: int, final: float | None, **changes: object) -> Path:
    """Write a run that falls from ln(4096) towards `final` in 400 steps; `changes` go into result.json.

    `final=None` leaves result.json out: a run that was killed.
    """
    directory = root / arm / f"seed-{seed}"
    directory.mkdir(parents=True)
    steps = int(changes.get("diverged_at") or 400)
    goal = 3.2 if final is None else final
    (directory / "config.json").write_text(
        json.dumps({"model": "gpt2-nano", "data": "stdlib", "recipe": arm, "seed": seed, "rule": _rule(arm)})
    )
    (directory / "env.json").write_text(json.dumps({"device": "cpu", "threads": 1, "versions": {"torch": "2.13.0"}}))
    lines = [_step(step, goal, arm, seed) for step in range(10, steps + 1, 10)]
    lines += [_evaluation(step, goal, arm) for step in range(0, steps + 1, 50)]
    lines += [{"kind": "errors", "step": step, "layers": _errors(arm, step)} for step in range(50, steps + 1, 50)]
    if changes.get("status") == "diverged":
        event = {"kind": "event", "step": steps, "event": "diverged", "message": "non-finite gradient"}
        lines.append(event | {"layer": changes["diverged_layer"], "role": changes["diverged_role"]})
    (directory / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if final is not None:
        (directory / "result.json").write_text(json.dumps(_result(arm, seed, final, steps) | changes))
    return directory


def _rule(arm: str) -> dict[str, dict[str, str | None]]:
    """Only whether a GEMM is quantized counts."""
    fprop = None if arm in ("bf16", "null") else "int8 row"
    return {"fprop": {"lhs": fprop, "rhs": fprop}, "dgrad": {"lhs": None}, "wgrad": {"lhs": None}}


def loss_at(step: int, final: float) -> float:
    """An exact exponential approach, `final` at step 400."""
    start = math.log(4096)
    share = (math.exp(-step / 80) - math.exp(-5)) / (1 - math.exp(-5))
    return final + (start - final) * share


def _step(step: int, final: float, arm: str, seed: int) -> dict[str, object]:
    wiggle = 0.05 * math.sin(step * (1.3 + 0.11 * seed) + len(arm))
    speed = 10000.0 if arm == "bf16" else 7000.0
    return {
        "kind": "step", "step": step, "tokens": step * TOKENS_A_STEP, "seconds": step * TOKENS_A_STEP / speed,
        "loss": loss_at(step, final) + wiggle, "lr": 6e-4, "grad_norm": 0.8, "tokens_per_second": speed,
        "memory_bytes": 412000000,
    }  # fmt: skip


def _evaluation(step: int, final: float, arm: str) -> dict[str, object]:
    speed = 10000.0 if arm == "bf16" else 7000.0
    loss = loss_at(step, final)
    tokens = step * TOKENS_A_STEP
    return {
        "kind": "eval",
        "step": step,
        "tokens": tokens,
        "seconds": tokens / speed,
        "loss_on": loss,
        "loss_off": loss - 0.002,
    }


def _errors(arm: str, step: int) -> dict[str, dict[str, dict[str, float]]]:
    """Gradients get worse with the steps, most of all in the last layer, and where wgrad wants them."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for index, layer in enumerate(LAYERS):
        found[layer] = {}
        for letter, role in QUANTIZED.items():
            for bits in (4, 8):
                if f"{letter}{bits}" in arm:
                    late = step / 400 * (2 + 4 * (index == len(LAYERS) - 1)) if letter == "g" else 0.0
                    sqnr = 6.02 * bits - 8 - (index % 4) - (6 if letter == "g" else 0) - late
                    zero = 0.3 * 2.0**-bits * (1 + index % 4) * (4 if letter == "g" else 1)
                    found[layer][role] = {"sqnr_db": sqnr, "zero": zero, "clipped": 0.0}
        if "grad" in found[layer]:
            grad = found[layer]["grad"]
            found[layer] |= {"dgrad.lhs": grad | {"sqnr_db": grad["sqnr_db"] + 1}, "wgrad.lhs": grad}
    return found


def _result(arm: str, seed: int, final: float, steps: int) -> dict[str, object]:
    tokens = steps * TOKENS_A_STEP
    speed = 10000.0 if arm == "bf16" else 7000.0
    bits = 32 if arm in ("bf16", "null") else 8 if "8" in arm else 4
    weights, activations = 7_200_000, 21_000_000
    measured = {"weights": weights, "gradients": weights, "optimizer": 2 * weights, "saved_activations": activations}
    stored = measured | {"weights": weights * bits // 32, "saved_activations": activations * bits // 32}
    return {
        "status": "finished", "recipe": arm, "seed": seed, "steps": steps, "tokens": tokens, "seconds": tokens / speed,
        "val_loss_on": final, "val_loss_off": final - 0.002, "train_loss": final - 0.1, "tokens_per_second": speed,
        "execution": "simulated", "parameters": 1_800_000, "converted_layers": 16, "linear_flops_share": 0.71,
        "skipped_steps": 0, "spikes": 0, "peak_memory_bytes": 412_000_000,
        "memory": {"measured": measured, "stored_in_few_bits": stored}, "sample": SAMPLE,
        "diverged_at": None, "diverged_layer": None, "diverged_role": None,
    }  # fmt: skip


SAMPLE = '''def read(self, size=-1):
    """Read up to size bytes from the object and return them."""
    if self.closed:
        raise ValueError("I/O operation on <closed> </script> file & more")
    return self._buffer.read(size)
'''


def example(root: Path) -> Path:
    """Write a comparison in which everything happens that can: the demo of the report."""
    finals = {
        "bf16": (3.1000, 3.1060, 3.0960), "null": (3.1030, 3.0990, 3.1075), "w8a8": (3.1020, 3.0990, 3.1080),
        "w8a8g8": (3.1100, 3.1160, 3.1190), "w4_channel": (3.1250, 3.1330, 3.1360),
        "w4_tensor": (3.2000, 3.2110, 3.1950),
    }  # fmt: skip
    words = {
        "bf16": "nothing", "null": "bf16 again, other seeds",
        "w8a8": "weights int8 per channel, inputs int8 per token",
        "w8a8g8": "weights int8 per channel, inputs int8 per token, gradients int8 per token (wgrad)",
        "w4_channel": "weights int4 per channel", "w4_tensor": "weights int4 per tensor",
        "g4_tensor": "gradients int4 per tensor (wgrad)", "a4_column": "inputs int4 per column",
    }  # fmt: skip
    arms: list[dict[str, object]] = [{"name": name, "quantizes": text} for name, text in words.items()]
    arms[1] |= {"role": "null", "recipe": "bf16", "seeds": [3, 4, 5]}
    write_comparison(
        root, arms, "lowbits compare bf16 null w8a8 w8a8g8 w4_channel w4_tensor g4_tensor a4_column --seeds 3"
    )
    for name, losses in finals.items():
        for seed, final in enumerate(losses, start=3 if name == "null" else 0):
            write_run(root, name, seed, final)
    where = {"status": "diverged", "diverged_layer": "transformer.h.0.attn.c_attn", "diverged_role": "grad"}
    write_run(root, "g4_tensor", 0, 3.4)
    for seed in (1, 2):
        write_run(root, "g4_tensor", seed, math.nan, **where, diverged_at=210 + 20 * seed)
    write_run(root, "a4_column", 0, None)
    failed = write_run(root, "a4_column", 1, None)
    (failed / "failure.json").write_text(json.dumps({"message": "killed by signal 9 (out of memory?)"}))
    return root
