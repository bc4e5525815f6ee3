# SPDX-License-Identifier: Apache-2.0
"""Choose a recipe for each layer: a callable sees its name and the module."""

from __future__ import annotations

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lowbits.nn import Recipe, convert_, quantized_layers
from lowbits.recipes import named


def choose(name: str, module: nn.Module) -> Recipe | None:
    """4 bits for the weights of the MLPs, 8 bits for attention; the first block and the head stay as they are."""
    if name == "lm_head" or ".layers.0." in name:
        return None
    return named("w4_channel") if ".mlp." in name else named("w8a8")


def main() -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=2
    )
    model = LlamaForCausalLM(sizes)
    conversion = convert_(model, choose)
    tokens = torch.randint(0, 64, (4, 32))
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(layer.weight.grad is not None for layer in quantized_layers(model).values())
    print(f"{len(conversion.converted)} layers quantized, {len(conversion.left)} left alone")


if __name__ == "__main__":
    main()
