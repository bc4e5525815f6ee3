# SPDX-License-Identifier: Apache-2.0
"""What every rank trains to show that rules of whole tensors see whole tensors."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lowbits.optim import LAMB, LARS, Adafactor, CodecOptimizer

SHAPES = {"even": (6, 256), "odd": (7, 512), "few": (2, 256), "deep": (3, 4, 64), "vector": (9,)}
KINDS = {"LAMB": (LAMB, {}), "LARS": (LARS, {"lr": 1.0}), "Adafactor": (Adafactor, {"beta1": 0.9})}


def train() -> dict[str, torch.Tensor]:
    """Return the parameters after three steps of every optimizer, sharded where there is a group."""
    found = {}
    for kind, (optimizer_class, hyper) in KINDS.items():
        model = nn.ParameterDict()
        generator = torch.Generator().manual_seed(0)
        model.update({n: nn.Parameter(torch.randn(shape, generator=generator)) for n, shape in SHAPES.items()})
        if dist.is_initialized():
            fully_shard(model)
        optimizer: CodecOptimizer = optimizer_class(model.parameters(), **hyper)
        for step in range(3):
            for p in model.parameters():
                p.grad = p.detach() * (step + 1) + torch.ones_like(p)
            optimizer.step()
        for name, p in model.named_parameters():
            found[f"{kind} {name}"] = p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
    return found


def write(file: Path) -> None:
    """Write what `train` returns, from the first rank."""
    found = train()
    if dist.get_rank() == 0:
        torch.save(found, file)
