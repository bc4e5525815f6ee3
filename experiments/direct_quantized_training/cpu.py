# SPDX-License-Identifier: Apache-2.0
"""`cpu`: the checks T1 to T7 of a tiny Llama on the characters of Shakespeare, three seeds each.

The learning rate of each of the four methods is searched for in three, on a seed that is not reported; what differs
from a method in one thing is trained at that method's rate, and both sides of a comparison at the same one.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from experiments.direct_quantized_training.arms import ARMS
from experiments.direct_quantized_training.model import TINY
from experiments.direct_quantized_training.results import Check, mean, once, spread, write
from experiments.direct_quantized_training.training import Plan, Result, run
from lowbits.methods.bitnet import HYPER

STEPS, WARMUP, BATCH, LENGTH, OTHER_LR = 250, 25, 8, 64, 1e-3
LAYERS = 2
RATES, SEARCH_SEED, SEEDS = (3e-4, 1e-3, 3e-3), 100, (0, 1, 2)
SEARCHED = ("fp", "bitnet", "dqt_8", "dqt_ternary")
LOW_8BIT_RATE = 3e-5  # a quarter of a step of 8-bit codes

LIKE = {
    "frozen_ternary": "dqt_ternary", "frozen_8": "dqt_8", "dqt_8_all": "dqt_8", "dqt_8_bf16": "dqt_8",
    "dqt_4": "dqt_8", "dqt_3": "dqt_8", "dqt_2": "dqt_8", "dqt_8_wide": "dqt_8", "bf16_sr": "dqt_8",
    "dqt_8_fp8": "dqt_8", "dqt_8_int8": "dqt_8", "dqt_8_channel": "dqt_8", "dqt_ternary_channel": "dqt_ternary",
    "dqt_8_recomputed": "dqt_8", "dqt_8_states8": "dqt_8", "dqt_8_states4": "dqt_8",
    "dqt_ternary_states4": "dqt_ternary", "dqt_8_dropped": "dqt_8", "dqt_ternary_dropped": "dqt_ternary",
    "fp_plain": "fp",
}  # fmt: skip
"""Arms that are trained at the learning rate of another."""
OFFICIAL = ("bitnet_official", HYPER["official-700m"].lr)
LOW = (("dqt_ternary", 1e-3), ("rtn_ternary", 1e-3), ("dqt_8", LOW_8BIT_RATE), ("rtn_8", LOW_8BIT_RATE))
"""T3: arms at a rate below 0.3 codes a step."""


class Characters:
    """Batches of Tiny Shakespeare: the last tenth is for validation."""

    def __init__(self, file: Path) -> None:
        text = lzma.decompress(file.read_bytes()).decode()
        known = {c: i for i, c in enumerate(sorted(set(text)))}
        ids = torch.tensor([known[c] for c in text])
        cut = len(ids) * 9 // 10
        self.vocab, self.parts = len(known), {"train": ids[:cut], "val": ids[cut:]}

    def batch(self, seed: int, split: str, index: int) -> Tensor:
        ids = self.parts[split]
        generator = torch.Generator().manual_seed(index + (10_000 * (seed + 1) if split == "train" else 0))
        places = torch.randint(0, len(ids) - LENGTH - 1, (BATCH,), generator=generator)
        return torch.stack([ids[p : p + LENGTH + 1] for p in places])


def main(data: Path, out: Path) -> None:
    text = Characters(data / "text" / "tinyshakespeare" / "input.txt.xz")
    plan = Plan(replace(TINY, vocab=text.vocab, layers=LAYERS), STEPS, WARMUP, OTHER_LR)

    def trained(name: str, lr: float, seed: int) -> Result:
        device = torch.device("cpu")
        return once(
            out, f"{name}-{lr:g}-{seed}",
            lambda: run(ARMS[name], plan, lr, seed, lambda split, i: text.batch(seed, split, i), device),
        )  # fmt: skip

    searched = {name: {lr: trained(name, lr, SEARCH_SEED) for lr in RATES} for name in SEARCHED}
    search = {name: {lr: result["val"] for lr, result in found.items()} for name, found in searched.items()}
    best = {name: min(found, key=lambda lr: found[lr]) for name, found in search.items()}
    plans = [*((name, best[name]) for name in SEARCHED), OFFICIAL, *LOW]
    plans += [(name, best[like]) for name, like in LIKE.items()]
    runs = {f"{name} {lr:g}": [trained(name, lr, seed) for seed in SEEDS] for name, lr in dict.fromkeys(plans)}
    arms = {name: runs[f"{name} {best[name]:g}"] for name in SEARCHED}
    arms |= {name: runs[f"{name} {best[like]:g}"] for name, like in LIKE.items()}
    low = {name: runs[f"{name} {lr:g}"] for name, lr in LOW}
    told = {
        key: {
            "val": [r["val"] for r in found], "val_ternary": [r["val_ternary"] for r in found],
            "changed_at_peak": mean([r["changed_at_peak"] for r in found]),
            "changed_at_end": mean([r["changed_at_end"] for r in found]),
            "lr_in_codes": found[0].get("lr_in_codes"), "seconds": mean([r["seconds"] for r in found]),
        }
        for key, found in runs.items()
    }  # fmt: skip
    setting = {
        "layers": LAYERS, "steps": STEPS, "warmup": WARMUP,
        "batch": BATCH, "length": LENGTH, "other_lr": OTHER_LR, "seeds": SEEDS,
        "search_seed": SEARCH_SEED, "linear_parameters": plan.shape.linear_parameters, "hyper": plan.hyper,
    }  # fmt: skip
    content = {"setting": setting, "search": search, "best": best, "runs": told}
    claims = [*checks(arms, low, best), rises_by_rate(searched)]
    write("cpu", content, claims, torch.device("cpu"))


def rises_by_rate(searched: dict[str, dict[float, Result]]) -> Check:
    """T5 again, at every rate that was searched: what made the first one look for it, so no test of anything."""
    rises = {
        name: {lr: result["val_ternary"] - result["val"] for lr, result in searched[name].items()}
        for name in ("dqt_8", "fp")
    }
    told = "; ".join(
        f"{name} " + ", ".join(f"{rise:+.3f} at {lr:g}" for lr, rise in found.items()) for name, found in rises.items()
    )
    halved = [lr for lr in RATES if rises["dqt_8"][lr] < 0.5 * rises["fp"][lr]]
    return Check("T5 by rate", "looked at afterwards, one seed: the cost of ternary weights is less than half at "
                 + (" and ".join(f"{lr:g}" for lr in halved) or "no rate"), told, bool(halved))  # fmt: skip


def losses(arms: dict[str, list[Result]], name: str, key: str = "val") -> list[float]:
    return [result[key] for result in arms[name]]


def below(a: Sequence[float], b: Sequence[float]) -> bool:
    """In the mean, by more than the spread of the differences over seeds."""
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return mean(gaps) < -spread(gaps)


def words(arms: dict[str, list[Result]], *names: str, key: str = "val") -> str:
    return ", ".join(f"{n} {mean(losses(arms, n, key)):.3f} ± {spread(losses(arms, n, key)):.3f}" for n in names)


def share(arms: dict[str, list[Result]], name: str, key: str) -> float:
    return mean(losses(arms, name, key))


def alike(arms: dict[str, list[Result]], id: str, statement: str, a: str, b: str) -> Check:
    """Means within two standard deviations of a seed."""
    values = losses(arms, a), losses(arms, b)
    gap = mean(values[1]) - mean(values[0])
    return Check(id, statement, f"{words(arms, a, b)}: {gap:+.4f}", abs(gap) <= 2 * max(map(spread, values)))


def checks(arms: dict[str, list[Result]], low: dict[str, list[Result]], best: dict[str, float]) -> list[Check]:
    """The claims of the spec, each with its numbers; what does not hold says so."""
    val = {name: losses(arms, name) for name in arms}
    rises = {
        name: [t - v for t, v in zip(losses(arms, name, "val_ternary"), val[name], strict=True)]
        for name in ("dqt_8", "fp")
    }
    mix = {**arms, "low dqt_ternary": low["dqt_ternary"], "low rtn_ternary": low["rtn_ternary"]}
    mix |= {"low dqt_8": low["dqt_8"], "low rtn_8": low["rtn_8"]}
    frozen = ("frozen_ternary", "frozen_8")
    peaks = {name: share(arms, name, "changed_at_peak") for name in ("dqt_8", "dqt_ternary", "bitnet")}
    ends = {name: share(arms, name, "changed_at_end") for name in ("dqt_8", "dqt_ternary")}
    stalled = [share(low, f"rtn_{b}", "changed_at_peak") for b in ("ternary", "8")]
    order = ["dqt_2", "dqt_3", "dqt_4", "dqt_8"]
    return [
        Check("T1a", "fp is no worse than bitnet", words(arms, "fp", "bitnet"), not below(val["bitnet"], val["fp"])),
        Check("T1b", "bitnet is no worse than ternary codes", words(arms, "bitnet", "dqt_ternary"),
              not below(val["dqt_ternary"], val["bitnet"])),
        Check("T1c", "8-bit codes beat ternary ones", words(arms, "dqt_8", "dqt_ternary"),
              below(val["dqt_8"], val["dqt_ternary"])),
        Check("T2", "codes that train beat codes that are frozen", words(arms, "dqt_ternary", "dqt_8", *frozen),
              below(val["dqt_ternary"], val[frozen[0]]) and below(val["dqt_8"], val[frozen[1]])),
        Check("T3a", "below 0.3 codes a step, rounding to nearest changes next to nothing",
              f"changed at peak: ternary {stalled[0]:.2%}, 8 bits {stalled[1]:.2%}", max(stalled) < 0.002),
        Check("T3b", "there, ternary: stochastic beats nearest", words(mix, "low dqt_ternary", "low rtn_ternary"),
              below(losses(mix, "low dqt_ternary"), losses(mix, "low rtn_ternary"))),
        Check("T3c", "there, 8 bits: stochastic beats nearest", words(mix, "low dqt_8", "low rtn_8"),
              below(losses(mix, "low dqt_8"), losses(mix, "low rtn_8"))),
        Check("T4a", "at the peak 8-bit codes change far more often than ternary ones",
              ", ".join(f"{k} {v:.2%}" for k, v in peaks.items()), peaks["dqt_8"] > 10 * peaks["dqt_ternary"]),
        Check("T4b", "at the end of the cosine next to none change", ", ".join(f"{k} {v:.3%}" for k, v in ends.items()),
              all(ends[k] < 0.05 * peaks[k] for k in ends)),
        Check("T5", "ternary weights cost a model of 8-bit codes far less than one of floats",
              f"dqt_8 {mean(rises['dqt_8']):+.3f}, fp {mean(rises['fp']):+.3f}",
              mean(rises["dqt_8"]) < 0.5 * mean(rises["fp"])),
        Check("T6", "codes in linear layers alone are no worse than everywhere", words(arms, "dqt_8", "dqt_8_all"),
              not below(val["dqt_8_all"], val["dqt_8"])),
        alike(arms, "T7", "bfloat16 and float32 environments are within two spreads", "dqt_8", "dqt_8_bf16"),
        alike(arms, "R6", "gradients of outputs in FP8 and float32 too", "dqt_8", "dqt_8_fp8"),
        alike(arms, "R8a", "8 bits without the smallest fifth of updates too", "dqt_8", "dqt_8_dropped"),
        alike(arms, "R8b", "ternary without the smallest fifth too", "dqt_ternary", "dqt_ternary_dropped"),
        alike(arms, "S8", "8-bit codes with 8-bit moments too", "dqt_8", "dqt_8_states8"),
        alike(arms, "S4a", "8-bit codes with 4-bit moments too", "dqt_8", "dqt_8_states4"),
        alike(arms, "S4b", "ternary codes with 4-bit moments too", "dqt_ternary", "dqt_ternary_states4"),
        Check("R2", "more bits, less loss: 2, 3, 4, 8 at one rate each", words(arms, "dqt_ternary", *order),
              all(mean(val[a]) >= mean(val[b]) for a, b in zip(order, order[1:], strict=False))),
        Check("best", "the rate that each method was given", str(best), True),
    ]  # fmt: skip
