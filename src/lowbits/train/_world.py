# SPDX-License-Identifier: Apache-2.0
"""Say where this process trains and with how many others.

Under `torchrun` each process takes one device and DDP averages the gradients. Sharded training (FSDP2) would replace
`World.wrap` and the gathering in `_checkpoint.py`; nothing else knows how a model is spread.
"""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowbits.errors import RunError
from lowbits.train._run import Device


@dataclass(frozen=True)
class World:
    """Hold one process's place among the processes of a run.

    Args:
        device: where this process computes.
        rank: number of this process.
        size: number of processes.
    """

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the files and speaks to the person."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as the loop calls it: itself, or under DDP.

        Buffers are not broadcast: the noise counter of a quantized layer is each process's own.
        """
        if self.size == 1:
            return model
        # torch 2.13 renamed the option and warns of the old name; 2.11 knows the old one alone.
        renamed = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
        options: dict[str, Any] = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
        return DistributedDataParallel(model, **options)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of a tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
            values = values / self.size
        return values

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            dist.barrier()

    def gather(self, value: object) -> list[object]:
        """Return every process's value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[object] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


def unsynchronized(network: nn.Module) -> AbstractContextManager[None]:
    """Return the context of a micro-batch that is not the last: DDP leaves the gradients unreduced."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()


def choose_device(wish: Device, local_rank: int = 0) -> torch.device:
    """Return the device of this process.

    Args:
        wish: what the run asks for.
        local_rank: number of this process on its machine.
    Raises:
        RunError: CUDA was asked for and there is none, or there are fewer devices than processes.
    """
    available = torch.cuda.is_available()
    if wish is Device.CUDA and not available:
        raise RunError("--device cuda was asked for, but torch sees no CUDA device here; use --device cpu or auto.")
    if wish is Device.CPU or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RunError(
            f"process {local_rank} has no CUDA device of its own, there are {torch.cuda.device_count()}; "
            "start fewer processes."
        )
    return torch.device("cuda", local_rank)


@contextmanager
def world(wish: Device) -> Iterator[World]:
    """Join the processes that `torchrun` started, or stand alone, for as long as the block lasts.

    Args:
        wish: the device that the run asks for.
    """
    if not dist.is_torchelastic_launched():
        yield World(choose_device(wish))
        return
    device = choose_device(wish, int(os.environ["LOCAL_RANK"]))  # set by torchrun, with rank and size beside it
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(device, dist.get_rank(), dist.get_world_size())
    finally:
        if ours:
            # Gloo's thread needs the interpreter's lock to let go of the last collective's tensors, and whoever frees
            # the group waits for that thread with the lock in hand: forever, if both happen at once (seen in torch
            # 2.13). It gets the lock while this one sleeps.
            time.sleep(0.2)
            dist.destroy_process_group()
