# SPDX-License-Identifier: Apache-2.0
"""Train with 8-bit weights, activations and gradients in a loop of your own."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lowbits.nn import convert_, high_precision, set_step_
from lowbits.optim import AdamW, param_groups
from lowbits.recipes import named


def main() -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(sizes)
    convert_(model, named("w8a8g8"))
    optimizer = AdamW(param_groups(model, weight_decay=0.1), lr=3e-3)

    tokens = torch.arange(32).repeat(8, 1) + torch.randint(0, 32, (8, 1))  # something to learn: counting
    for step in range(30):
        set_step_(model, step)  # the counter of the random bits, for recipes that round stochastically
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        on = model(input_ids=tokens, labels=tokens).loss
        with high_precision(model):
            off = model(input_ids=tokens, labels=tokens).loss
    print(f"loss after 30 steps: {on:.4f} with the quantizers on, {off:.4f} with them off")


if __name__ == "__main__":
    main()
