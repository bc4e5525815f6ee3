# SPDX-License-Identifier: Apache-2.0
"""`lm-cpu`: a small GPT-2 on real text, trained in bfloat16, under GaussWS and under DiffQ, then stored in few bits."""

from __future__ import annotations

import statistics
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from experiments.checks import Check
from experiments.eightbit_optimizers.runs import Runs, column, each, gaps, mean_gap, told
from experiments.gaussian_weight_sampling.casting import FORMATS
from experiments.gaussian_weight_sampling.results import write
from experiments.gaussian_weight_sampling.training import Setting, cast_claims, measure, six_bits
from lowbits.data import TokenData
from lowbits.methods import Method
from lowbits.methods.diffq import DiffQ, Form
from lowbits.methods.gaussws import GaussWS, PseudoNoise

SETTING = Setting(steps=400, warmup=40, batch=16, length=64, lr=2e-3, validation=40)
SHAPE = {"n_layer": 4, "n_embd": 64, "n_head": 4, "n_positions": 64, "activation_function": "gelu_pytorch_tanh"}
FIXED = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}

ARMS: dict[str, Method] = {
    "bf16": Method(),
    "GaussWS 6 to 4": GaussWS(),
    "GaussWS 6 to 4, fast bits": GaussWS(bit_lr=0.02, pull=1.0),
    "GaussWS 9": GaussWS(b_init=9.0, b_target=9.0),
    "GaussWS 4": GaussWS(b_init=4.0),
    "GaussWS 3": GaussWS(b_init=3.0, b_target=3.0),
    "DiffQ matched 6 to 4": DiffQ(
        form=Form.MATCHED, noise=PseudoNoise.UNIFORM, b_init=6.0, b_min=4.0, penalty=0.1, bit_lr=None
    ),
    "uniform 4": GaussWS(noise=PseudoNoise.UNIFORM, b_init=4.0),
    "DiffQ library": DiffQ(),
}
"""GaussWS with the paper's decay, and one whose bits have a learning rate that lets 400 steps move them; fixed bits."""


def build(vocabulary: int, seed: int) -> PreTrainedModel:
    """Return the model under a seed, with eager attention, which is the faster one on a CPU."""
    tokens = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None}
    config = AutoConfig.for_model("gpt2", **tokens, **SHAPE, **FIXED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").train()


def checks(runs: Runs) -> list[Check]:
    """B13, D7 at this scale, and the orderings of section 3.3 of the specification."""
    found = []
    for name in ("GaussWS 6 to 4", "GaussWS 4", "GaussWS 9"):
        found.append(Check("B13", f"{name}: at most 0.03 behind bf16, in every seed", told(runs, name, "bf16", "loss"),
                           max(gaps(runs, name, "bf16", "loss")) <= 0.03))  # fmt: skip
    slow = column(runs, "GaussWS 6 to 4", "bits")
    found.append(Check("B13", "mean bits fall from 6", " ".join(f"{b:.3f}" for b in slow), max(slow) < 6))
    above = column(runs, "GaussWS 6 to 4, fast bits", "above the target")
    found.append(Check("c", "with fast bits most blocks end above 4", " ".join(f"{share:.2f}" for share in above),
                       min(above) > 0.5))  # fmt: skip
    found.append(Check("b", "GaussWS at or below matched DiffQ",
                       told(runs, "GaussWS 6 to 4", "DiffQ matched 6 to 4", "loss"),
                       mean_gap(runs, "GaussWS 6 to 4", "DiffQ matched 6 to 4", "loss") <= 0))  # fmt: skip
    claims = cast_claims(runs, "GaussWS 4", ["FP8 e4m3", "FP6 e3m2", "FP4 e2m1"])
    claims += cast_claims(runs, "GaussWS 3", ["FP4 e2m1"])
    found += [Check("d", *claim) for claim in claims]
    return [*found, Check("D7", *six_bits(runs, "GaussWS 4"))]


def main(folder: str, out: Path) -> Path:
    """Train what is not there yet, and report."""
    data = TokenData.open(folder)
    runs = each(
        out, list(ARMS), lambda name, seed: measure(build(data.vocab_size, seed), data, ARMS[name], seed, SETTING)
    )
    setting = {
        "parameters": sum(p.numel() for p in build(data.vocab_size, 0).parameters()), "steps": SETTING.steps,
        "tokens_a_step": SETTING.batch * SETTING.length, "vocabulary": data.vocab_size, "formats": list(FORMATS),
        "spread": statistics.stdev(column(runs, "bf16", "loss")),
    }  # fmt: skip
    return write("lm_cpu", {"setting": setting, "runs": runs}, checks(runs), "cpu")
