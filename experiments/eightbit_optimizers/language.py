# SPDX-License-Identifier: Apache-2.0
"""`lm-cpu`: a small GPT-2 on real text under every way to store Adam's moments, three seeds each."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from experiments.eightbit_optimizers.runs import Check, Result, Runs, column, each, gaps, mean_gap, told, write
from lowbits.analysis import causal_loss
from lowbits.data import TokenData
from lowbits.formats import (
    DYNAMIC4,
    DYNAMIC8,
    E4M3,
    E4M3_NO_UNDERFLOW,
    INT8,
    UDYNAMIC8,
    UINT8,
    ULINEAR4,
    Codebook,
    Format,
)
from lowbits.nn import stable_embedding_
from lowbits.optim import AdamW, Blockwise, Exact, Quantized, StateCodec, embeddings_in_32_bits, param_groups
from lowbits.quantizers import PerTensor, QuantSpec, Rounding

STEPS, WARMUP, BATCH, LENGTH, LR, BETAS = 400, 80, 8, 64, 1e-3, (0.9, 0.95)
SHAPE = {"n_layer": 3, "n_embd": 96, "n_head": 4, "n_positions": LENGTH}
FIXED = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "activation_function": "gelu_pytorch_tanh"}
MIN_8BIT_SIZE, VAL_BATCHES, STATE_LIMIT = 4096, 40, 2.04

PUBLISHED = Codebook("udynamic8 by the published rule", UDYNAMIC8.points)
"""The unsigned book with the nearest point, be it 0. lowbits' own never rounds a positive moment to 0."""


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        first: how the first moment is stored.
        second: how the second moment is stored.
        stable: with the stable embedding, whose moments stay in 32 bits.
        weights: None keeps them in float32; else bfloat16 ones, rounded so after each step, without a master copy.
        tied: the embedding is the output head, too.
    """

    first: StateCodec = Exact()  # noqa: RUF009  frozen
    second: StateCodec = Exact()  # noqa: RUF009
    stable: bool = False
    weights: Rounding | None = None
    tied: bool = True


def blocks(first: Format, second: Format, size: int = 256) -> tuple[Blockwise, Blockwise]:
    return Blockwise(first, size), Blockwise(second, size)


def whole(first: Format, second: Format) -> tuple[Quantized, Quantized]:
    """One scale a tensor: not block-wise."""
    return Quantized(QuantSpec(first, PerTensor())), Quantized(QuantSpec(second, PerTensor()))


ARMS: dict[str, Arm] = {
    "32-bit": Arm(),
    "dynamic 256": Arm(*blocks(DYNAMIC8, UDYNAMIC8)),
    "dynamic 2048": Arm(*blocks(DYNAMIC8, UDYNAMIC8, 2048)),
    "dynamic tensor": Arm(*whole(DYNAMIC8, PUBLISHED)),
    "linear 256": Arm(*blocks(INT8, UINT8)),
    "linear tensor": Arm(*whole(INT8, UINT8)),
    "fp8 256": Arm(*blocks(E4M3, E4M3_NO_UNDERFLOW)),
    "4-bit 128": Arm(*blocks(DYNAMIC4, ULINEAR4, 128)),
    "bf16 nearest": Arm(*blocks(DYNAMIC8, UDYNAMIC8), weights=Rounding.NEAREST),
    "bf16 stochastic": Arm(*blocks(DYNAMIC8, UDYNAMIC8), weights=Rounding.STOCHASTIC),
    "stable 32-bit": Arm(stable=True),
    "stable dynamic 256": Arm(*blocks(DYNAMIC8, UDYNAMIC8), stable=True),
    "stable dynamic tensor": Arm(*whole(DYNAMIC8, PUBLISHED), stable=True),
    "stable linear tensor": Arm(*whole(INT8, UINT8), stable=True),
    "untied 32-bit": Arm(tied=False),
    "untied stable 32-bit": Arm(stable=True, tied=False),
}


def build(vocabulary: int, seed: int, arm: Arm) -> PreTrainedModel:
    """Return the model under a seed, with eager attention, which is the faster one on a CPU."""
    tokens = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None, "tie_word_embeddings": arm.tied}
    config = AutoConfig.for_model("gpt2", **tokens, **SHAPE, **FIXED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()
        if arm.stable:
            stable_embedding_(model)
    return model


def optimizer_of(model: nn.Module, arm: Arm, seed: int) -> AdamW:
    """Return AdamW with decay on matrices alone; the moments of a stable embedding stay in 32 bits."""
    groups = param_groups(model, 0.1, embeddings_in_32_bits if arm.stable else None)
    return AdamW(
        groups, LR, BETAS, first=arm.first, second=arm.second, min_8bit_size=MIN_8BIT_SIZE,
        rounding=arm.weights or Rounding.NEAREST, seed=seed,
    )  # fmt: skip


def learning_rate(step: int) -> float:
    """Return the share of the peak: linear warm-up, then a cosine down to a tenth."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


def train(data: TokenData, arm: Arm, seed: int) -> tuple[PreTrainedModel, AdamW]:
    """Train one arm under one seed."""
    model = build(data.vocab_size, seed, arm)
    if arm.weights is not None:
        model.to(torch.bfloat16)
    optimizer = optimizer_of(model, arm, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate)
    for step in range(STEPS):
        causal_loss(model, data.batch("train", step, batch_size=BATCH, block=LENGTH, seed=seed)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model, optimizer


@torch.no_grad()
def validation(model: nn.Module, data: TokenData) -> float:
    """Return the mean loss over the validation text, NaN where it is not finite."""
    batches = data.val_batches(BATCH, LENGTH, VAL_BATCHES * BATCH)
    loss = statistics.fmean(causal_loss(model, ids).item() for ids in batches)
    return loss if math.isfinite(loss) else math.nan


def state_bytes(optimizer: AdamW) -> float:
    """Return the bytes of moments a parameter, over the tensors that are large enough to be quantized."""
    large = [p for p in optimizer.state if p.numel() >= MIN_8BIT_SIZE]
    held = sum(t.nbytes for p in large for name, t in optimizer.state[p].items() if name != "step")
    return held / sum(p.numel() for p in large)


def claims() -> list[tuple[str, str, list[str], Callable[[Callable[[str], list[float]]], bool]]]:
    """The acceptance checks: id, statement, arms, and a predicate of their gaps to 32-bit, seed by seed."""

    def mean(values: list[float]) -> float:
        return statistics.fmean(math.inf if math.isnan(value) else value for value in values)

    return [
        ("C8", "8 bits in blocks of 256 within 0.005 of 32 bits, in every seed", ["dynamic 256"],
         lambda gap: all(abs(value) <= 0.005 for value in gap("dynamic 256"))),
        ("C8", "linear 8 bits more than 1 nat worse, block-wise and per tensor", ["linear 256", "linear tensor"],
         lambda gap: min(mean(gap("linear 256")), mean(gap("linear tensor"))) > 1),
        ("C8", "bf16 weights, stochastic: within 0.01", ["bf16 stochastic"],
         lambda gap: abs(mean(gap("bf16 stochastic"))) <= 0.01),
        ("C8", "bf16 weights, nearest: at least 0.02 worse", ["bf16 nearest"],
         lambda gap: mean(gap("bf16 nearest")) >= 0.02),
        ("3.6c", "dynamic block-wise never diverges (all finite, none 0.05 worse)",
         ["dynamic 256", "dynamic 2048"],
         lambda gap: all(v < 0.05 for n in ("dynamic 256", "dynamic 2048") for v in gap(n))),
        ("3.6f", "the stable embedding helps 32 bits", ["stable 32-bit"], lambda gap: mean(gap("stable 32-bit")) < 0),
        ("3.6f", "it does where the embedding is not the output head, too", ["untied 32-bit", "untied stable 32-bit"],
         lambda gap: mean(gap("untied stable 32-bit")) < mean(gap("untied 32-bit"))),
        ("T3", "order without stable embedding: linear tensor > dynamic tensor > dynamic block-wise",
         ["linear tensor", "dynamic tensor", "dynamic 256"],
         lambda gap: mean(gap("linear tensor")) > mean(gap("dynamic tensor")) > mean(gap("dynamic 256"))),
        ("T3", "the same order with it",
         ["stable linear tensor", "stable dynamic tensor", "stable dynamic 256"],
         lambda gap: mean(gap("stable linear tensor")) > mean(gap("stable dynamic tensor"))
         > mean(gap("stable dynamic 256"))),
        ("T3", "the stable embedding helps 8 bits, in each row",
         ["stable linear tensor", "stable dynamic tensor", "stable dynamic 256"],
         lambda gap: all(mean(gap(f"stable {n}")) < mean(gap(n))
                         for n in ("linear tensor", "dynamic tensor", "dynamic 256"))),
    ]  # fmt: skip


def checks(runs: Runs) -> list[Check]:
    """Compare every claim with the runs."""
    found = [
        Check(
            id, statement, ", ".join(told(runs, name, "32-bit", "loss") for name in arms),
            holds(lambda name: gaps(runs, name, "32-bit", "loss")),
        )
        for id, statement, arms, holds in claims()
    ]  # fmt: skip
    held = max(column(runs, "dynamic 256", "state_bytes"))
    statement = f"8-bit states take at most {STATE_LIMIT} bytes a parameter"
    return [*found, Check("C9", statement, f"{held:.4f}, counted", held <= STATE_LIMIT)]


def main(folder: str, out: Path) -> Path:
    """Train all arms and write the results file."""
    data = TokenData.open(folder)

    def run(name: str, seed: int) -> Result:
        model, optimizer = train(data, ARMS[name], seed)
        return {"loss": validation(model, data), "state_bytes": state_bytes(optimizer)}

    runs = each(out / "lm-cpu", list(ARMS), run)
    model = build(data.vocab_size, 0, Arm())
    setting = {
        "parameters": sum(p.numel() for p in model.parameters()), "vocabulary": data.vocab_size, "steps": STEPS,
        "tokens_a_step": BATCH * LENGTH, "lr": LR, "betas": BETAS, "min_8bit_size": MIN_8BIT_SIZE,
        "spread": statistics.stdev(column(runs, "32-bit", "loss")),
    }  # fmt: skip
    means = {name: mean_gap(runs, name, "32-bit", "loss") for name in runs}
    return write("lm_cpu", {"setting": setting, "gaps": means, "runs": runs}, checks(runs), torch.device("cpu"))
