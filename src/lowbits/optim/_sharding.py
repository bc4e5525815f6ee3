# SPDX-License-Identifier: Apache-2.0
"""Moments of sharded parameters (`fully_shard`, tensor parallelism): computed shard by shard, stored as DTensors.

What is stored has the parameter's mesh and placements, so `torch.distributed.checkpoint` moves it to any number of
ranks bit for bit. For that no edge of a shard may cut a block: `fully_shard` cuts between the rows of dimension 0, so
the blocks of a DTensor's moments lie within rows, whatever the number of ranks.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._codec import FLOAT32, Exact, StateCodec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Spread = tuple[tuple["DeviceMesh", int], ...]
"""The mesh dimensions over which a tensor is sharded; empty where every rank has all of it."""


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether a tensor is a DTensor; where its module was never imported (a second), there are none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, sharing its memory, and any other tensor as it is."""
    return tensor.to_local() if is_sharded(tensor) else tensor.detach()


def add_up_gradient_(p: Tensor) -> None:
    """Shard a parameter's gradient like the parameter.

    Under sequence parallelism that of a norm is left as one summand a rank; here they are added up.
    """
    if is_sharded(p) and p.grad is not None and is_sharded(p.grad) and p.grad.placements != p.placements:
        p.grad = p.grad.redistribute(p.device_mesh, p.placements)


def first_element(p: Tensor) -> int:
    """Return which element of the whole flattened parameter this rank's shard begins with.

    Raises:
        SpecError: the shard is not contiguous in the whole: it is cut along another dimension than the first.
    """
    if not is_sharded(p):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if not _by_rows(p):
        raise SpecError(
            f"stochastic rounding of a parameter {tuple(p.shape)} sharded as {p.placements}: only shards of dimension "
            "0 draw the same bits on any number of ranks. Use Rounding.NEAREST for it."
        )
    _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    return offsets[0] * math.prod(p.shape[1:])


def fitted(codec: StateCodec, p: Tensor) -> tuple[StateCodec, str]:
    """Return how a moment of a parameter is stored, and why if that is not the codec itself.

    Args:
        codec: chosen for the moment.
        p: the parameter; plain tensors are stored as chosen.
    Raises:
        SpecError: it is a flat parameter of FSDP1, which would save these states wrongly.
    """
    if isinstance(codec, Exact):
        return codec, ""
    if getattr(p, "_fsdp_flattened", False):
        raise SpecError(
            "FullyShardedDataParallel (FSDP1) gathers optimizer states as if each had its parameter's shape, which "
            "scales have not. Use torch.distributed.fsdp.fully_shard, or float32 moments."
        )
    if not is_sharded(p):
        return codec, ""
    if not isinstance(codec, Blockwise):
        return FLOAT32, "sharded: only block-wise codecs have a sharded form"
    if p.ndim == 0 or not _by_rows(p):
        return FLOAT32, "sharded along another dimension than the first"
    row = math.prod(p.shape[1:])
    size = next((size for size in range(codec.size, 63, -16) if row % size == 0), 0)
    if not size or not row:
        return FLOAT32, f"sharded, and no block of 64 to {codec.size} elements divides a row of {row}"
    if size != codec.size:
        return Blockwise(codec.format, size), f"sharded: blocks of {size} divide a row of {row}"
    return codec, ""


def as_stored(part: Tensor, p: Tensor) -> Tensor:
    """Return what this rank holds of a state tensor as a tensor sharded like its parameter.

    Args:
        part: of the local shard's shape, or with the same rows.
        p: the parameter; for a plain one the result is `part`.
    """
    if not is_sharded(p):
        return part
    from torch.distributed.tensor import DTensor

    shape = torch.Size(stored_shape(part.shape, p))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def stored_shape(part: torch.Size, p: Tensor) -> tuple[int, ...]:
    """Return the shape of a whole state tensor from that of this rank's part, see `as_stored`."""
    if not is_sharded(p):
        return tuple(part)
    return tuple(p.shape) if part == local(p).shape else (*p.shape[:1], *part[1:])


def shard_of(whole: Tensor, p: Tensor) -> Tensor:
    """Return a whole state tensor that every rank holds, sharded like its parameter; without communication."""
    if not is_sharded(p) or is_sharded(whole) or whole.ndim == 0:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None)


def spread(p: Tensor) -> Spread:
    """Return the mesh dimensions over which sums of a parameter's elements must be added up."""
    if not is_sharded(p):
        return ()
    return tuple((p.device_mesh, i) for i, placement in enumerate(p.placements) if not placement.is_replicate())


def sum_over_ranks(value: Tensor, over: Spread) -> Tensor:
    """Return a local sum added up over the ranks that hold the other shards; replicated elements count once."""
    for mesh, dimension in over:
        value = value.clone()
        torch.distributed.all_reduce(value, group=mesh.get_group(dimension))
    return value


def _by_rows(p: Any) -> bool:
    return all(placement.is_replicate() or getattr(placement, "dim", None) == 0 for placement in p.placements)
