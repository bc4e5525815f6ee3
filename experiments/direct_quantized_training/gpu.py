# SPDX-License-Identifier: Apache-2.0
"""`gpu`: H1, H2 and H6, the published 130M shape on real text, every arm at its own learning rate.

All runs of a call are kept in one file, so that several calls on several machines add up: `gpu-report` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.direct_quantized_training.arms import ARMS, Arm, Kind
from experiments.direct_quantized_training.model import LLAMA_130M
from experiments.direct_quantized_training.results import Check, mean, spread, write
from experiments.direct_quantized_training.training import Plan, Result, run
from lowbits.analysis import provenance
from lowbits.data import TokenData
from lowbits.methods.dqt import Environment
from lowbits.nn import Execution

STEPS, WARMUP, BATCH, LENGTH, OTHER_LR = 600, 60, 32, 512, 1e-3
NAMES = ("fp", "bitnet", "dqt_8", "dqt_ternary", "rtn_ternary", "frozen_ternary")
RATES = {"fp": 1e-3, "bitnet": 1e-3, "dqt_8": 1e-3, "dqt_ternary": 1e-3, "rtn_ternary": 1e-3, "frozen_ternary": 1e-3}
DEVICE = torch.device("cuda")
SEARCH, SEARCH_STEPS, SEARCH_SEED = (3e-4, 1e-3, 3e-3), 150, 100


def plan(data: TokenData, steps: int) -> Plan:
    shape = replace(LLAMA_130M, vocab=-(-data.vocab_size // 8) * 8)
    return Plan(shape, steps, max(1, steps // 10), OTHER_LR, half=True, validation=8)


def arm_of(name: str, native: bool) -> Arm:
    """On a GPU codes have bfloat16 gradients; `native` runs their fprop on integer units."""
    arm = ARMS[name]
    if arm.kind is not Kind.DQT:
        return arm
    environment = Environment.BF16 if arm.environment is Environment.FP32 else arm.environment
    return replace(arm, environment=environment, execution=Execution.NATIVE if native else Execution.SIMULATED)


def main(data: Path, out: Path, names: Sequence[str], seeds: Sequence[int], steps: int, native: bool) -> None:
    """Train what `out` does not hold yet; it is rewritten after every run."""
    tokens = TokenData.open(data)
    torch.backends.cuda.matmul.allow_tf32 = True
    for seed in seeds:
        for name in names:
            one(tokens, out, name, RATES[name], seed, steps, native)


def search(data: Path, out: Path, names: Sequence[str], native: bool) -> None:
    """Three rates for each arm, on a seed and a length that are not reported."""
    tokens = TokenData.open(data)
    for name in names:
        for lr in SEARCH:
            one(tokens, out, name, lr, SEARCH_SEED, SEARCH_STEPS, native)


def one(tokens: TokenData, out: Path, name: str, lr: float, seed: int, steps: int, native: bool) -> None:
    key, held = f"{name} {lr:g} {seed} {steps}", read(out)
    if key in held["runs"]:
        return

    def batch(split: str, index: int) -> Tensor:
        if split == "train":
            ids = tokens.batch("train", index, batch_size=BATCH, block=LENGTH, seed=seed)
        else:
            ids = tokens.batch("val", index, batch_size=BATCH, block=LENGTH, seed=0)
        return ids.to(DEVICE)

    result = run(arm_of(name, native), plan(tokens, steps), lr, seed, batch, DEVICE)
    result["tokens_per_second"] = result["steps_per_second"] * BATCH * LENGTH
    held["runs"][key] = result
    held["provenance"] = provenance(DEVICE)
    held["native"] = native
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    told = {k: round(v, 4) for k, v in result.items() if not k.startswith("train_")}
    print(f"{key}: {told}", flush=True)


def read(out: Path) -> dict[str, Any]:
    if not out.exists():
        return {"runs": {}}
    return json.loads(out.read_text(encoding="utf-8"))


def report(files: Sequence[Path]) -> None:
    """Merge the files of all calls into benchmarks/results/<device>/dqt_gpu.json, with the claims H1, H2, H6."""
    held = [read(file) for file in files]
    runs = {key: result for part in held for key, result in part["runs"].items()}
    arms: dict[str, list[Result]] = {}
    for key, result in sorted(runs.items()):
        name, _, seed, _ = key.split()
        if int(seed) != SEARCH_SEED:
            arms.setdefault(name, []).append(result)
    found = held[0]["provenance"]
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    shape = asdict(LLAMA_130M)
    content = {"measured": found, "setting": {"shape": shape, "batch": BATCH, "length": LENGTH}, "runs": runs}
    write("gpu", content, checks(arms), device, folder=str(found["device"]))


def checks(arms: dict[str, list[Result]]) -> list[Check]:
    def told(*names: str) -> str:
        return ", ".join(f"{n} {mean(of(n)):.3f} ± {spread(of(n)):.3f}" for n in names if n in arms)

    def of(name: str, key: str = "val") -> list[float]:
        return [result[key] for result in arms[name]]

    def order(*names: str) -> bool:
        return all(mean(of(a)) <= mean(of(b)) for a, b in zip(names, names[1:], strict=False))

    linear = LLAMA_130M.linear_parameters
    saved = {
        name: mean(of("bitnet", "resident_bytes")) - mean(of(name, "resident_bytes"))
        for name in ("dqt_8", "dqt_ternary")
    }
    tokens = ", ".join(f"{n} {mean(of(n, 'tokens_per_second')):.0f}" for n in arms)
    return [
        Check("H1a", "fp <= bitnet <= ternary codes", told("fp", "bitnet", "dqt_ternary"),
              order("fp", "bitnet", "dqt_ternary")),
        Check("H1b", "8-bit codes beat ternary codes", told("dqt_8", "dqt_ternary"), order("dqt_8", "dqt_ternary")),
        Check("H1c", "ternary codes beat frozen ones, and rounding to nearest",
              told("dqt_ternary", "frozen_ternary", "rtn_ternary"),
              order("dqt_ternary", "frozen_ternary") and order("dqt_ternary", "rtn_ternary")),
        Check("H1d", "every loss was finite", "", all(result["finite"] for found in arms.values() for result in found)),
        Check("T5", "ternary weights cost 8-bit codes less than floats",
              f"dqt_8 {mean(of('dqt_8', 'val_ternary')) - mean(of('dqt_8')):+.3f}, "
              f"fp {mean(of('fp', 'val_ternary')) - mean(of('fp')):+.3f}",
              mean(of("dqt_8", "val_ternary")) - mean(of("dqt_8"))
              < mean(of("fp", "val_ternary")) - mean(of("fp"))),
        Check("H2a", "between steps, 8-bit codes save 3 bytes a weight of a linear layer against masters, within 5 %",
              f"{saved['dqt_8'] / linear:.3f}", abs(saved["dqt_8"] / linear / 3 - 1) < 0.05),
        Check("H2b", "ternary codes 3.75 bytes, within 5 %", f"{saved['dqt_ternary'] / linear:.3f}",
              abs(saved["dqt_ternary"] / linear / 3.75 - 1) < 0.05),
        Check("H6", "tokens a second (codes and masters simulated unless the file says native)", tokens, True),
    ]  # fmt: skip
