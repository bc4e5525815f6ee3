# SPDX-License-Identifier: Apache-2.0
"""Refuse a checkpoint that does not fit, before anything of an optimizer is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbits.errors import CheckpointError
from lowbits.optim._clipping import HISTORY, Percentile
from lowbits.optim._sharding import is_sharded, local, stored_shape

if TYPE_CHECKING:
    from lowbits.optim._optimizer import CodecOptimizer

State = dict[str, Any]


def check_same_groups(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a checkpoint's parameter groups are not as many, or not as long, as the optimizer's.

    Raises:
        CheckpointError: names both.
    """
    theirs, ours = ([len(g["params"]) for g in side] for side in (state_dict["param_groups"], groups))
    if theirs != ours:
        raise CheckpointError(
            f"optimizer: the checkpoint's groups have {theirs} parameters, these have {ours}. Build the optimizer, and "
            "add groups, as when it was written."
        )


def check_layouts(state_dict: Mapping[str, Any], codecs: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a moment was stored in another way: other bits, code book or block size.

    Args:
        state_dict: its groups say in words how moments are stored; the words may be missing.
        codecs: of each group of the optimizer, by key.
    Raises:
        CheckpointError: names group, moment and both layouts.
    """
    for number, (group, ours) in enumerate(zip(state_dict["param_groups"], codecs, strict=True)):
        for moment, codec in ours.items():
            theirs = group.get(moment)
            if isinstance(theirs, str) and theirs != codec.layout:
                raise CheckpointError(
                    f"optimizer: the {moment} moment of group {number} is stored as {theirs!r}, here as "
                    f"{codec.layout!r}. Resume with the codecs that the checkpoint was written with."
                )


def by_parameter(
    state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> list[tuple[Tensor, Mapping[str, Any], State]]:
    """Return every parameter with its group and its state, which is empty where there is none.

    Args:
        state_dict: its parameters go by numbers, or by names as `torch.distributed.checkpoint` has them.
        groups: of the optimizer, with as many parameters.
    """
    keys = [key for group in state_dict["param_groups"] for key in group["params"]]
    params = [(p, group) for group in groups for p in group["params"]]
    unknown = set(state_dict["state"]) - set(keys)
    if unknown:
        raise CheckpointError(f"optimizer: the checkpoint has state for {sorted(unknown)[0]!r}, which is in no group.")
    return [(p, group, state_dict["state"].get(key, {})) for key, (p, group) in zip(keys, params, strict=True)]


def check_state(optimizer: CodecOptimizer, index: int, p: Tensor, group: Mapping[str, Any], state: State) -> None:
    """Raise where the state of a parameter does not have the tensors that its codecs store.

    Raises:
        CheckpointError: names the moment, what it is stored as, and what is expected.
    """
    like = torch.empty_like(local(p), device="meta")
    for moment, codec in optimizer.codecs(p, group).items():
        part = moment + "."
        want = {k: (stored_shape(t.shape, p), t.dtype) for k, t in codec.init(like).items()}
        got = {k.removeprefix(part): (tuple(t.shape), t.dtype) for k, t in state.items() if k.startswith(part)}
        if want != got:
            raise CheckpointError(
                f"optimizer: the {moment} moment of parameter {index} {tuple(p.shape)} is stored as {got}, "
                f"{codec} stores {want}. Resume with the recipe that the checkpoint was written with."
            )
    for name, tensor in state.items():
        if is_sharded(tensor) and not (is_sharded(p) and tensor.placements == p.placements):
            raise CheckpointError(
                f"optimizer: {name} of parameter {index} is sharded and the parameter is not, or otherwise. Load it "
                "with torch.distributed.checkpoint, which moves it, or gather it with full_state_dict=True."
            )
    clip = optimizer.clip
    if isinstance(clip, Percentile) and HISTORY in state and state[HISTORY].shape != (clip.history,):
        raise CheckpointError(
            f"optimizer: {state[HISTORY].numel()} gradient norms are stored for parameter {index}, {clip} keeps "
            f"{clip.history}. Resume with the history that the checkpoint was written with."
        )


def restored_rate(ours: float | Tensor, saved: float | Tensor, others: Sequence[float | Tensor]) -> float | Tensor:
    """Return a learning rate to go on with: the saved value, in our own tensor where it is one and this group's alone.

    Captured and compiled steps read that tensor, so another one in its place would be without effect.
    """
    if isinstance(ours, Tensor) and not any(ours is other for other in others):
        return ours.copy_(torch.as_tensor(saved))
    return saved
