# SPDX-License-Identifier: Apache-2.0
"""`ranks` (H5), under torchrun: DDP's replicas and fully_shard's shards against one GPU, after 100 steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from experiments.direct_quantized_training.device import DEVICE, ON_GPU
from experiments.direct_quantized_training.model import Llama, Shape, start_
from experiments.direct_quantized_training.results import Check, Ways
from lowbits.methods.dqt import Environment, codes_of, quantize_
from lowbits.nn import Grid, GridLinear
from lowbits.optim import AdamW8bit

SHAPE = Shape(512, 512, 1536, 4, 8)
BATCH, LENGTH = 8, 128
GRIDS = {"int8": Grid.of(8), "ternary": Grid.of(1.58)}


def batch(step: int, vocab: int) -> Tensor:
    ids = torch.randint(0, vocab, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return ids.to(DEVICE)


def model(shape: Shape, grid: Grid) -> Llama:
    made = Llama(shape)
    start_(made, 0)
    quantize_(made, grid, environment=Environment.BF16)
    return made.to(DEVICE)


def train(network: nn.Module, net: nn.Module, steps: int, vocab: int, whole_batch: bool) -> None:
    optimizer = AdamW8bit(net.parameters(), lr=1e-3)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for step in range(steps):
        ids = batch(step, vocab) if whole_batch else batch(step, vocab).chunk(ranks)[rank]
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss = network(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def shard_(net: Llama) -> None:
    """Layers of codes by themselves: `fully_shard` wants one dtype in a group, and gains of norms are float32."""
    for block in net.blocks:
        for layer in block.modules():
            if isinstance(layer, GridLinear):
                fully_shard(layer)
        fully_shard(block)
    fully_shard(net)


def gathered(net: nn.Module) -> list[list[Tensor]]:
    """Codes of all ranks, on the CPU."""
    found = []
    for p in codes_of(net).values():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, p.codes.cpu())
        found.append(parts)
    return found


def main(shape: Shape, steps: int, results: Path) -> None:
    """Every rank reads the whole batch under fully_shard, so that its gradients are those of one GPU."""
    # What is compared is our part: torch's own sums must not depend on chance. Warnings alone would leave the backward
    # pass of flash attention as it is.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    if ON_GPU:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if ON_GPU else "gloo")
    file = Ways("ranks", {"ranks": dist.get_world_size(), "steps": steps}, claims, DEVICE, results)
    for name, grid in GRIDS.items():
        replica = model(shape, grid)
        start = [p.codes.cpu().clone() for p in codes_of(replica).values()]
        train(DistributedDataParallel(replica), replica, steps, shape.vocab, whole_batch=False)
        parts = gathered(replica)
        apart = sum(int((mine[0] != other).sum()) for mine in parts for other in mine)
        moved = sum(int((mine[0] != before).sum()) for mine, before in zip(parts, start, strict=True))
        sharded, alone = model(shape, grid), model(shape, grid)
        shard_(sharded)
        train(sharded, sharded, steps, shape.vocab, whole_batch=True)
        train(alone, alone, steps, shape.vocab, whole_batch=True)
        pairs = zip(gathered(sharded), codes_of(alone).values(), strict=True)
        different = sum(int((torch.cat(shards) != p.codes.cpu()).sum()) for shards, p in pairs)
        if dist.get_rank() == 0:
            file.add(name, {"moved": moved, "replicas_differ": apart, "shards_differ": different})
    if dist.get_rank() == 0:
        file.tell()
    dist.destroy_process_group()


def claims(ways: dict[str, Any]) -> list[Check]:
    found = []
    for name, way in ways.items():
        a, b, moved = way["replicas_differ"], way["shards_differ"], way["moved"]
        told = f"of {moved:,} bytes of codes that training changed"
        found += [
            Check(f"H5a {name}", "DDP's replicas are equal to the bit", f"{a} bytes differ, {told}", a == 0 < moved),
            Check(f"H5b {name}", "shards are the codes of one GPU", f"{b} bytes differ, {told}", b == 0 < moved),
        ]
    return found
