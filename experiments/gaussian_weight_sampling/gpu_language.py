# SPDX-License-Identifier: Apache-2.0
"""`lm-gpu`: GPT-2 small and Llama-134M on real text, in bfloat16, under GaussWS and DiffQ; then stored in few bits.

All needed arms of a seed come before any of the next, and the results file is written after every run: a call that is
cut off, or whose time is up, leaves what it has, and the same call goes on from there. Claims are made of seeds that
every needed arm has finished.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from experiments import checks as checks_file
from experiments.checks import Check
from experiments.gaussian_weight_sampling.results import save
from experiments.gaussian_weight_sampling.training import Costs, Setting, cast_claims, measure, six_bits
from lowbits import methods, models
from lowbits.analysis import device_name
from lowbits.data import TokenData
from lowbits.errors import RunError

MODELS = ("gpt2-small", "llama-134m")
ARMS = {
    "bf16": "none",
    "GaussWS": "gaussws",
    "GaussWS 4": "gaussws,b_init=4.0",
    "DiffQ matched": "diffq,form=matched,noise=uniform,b_init=6.0,b_min=4.0,bit_lr=none",
    "GaussWS, fast bits": "gaussws,bit_lr=0.02,pull=1.0",
    "DiffQ library": "diffq",
}
NEEDED = ("bf16", "GaussWS", "GaussWS 4", "DiffQ matched")
Ran = dict[str, dict[str, dict[str, float]]]


def setting_of(steps: int, batch: int, length: int, device: str) -> Setting:
    """What all arms have in common."""
    return Setting(steps, max(1, steps // 10), batch, length, 6e-4, max(1, 128 // batch), device, device != "cpu")


def known(model: str, told: dict[str, Any]) -> Ran:
    """Return the runs of an earlier call with the same setting, by arm and seed; a file of another one is put aside."""
    path = checks_file.RESULTS / device_name(torch.device(told["device"])) / f"gaussws_lm_{model}.json"
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["run"] == told:
        return found["runs"]
    path.rename(path.with_suffix(".json.old"))
    print(f"{path} is of another setting; it is now {path.name}.old", flush=True)
    return {}


def complete(runs: Ran) -> Costs:
    """Return every arm, by the seeds that all needed arms have; an arm that lacks one of these is left out."""
    needed = [set(runs[arm]) for arm in NEEDED if arm in runs]
    seeds = sorted(set.intersection(*needed)) if needed else []
    return {arm: [found[seed] for seed in seeds] for arm, found in runs.items() if seeds and set(seeds) <= set(found)}


def checks(costs: Costs) -> list[Check]:
    """D7 at this scale: losses, and what the casts cost."""
    if not set(NEEDED) <= set(costs) or not all(math.isfinite(row["loss"]) for rows in costs.values() for row in rows):
        return []
    losses = {arm: [found["loss"] for found in by_seed] for arm, by_seed in costs.items()}
    words = {arm: f"{arm} {' '.join(f'{x:.4f}' for x in found)}" for arm, found in losses.items()}
    base = statistics.fmean(losses["bf16"])
    told = []
    for arm in ("GaussWS", "GaussWS 4"):
        holds = statistics.fmean(losses[arm]) <= 1.01 * base
        told.append(Check("D7", f"{arm}: final loss at most 1 % above bf16's", f"{words[arm]}; {words['bf16']}", holds))
    gap = statistics.fmean(losses["GaussWS"]) - statistics.fmean(losses["DiffQ matched"])
    told.append(Check("b", "GaussWS at or below matched DiffQ", f"{gap:+.4f}", gap <= 0))
    told += [Check("d", *claim) for claim in cast_claims(costs, "GaussWS 4")]
    return [*told, Check("D7", *six_bits(costs, "GaussWS 4"))]


def report(told: dict[str, Any], runs: Ran) -> tuple[Path, list[Check]]:
    """Write the results file of a model."""
    costs = complete(runs)
    found = checks(costs)
    content: dict[str, Any] = {"run": told, "arms": {arm: ARMS[arm] for arm in runs}, "runs": runs, "costs": costs}
    return save(f"lm_{told['model']}", content, found, told["device"]), found


def main(data: str, names: Sequence[str], arms: Sequence[str], seeds: int, setting: Setting, seconds: float) -> None:
    """Train what is not there yet while there is time; only the first run may end too late."""
    for what, wanted, there in (("model", names, models.SIZES), ("arm", arms, ARMS)):
        unknown = [name for name in wanted if name not in there]
        if unknown:
            raise RunError(f"lm-gpu: there is no {what} {unknown[0]!r}; there are {', '.join(there)}.")
    tokens, begun, longest = TokenData.open(data), time.perf_counter(), 0.0
    told = {name: {"model": name, "vocabulary": tokens.vocab_size, **asdict(setting)} for name in names}
    runs = {name: {arm: {} for arm in arms} | known(name, told[name]) for name in names}
    for name, seed, arm, fresh in missing(tokens, names, arms, seeds, setting, runs):
        at = time.perf_counter()
        if longest and at - begun + longest > seconds:
            print(f"{seconds:.0f} seconds are up; the same command goes on from here", flush=True)
            break
        found = measure(copy.deepcopy(fresh), tokens, methods.named(ARMS[arm]), seed, setting)
        found["seconds"] = round(time.perf_counter() - at, 1)
        longest = max(longest, found["seconds"])
        runs[name].setdefault(arm, {})[str(seed)] = found
        print(name, arm, seed, {key: round(value, 4) for key, value in found.items()}, flush=True)
        report(told[name], runs[name])
    for name in names:
        checks_file.tell(*report(told[name], runs[name]))


def missing(
    tokens: TokenData, names: Sequence[str], arms: Sequence[str], seeds: int, setting: Setting, runs: dict[str, Ran]
) -> Iterator[tuple[str, int, str, PreTrainedModel]]:
    """Yield the runs that there are not yet, needed arms first, with a model that is to be copied."""
    for needed in (True, False):
        for seed, name in itertools.product(range(seeds), names):
            lacking = [arm for arm in arms if (arm in NEEDED) == needed and str(seed) not in runs[name].get(arm, {})]
            fresh = models.build(name, tokens.vocab_size, setting.length, seed) if lacking else None
            for arm in lacking:
                assert fresh is not None
                yield name, seed, arm, fresh
