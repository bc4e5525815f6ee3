# SPDX-License-Identifier: Apache-2.0
"""Measure a model: its loss on the validation split, quantizers on and off, and a sample of its text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from lowbits.analysis import causal_loss
from lowbits.data import TokenData
from lowbits.nn import high_precision, set_step_
from lowbits.train._batch import autocast
from lowbits.train._run import Run
from lowbits.train._seeds import derived_seed
from lowbits.train._world import World

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PROMPT, _SAMPLE = 16, 80  # tokens


def evaluate(run: Run, data: TokenData, model: PreTrainedModel, world: World) -> dict[str, float | None]:
    """Return `loss_on` and `loss_off`: validation losses with the quantizers on and off, None where not finite.

    And `loss_NAME` of every other form that the method gives the model.

    Stochastic rounding draws the same bits in every evaluation, so that two evaluations differ by the weights alone.

    Args:
        run: says how many batches, and the precision.
        data: the validation split is read from its beginning.
        model: not wrapped; left in training mode.
        world: each process takes its share of the batches.
    """
    model.eval()
    set_step_(model, 0)
    try:
        loss_on = _validation_loss(run, data, model, world)
        with high_precision(model):
            loss_off = _validation_loss(run, data, model, world)
        losses = {"loss_on": loss_on, "loss_off": loss_off}
        for name, form in run.method.forms(model).items():
            with form:
                losses[f"loss_{name}"] = _validation_loss(run, data, model, world)
    finally:
        model.train()
    return {name: loss if math.isfinite(loss) else None for name, loss in losses.items()}


@torch.no_grad()
def _validation_loss(run: Run, data: TokenData, model: nn.Module, world: World) -> float:
    size = run.batch_size // run.accumulation
    total = torch.zeros(2, dtype=torch.float64, device=world.device)
    batches = data.val_batches(size, run.block, run.watching.eval_batches * run.batch_size)
    for number, ids in enumerate(batches):
        if number % world.size == world.rank:
            with autocast(run, world):
                loss = causal_loss(model, ids.to(world.device))
            total += torch.stack([loss.double() * len(ids), torch.tensor(float(len(ids)), device=world.device)])
    nats, windows = world.mean(total).tolist()
    return nats / windows


@torch.no_grad()
def sample(run: Run, data: TokenData, model: PreTrainedModel, world: World) -> str:
    """Return text that the model writes, quantizers on, after the first words of the validation split.

    Args:
        run: its seed fixes the draw.
        data: the prompt comes from here.
        model: not wrapped; left in training mode.
        world: where to compute.
    """
    prompt = next(data.val_batches(1, run.block, 1))[:, : min(_PROMPT, run.block // 2)].to(world.device)
    model.eval()
    set_step_(model, 0)
    streams = torch.random.fork_rng(devices=[world.device] if world.device.type == "cuda" else [])
    eager = torch.compiler.set_stance("force_eager")  # every length would be compiled anew, layer by layer
    with streams, eager, autocast(run, world):
        torch.manual_seed(derived_seed(run.seed, "sample"))
        written = model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(_SAMPLE, run.block - prompt.shape[1]),
            do_sample=True,
            temperature=0.8,
            top_k=50,
            pad_token_id=data.eos_id,
        )
    model.train()
    return str(data.tokenizer().decode(written[0], skip_special_tokens=True))
