# SPDX-License-Identifier: Apache-2.0
"""What linear quantization costs a Transformer in pre-training: the checks of Chitsaz et al. 2024 (arXiv:2407.11722).

    lowbits data prepare speeches.txt --vocab-size 512 --out runs/data/speeches
    python -m experiments.linear_quantization cpu --data runs/data/speeches --out runs/linear-cpu

    lowbits data prepare encyclopedia.txt --tokenizer path/to/gpt2 --out runs/data/encyclopedia
    python -m experiments.linear_quantization gpu --data runs/data/encyclopedia --out runs/linear-gpu

`cpu` trains 21 arms of a 0.87M-parameter GPT-2 under three seeds (about two core-hours) and checks T1 to T7; `gpu`
trains GPT-2 small and checks H1. Both are resumable: the same command goes on. Each writes
benchmarks/results/<device>/linear_quantization_<scale>.json. Nothing is tuned to pass: what does not hold is written
down as not holding.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import Check
from lowbits.analysis import causal_loss, compare_post_training, dequantized, m_sharpness
from lowbits.data import TokenData
from lowbits.formats import INT4
from lowbits.nn import convert_, high_precision, quantized_layers
from lowbits.quantizers import PerRow, PerTensor, QuantSpec, quantize
from lowbits.recipes import named
from lowbits.study import Summary, compare, summarize
from lowbits.train import Autocast, Compute, Device, Optimizer, Run, Saving, Watching

SEEDS = (0, 1, 2)
CPU_ARMS = [
    "bf16",
    "null",
    "w8_channel",
    "w8_tensor",
    "w4_channel",
    "w4_tensor",
    "a8_token",
    "a4_token",
    "a4_column",
    "a4_tensor",
    "g8_token",
    "g8_tensor",
    "g4_token",
    "g4_tensor",
    "m8_channel",
    "m8_tensor",
    "m4_channel",
    "m4_tensor",
    "v8_channel",
    "v8_channel_no_zero",
    "w8a8",
]
GPU_ARMS = [
    "bf16",
    "null",
    "w8_channel",
    "a8_token",
    "w8a8",
    "w4_channel",
    "w4_tensor",
    "v8_channel",
    "v8_channel_no_zero",
]

# The study's betas (0.9, 0.999) and clipping; float32 where the study's float32 master run is meant by "fp".
CPU_RUN = Run(
    model="gpt2-pico", steps=1500, batch_size=16, block=64,
    optimizer=Optimizer(lr=4e-3, betas=(0.9, 0.999)), compute=Compute(autocast=Autocast.NONE),
    saving=Saving(save_every=1500, keep=1), watching=Watching(eval_every=500, eval_batches=40, errors_every=500),
)  # fmt: skip
GPU_RUN = Run(
    model="gpt2-small", steps=500, batch_size=8, block=1024,
    optimizer=Optimizer(lr=6e-4, betas=(0.9, 0.999)), saving=Saving(save_every=500, keep=1),
    watching=Watching(eval_every=250, eval_batches=8, errors_every=500),
)  # fmt: skip
# T6 and T7 look into the finished models of these arms.
PROBED = ("bf16", "w4_channel", "w4_tensor")
RHO, SHARP_BATCHES, SHARP_BATCH = 0.01, 20, 16


class Arms:
    """Final validation losses by arm, quantizers on, and the noise of the baseline."""

    def __init__(self, summary: Summary) -> None:
        self.by_name = {arm.name: arm for arm in summary.arms}
        self.losses = {name: arm.loss_on.values for name, arm in self.by_name.items()}
        baseline = [*self.losses["bf16"], *self.losses["null"]]
        self.baseline, self.sigma = statistics.fmean(baseline), statistics.stdev(baseline)
        self.close = max(2 * self.sigma, 0.02)

    def gap(self, name: str) -> float:
        """Mean loss minus the mean of all baseline runs, the null control's included; nats."""
        return statistics.fmean(self.losses[name]) - self.baseline

    def near(self, *names: str) -> bool:
        return all(abs(self.gap(name)) <= self.close for name in names)

    def spikes(self, name: str) -> int:
        return sum(run.spikes for run in self.by_name[name].runs)

    def zeros(self, name: str) -> float:
        """Mean over layers of the share of non-zero gradients that round to code 0."""
        return statistics.fmean(float(layer["grad"]["zero"] or 0) for layer in self.by_name[name].errors.values())


@dataclass(frozen=True)
class Claim:
    """A statement about the gaps of some arms; `also` adds to what is reported of them."""

    id: str
    statement: str
    arms: str
    holds: Callable[[Arms], bool]
    also: Callable[[Arms], str] = lambda _: ""

    def check(self, arms: Arms) -> Check:
        gaps = ", ".join(f"{name} {arms.gap(name):+.4f}" for name in self.arms.split())
        return Check(self.id, self.statement, gaps + self.also(arms), bool(self.holds(arms)))


CLAIMS = [
    Claim("T1", "8-bit weights per channel, activations per token: no gap", "w8_channel a8_token w8a8",
          lambda a: a.near("w8_channel", "a8_token", "w8a8")),
    Claim("T1", "8-bit first moment: no gap", "m8_channel", lambda a: a.near("m8_channel")),
    Claim("T2", "8-bit weights: no gap at any granularity", "w8_channel w8_tensor",
          lambda a: a.near("w8_channel", "w8_tensor")),
    Claim("T2", "4-bit weights: tensor worse than channel, both worse than the baseline", "w4_channel w4_tensor",
          lambda a: a.gap("w4_tensor") > a.gap("w4_channel") > 0),
    Claim("T3", "4-bit activations: token and column better than tensor, which is worse than the baseline",
          "a4_token a4_column a4_tensor",
          lambda a: max(a.gap("a4_token"), a.gap("a4_column")) < a.gap("a4_tensor") and a.gap("a4_tensor") > 0),
    Claim("T4", "gradients: g8_token at most 0.03 worse, g4_tensor at least 0.1 worse", "g8_token g4_tensor",
          lambda a: a.gap("g8_token") <= 0.03 and a.gap("g4_tensor") >= 0.1),
    Claim("T4", "gradients: g8_token and g4_token better than g8_tensor, far better than g4_tensor",
          "g8_token g4_token g8_tensor g4_tensor",
          lambda a: max(a.gap("g8_token"), a.gap("g4_token")) < a.gap("g8_tensor") < a.gap("g4_tensor")),
    Claim("T4", "gradients: under one scale a tensor more than twice as many round to zero", "g8_token g8_tensor",
          lambda a: a.zeros("g8_tensor") > 2 * a.zeros("g8_token"),
          lambda a: f"; zeros: token {a.zeros('g8_token'):.1%}, tensor {a.zeros('g8_tensor'):.1%}"),
    Claim("T5", "first moment: no gap at 8 bits and at 4 bits per channel", "m8_channel m8_tensor m4_channel",
          lambda a: a.near("m8_channel", "m8_tensor", "m4_channel")),
    Claim("T5", "first moment: 4 bits per tensor worse than per channel", "m4_channel m4_tensor",
          lambda a: a.gap("m4_tensor") > a.gap("m4_channel")),
    Claim("T5", "second moment, signed linear 8 bits: at least 0.1 worse", "v8_channel",
          lambda a: a.gap("v8_channel") >= 0.1),
    Claim("T5", "second moment, signed linear 8 bits: more loss spikes", "v8_channel",
          lambda a: a.spikes("v8_channel") > a.spikes("bf16"),
          lambda a: f"; spikes {a.spikes('v8_channel')} against {a.spikes('bf16')}"),
    Claim("T5", "second moment, codes 1..255: no gap", "v8_channel_no_zero", lambda a: a.near("v8_channel_no_zero")),
]  # fmt: skip


def training_checks(arms: Arms) -> list[Check]:
    """T1 to T5 (H1 on the GPU) from the final losses; a claim about an arm that no seed finished does not hold."""
    present = {name for name, losses in arms.losses.items() if losses}
    planned = [claim for claim in CLAIMS if set(claim.arms.split()) <= set(arms.losses)]
    return [
        claim.check(arms) if set(claim.arms.split()) <= present
        else Check(claim.id, claim.statement, f"no finished run of {sorted(set(claim.arms.split()) - present)}", False)
        for claim in planned
    ]  # fmt: skip


def checkpoints(out: Path, arm: str, seed: int) -> list[Path]:
    return list((out / arm / f"seed-{seed}" / "checkpoints").glob("step-*"))


def load(out: Path, arm: str, seed: int) -> torch.nn.Module:
    """Return the trained model of one run, converted under the recipe that it was trained with."""
    from transformers import AutoModelForCausalLM

    (folder,) = checkpoints(out, arm, seed)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    recipe = named("bf16" if arm == "null" else arm)
    convert_(model, recipe, verbose=False)
    return model


def weight_error_check(out: Path) -> Check:
    """T2: on the baseline's trained weights, 4 bits per channel err less than per tensor, in every layer."""
    errors = []
    for layer in quantized_layers(load(out, "bf16", SEEDS[0])).values():
        w = layer.weight.detach().t()
        decoded = [quantize(w, QuantSpec(INT4, granularity)).dequantize() for granularity in (PerRow(), PerTensor())]
        errors.append([((w_hat - w).norm() / w.norm()).item() for w_hat in decoded])
    channel, tensor = (statistics.fmean(column) for column in zip(*errors, strict=True))
    statement = "4-bit error of the trained weights: channel below tensor in every layer"
    measured = f"mean relative error: channel {channel:.3f}, tensor {tensor:.3f}"
    return Check("T2", statement, measured, all(c < t for c, t in errors))


def post_training_check(out: Path, run: Run, data: TokenData, seeds: list[int]) -> Check:
    """T6: quantizing the finished baseline to 4 bits loses more than training under the same quantizer."""
    batches = list(data.val_batches(run.batch_size, run.block, run.watching.eval_batches * run.batch_size))

    @torch.no_grad()
    def loss(model: torch.nn.Module) -> float:
        return statistics.fmean(causal_loss(model, ids).item() for ids in batches)

    rows = []
    for seed in seeds:
        after = compare_post_training(load(out, "bf16", seed), {"w4": named("w4_channel")}, loss)
        rows.append(
            (
                after["w4"] - after["high_precision"],
                loss(load(out, "w4_channel", seed).eval()) - after["high_precision"],
            )
        )
    ptq, trained = (statistics.fmean(column) for column in zip(*rows, strict=True))
    statement = "4-bit weights per channel: quantizing after training loses more than training with it"
    measured = f"after training {ptq:+.4f}, with training {trained:+.4f} (mean of {len(rows)} seeds)"
    return Check("T6", statement, measured, ptq > trained)


def sharpness_check(out: Path, data: TokenData, run: Run, seeds: list[int]) -> Check:
    """T7: at the same relative radius the 4-bit weight model is at least as sharp as the baseline, in both readings."""
    ids = [*data.val_batches(SHARP_BATCH, run.block, SHARP_BATCHES * SHARP_BATCH)]
    found: dict[str, list[float]] = {}
    for seed in seeds:
        base, four = (load(out, arm, seed) for arm in ("bf16", "w4_tensor"))
        found.setdefault("baseline", []).append(m_sharpness(base, causal_loss, ids, rho=RHO).value)
        found.setdefault("w4_tensor, quantizers on", []).append(m_sharpness(four, causal_loss, ids, rho=RHO).value)
        with dequantized(four), high_precision(four):
            found.setdefault("w4_tensor, decoded weights", []).append(
                m_sharpness(four, causal_loss, ids, rho=RHO).value
            )
    told = [f"{n} {statistics.fmean(v):.4f} +- {statistics.stdev(v) / len(v) ** 0.5:.4f}" for n, v in found.items()]
    means = {name: statistics.fmean(values) for name, values in found.items()}
    statement = f"sharpness at relative radius {RHO} (mean and standard error): 4-bit weights at least the baseline's"
    return Check(
        "T7", statement, f"{'; '.join(told)} ({len(seeds)} seeds)", min(list(means.values())[1:]) >= means["baseline"]
    )


def write(scale: str, arms: Arms, checks: list[Check], run: Run, out: Path) -> Path:
    """Write the results file, which tells where the runs were made, and print the table."""
    told = json.loads((out / "bf16" / f"seed-{SEEDS[0]}" / "env.json").read_text(encoding="utf-8"))
    content = {
        "scale": scale, "run": run.resolved(), "sigma": arms.sigma, "baseline": arms.baseline, "close": arms.close,
        "losses": arms.losses, "gaps": {n: arms.gap(n) for n, v in arms.losses.items() if v},
        "status": {n: a.status for n, a in arms.by_name.items()}, "spikes": {n: arms.spikes(n) for n in arms.by_name},
    }  # fmt: skip
    print(f"baseline {arms.baseline:.4f}, sigma {arms.sigma:.4f}")
    return checks_file.write(f"linear_quantization_{scale}", told, content, checks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=["cpu", "gpu"])
    parser.add_argument("--data", required=True, help="folder made by `lowbits data prepare`")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, help="runs at a time")
    parser.add_argument("--as-is", action="store_true", help="train nothing: check the runs that are there")
    arguments = parser.parse_args()
    on_cpu = arguments.scale == "cpu"
    names, base = (CPU_ARMS, CPU_RUN) if on_cpu else (GPU_ARMS, GPU_RUN)
    device = torch.device("cpu" if on_cpu else "cuda")
    run = replace(base, data=arguments.data, compute=replace(base.compute, device=Device(device.type)))
    out = arguments.out
    arms = Arms(summarize(out) if arguments.as_is else compare(names, SEEDS, run, out, jobs=arguments.jobs))
    checks = training_checks(arms)
    if on_cpu:
        seeds = [seed for seed in SEEDS if all(checkpoints(out, arm, seed) for arm in PROBED)]
        data = TokenData.open(arguments.data)
        checks += [
            weight_error_check(out),
            post_training_check(out, run, data, seeds),
            sharpness_check(out, data, run, seeds),
        ]
    print(write(arguments.scale, arms, checks, run, out))


if __name__ == "__main__":
    main()
