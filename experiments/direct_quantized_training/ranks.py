# SPDX-License-Identifier: Apache-2.0
"""`ranks` (H5), under torchrun: DDP's replicas and fully_shard's shards against one GPU, after 100 steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from experiments.direct_quantized_training.model import Llama, Shape, start_
from experiments.direct_quantized_training.results import Check, write
from lowbits.methods.dqt import Environment, codes_of, quantize_
from lowbits.nn import Grid
from lowbits.optim import AdamW8bit

SHAPE = Shape(512, 512, 1536, 4, 8)
STEPS, BATCH, LENGTH = 100, 8, 128


def batch(step: int) -> Tensor:
    return torch.randint(0, SHAPE.vocab, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step)).cuda()


def model(grid: Grid) -> Llama:
    made = Llama(SHAPE)
    start_(made, 0)
    quantize_(made, grid, environment=Environment.BF16)
    return made.cuda()


def train(network: nn.Module, net: nn.Module, whole_batch: bool) -> None:
    optimizer = AdamW8bit(net.parameters(), lr=1e-3)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        ids = batch(step) if whole_batch else batch(step).chunk(ranks)[rank]
        with torch.autocast("cuda", torch.bfloat16):
            loss = network(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def gathered(net: nn.Module) -> list[list[Tensor]]:
    """Codes of all ranks, on the CPU."""
    found = []
    for p in codes_of(net).values():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, p.codes.cpu())
        found.append(parts)
    return found


def main() -> None:
    """Every rank reads the whole batch under fully_shard, so that its gradients are those of one GPU."""
    dist.init_process_group("nccl")
    torch.cuda.set_device(dist.get_rank())
    torch.use_deterministic_algorithms(True, warn_only=True)
    checks = []
    for name, grid in {"int8": Grid.of(8), "ternary": Grid.of(1.58)}.items():
        replica = model(grid)
        train(DistributedDataParallel(replica), replica, whole_batch=False)
        alike = all(torch.equal(parts[0], other) for parts in gathered(replica) for other in parts)
        checks.append(
            Check(f"H5a {name}", f"DDP's replicas are equal to the bit after {STEPS} steps", str(alike), alike)
        )
        sharded, alone = model(grid), model(grid)
        for block in sharded.blocks:
            fully_shard(block)
        fully_shard(sharded)
        train(sharded, sharded, whole_batch=True)
        train(alone, alone, whole_batch=True)
        pairs = zip(gathered(sharded), codes_of(alone).values(), strict=True)
        different = [int((torch.cat(parts) != p.codes.cpu()).sum()) for parts, p in pairs]
        told = f"{sum(different)} bytes differ"
        checks.append(Check(f"H5b {name}", "shards are the codes of one GPU", told, not any(different)))
    if dist.get_rank() == 0:
        write("ranks", {"ranks": dist.get_world_size(), "steps": STEPS}, checks, torch.device("cuda"))
    dist.destroy_process_group()
