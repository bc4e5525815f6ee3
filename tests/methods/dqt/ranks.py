# SPDX-License-Identifier: Apache-2.0
"""What every rank trains to show that codes do not depend on how many ranks there are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lowbits.methods.dqt import codes_of, quantize_
from lowbits.nn import Grid, QParameter, StepInit
from lowbits.optim import AdamW, AdamW8bit, step_in_backward

WIDTH, STEPS = 256, 3
CASES: dict[str, tuple[Grid, StepInit]] = {
    "int8": (Grid.of(8), StepInit()),
    "ternary": (Grid.of(1.58), StepInit()),
    "channel": (Grid.of(4), StepInit(per_channel=True)),
}


def model(grid: Grid, init: StepInit, rows: int = WIDTH) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(WIDTH, rows, bias=False), nn.Tanh(), nn.Linear(rows, WIDTH, bias=False))
    quantize_(made, grid, init)
    return made


def batches(step: int) -> Tensor:
    return torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(step))


def whole(name: str, net: nn.Module) -> dict[str, Tensor]:
    """Codes of all ranks, unpacked."""
    found = {}
    for key, p in net.named_parameters():
        local: Any = getattr(p, "_local_tensor", p)
        assert isinstance(local, QParameter)
        codes = local.unpacked()
        if local is not p:
            parts = [torch.empty(0, dtype=torch.int8) for _ in range(dist.get_world_size())]
            dist.all_gather_object(parts, codes)
            codes = torch.cat(parts)
        found[f"{name} {key.removeprefix('module.')}"] = codes
    return found


def sharded() -> dict[str, Tensor]:
    """Every rank reads the whole batch, so that gradients are those of one process; after AdamW with 8-bit states."""
    found = {}
    for name, (grid, init) in CASES.items():
        for rows in (WIDTH, 13) if name == "int8" else (WIDTH,):
            net = model(grid, init, rows)
            if dist.is_initialized():
                fully_shard(net)
            # Blocks of moments must be the same with and without ranks: rows of whole blocks, or float32 moments.
            optimizer = (AdamW8bit if rows == WIDTH else AdamW)(net.parameters(), lr=1e-3)
            for step in range(STEPS):
                net(batches(step)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            found |= whole(f"{name} {rows}", net)
            if dist.is_initialized() and rows == WIDTH:
                found |= reloaded(f"{name} {rows}", net, grid, init)
    return found


def reloaded(name: str, net: nn.Module, grid: Grid, init: StepInit) -> dict[str, Tensor]:
    """The state dict of shards, put into another sharded model whose codes were 0; and that of the whole."""
    other = model(grid, init)
    for p in codes_of(other).values():
        p.codes.zero_()
    fully_shard(other)
    other.load_state_dict(net.state_dict())
    return whole(f"{name} reloaded", other)


def replicated() -> dict[str, Tensor]:
    """DDP: each rank its half of the batch."""
    found = {}
    for name, (grid, init) in CASES.items():
        net = model(grid, init)
        ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if dist.is_initialized() else 0
        network = DistributedDataParallel(net) if ranks > 1 else net
        optimizer = AdamW(net.parameters(), lr=1e-3)
        for step in range(STEPS):
            network(batches(step).chunk(ranks)[rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found |= whole(name, net)
        if ranks > 1:
            mine = [None] * ranks
            dist.all_gather_object(mine, [p.codes for p in codes_of(net).values()])
            assert all(torch.equal(a, b) for other in mine for a, b in zip(mine[0], other, strict=True))  # type: ignore[arg-type]
    return found


def in_backward() -> dict[str, Tensor]:
    """Shards updated in the backward pass."""
    grid, init = CASES["int8"]
    net = model(grid, init)
    if dist.is_initialized():
        fully_shard(net)
    optimizer = AdamW8bit(net.parameters(), lr=1e-3)
    handle = step_in_backward(net, optimizer)
    for step in range(STEPS):
        net(batches(step)).square().mean().backward()
    handle.remove()
    return whole("in backward", net)


def write(folder: Path) -> None:
    """Write what all of them return, from the first rank."""
    found = {"sharded": sharded(), "replicated": replicated(), "in backward": in_backward()}
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")
