# SPDX-License-Identifier: Apache-2.0
"""Go on from a checkpoint of torch.optim, bitsandbytes or torchao, and hand one over to torch.optim.

bitsandbytes keeps `state1`, `state2` and, of tensors in 8 bits, `absmax` (one scale a block of 256, of 2048 before
0.44) and `qmap` (the code book) of both; AdEMAMix stacks both momenta in `state1`. Newer versions nest them in another
dict; older ones keep `gnorm_vec`, the squares of the last 100 gradient norms. torchao's moments are tensor subclasses
with `codes`, `scale` and `qmap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowbits.errors import CheckpointError, SpecError
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._checkpoint import by_parameter
from lowbits.optim._clipping import HISTORY, Percentile
from lowbits.optim._codec import StateCodec, Stored
from lowbits.optim._sharding import as_stored, is_sharded, local
from lowbits.quantizers import Noise

if TYPE_CHECKING:
    from lowbits.optim._optimizer import CodecOptimizer

_NESTED = "__bnb_optimizer_quant_state__"
_NOT_STATE = {"step", "unorm_vec", "gnorm_vec"}
_BNB_GROUP = ("lr", "betas", "eps", "weight_decay", "initial_lr")
_BNB_SCHEDULES = ("alpha", "t_alpha", "t_beta3")  # in every group, of use to AdEMAMix alone
_TORCH = {
    "adamw": (torch.optim.AdamW, {"first": "exp_avg", "second": "exp_avg_sq"}),
    "adam": (torch.optim.Adam, {"first": "exp_avg", "second": "exp_avg_sq"}),
    "momentum": (torch.optim.SGD, {"first": "momentum_buffer"}),
    "rmsprop": (torch.optim.RMSprop, {"second": "square_avg"}),
    "adagrad": (torch.optim.Adagrad, {"second": "sum"}),
}


@dataclass(frozen=True)
class Coded:
    """A moment in another library's codes.

    Args:
        codes: uint8, the parameter's shape.
        points: what each code stands for, float32 [256].
        scale: of each block of the flattened tensor, float32.
    """

    codes: Tensor
    points: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        """Elements of a block, told from the number of scales."""
        count, blocks = self.codes.numel(), self.scale.numel()
        sizes = (256, 128, 64, 512, 1024, 2048, 4096)
        found = next((size for size in sizes if math.ceil(count / size) == blocks), None)
        if found is None:
            raise CheckpointError(f"optimizer: {blocks} scales for {count} codes are no block-wise state.")
        return found

    def decode(self) -> Tensor:
        """Return the moment, float32."""
        scale = self.scale.reshape(-1).repeat_interleave(self.size)[: self.codes.numel()]
        return self.points[self.codes.long()] * scale.view(self.codes.shape)


def translated(state_dict: dict[str, Any], optimizer: CodecOptimizer) -> dict[str, Any]:
    """Return a checkpoint in the layout of `CodecOptimizer`; one that has it already comes back as it is.

    Args:
        state_dict: of this library, torch.optim, bitsandbytes or torchao.
        optimizer: with as many parameters.
    Raises:
        CheckpointError: it holds a state that the optimizer's rule does not have.
    """
    found = [
        (p, group, {**s, **s.get(_NESTED, {})}) for p, group, s in by_parameter(state_dict, optimizer.param_groups)
    ]
    keys = {key for _, _, state in found for key in state} - {"step", _NESTED}
    if all("." in key for key in keys):  # our names are of the form moment.part
        return state_dict
    groups = optimizer.state_dict()["param_groups"]
    for ours, theirs in zip(groups, state_dict["param_groups"], strict=True):
        known = (*_BNB_GROUP, *(_BNB_SCHEDULES if "t_alpha" in ours else ())) if "state1" in keys else ours
        ours.update({key: theirs[key] for key in known if key in theirs and key in ours and key != "params"})
        ours.update({key: theirs[key] for key in theirs if key == "initial_lr"})  # a schedule's
    states = {i: _encoded(optimizer, *entry) for i, entry in enumerate(found) if entry[-1]}
    return {"state": states, "param_groups": groups}


def to_torch_state_dict(optimizer: CodecOptimizer) -> dict[str, Any]:
    """Return an optimizer's state as `load_state_dict` of the same optimizer of torch.optim takes it.

    Moments are float32 and what the next step would have seen, so training goes on as if they had never been in codes.

    Args:
        optimizer: AdamW, Adam, SGD, RMSprop or Adagrad.
    Returns:
        `state` by number of the parameter and `param_groups`, with torch's defaults for what is not offered here.
    Raises:
        SpecError: torch has no such optimizer.
    """
    if optimizer.rule.name not in _TORCH:
        raise SpecError(f"torch.optim has no counterpart of {type(optimizer).__name__}; there is one of {[*_TORCH]}.")
    counterpart, names = _TORCH[optimizer.rule.name]
    defaults = counterpart([torch.nn.Parameter(torch.zeros(1))]).defaults
    packed = optimizer.state_dict()
    groups = [
        {key: group.get(key, default) for key, default in defaults.items()} | {"params": group["params"]}
        for group in packed["param_groups"]
    ]
    params = [(p, optimizer.rule_of(group)) for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {"step": optimizer.state[p]["step"].clone()}
        | {name: optimizer.moment(p, moment).clone() for moment, name in names.items() if moment in rule.moments}
        for index, (p, rule) in enumerate(params)
        if optimizer.state.get(p)
    }
    return {"state": state, "param_groups": groups}


def _encoded(
    optimizer: CodecOptimizer, p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the state of one parameter as the optimizer stores it."""
    moments = _moments(state, [*optimizer.rule_of(group).moments])
    step = torch.as_tensor(state.get("step", 1), dtype=torch.float32).clone()  # torch's SGD counts none
    new = {"step": step}
    for moment, codec in optimizer.codecs(p, group).items():
        value = moments[moment]
        count = (value.codes if isinstance(value, Coded) else value).numel()
        if count != p.numel():
            raise CheckpointError(
                f"optimizer: the {moment} moment of a parameter {tuple(p.shape)} has {count} elements. Load the "
                "checkpoint into the same model."
            )
        stored = _stored(value, codec, p, Noise.of(optimizer.seed, "import", moment), step.to(torch.int64))
        new.update({f"{moment}.{part}": tensor for part, tensor in stored.items()})
    if isinstance(optimizer.clip, Percentile) and "gnorm_vec" in state:
        new[HISTORY] = state["gnorm_vec"].float().sqrt()
    return new


def _moments(state: Mapping[str, Any], names: list[str]) -> dict[str, Tensor | Coded]:
    """Return a foreign state's moments under our names."""
    if "state1" in state:
        found = dict(zip(names, _of_bitsandbytes(state, stacked=len(names) == 3), strict=False))
        used = {f"{part}{number}" for part in ("state", "qmap", "absmax") for number in (1, 2)}
    else:
        keys = {moment: key for _, moments in _TORCH.values() for moment, key in moments.items() if key in state}
        found = {moment: _of_torch(state[key]) for moment, key in keys.items()}
        used = set(keys.values())
    strange = {key for key, value in state.items() if value is not None} - used - _NOT_STATE - {_NESTED}
    if strange or set(found) != set(names):
        raise CheckpointError(
            f"optimizer: the checkpoint holds {', '.join(sorted(strange or used & state.keys()))}, which are not the "
            f"moments {', '.join(names)} of this optimizer. Load it into the same optimizer, with the same options."
        )
    return found


def _of_bitsandbytes(state: Mapping[str, Tensor], *, stacked: bool) -> Iterator[Tensor | Coded]:
    for number in (1, 2):
        value, points = state.get(f"state{number}"), state.get(f"qmap{number}")
        if value is None:
            return
        parts = [value] if points is None else [value, state[f"absmax{number}"]]
        for first, *scale in zip(*parts, strict=True) if stacked and number == 1 else [parts]:
            yield first if points is None else Coded(first, points, *scale)


def _of_torch(value: Any) -> Tensor | Coded:
    if not hasattr(value, "dequantize") or type(value) is Tensor or is_sharded(value):
        return value
    if getattr(value, "qmap", torch.empty(0)).numel() == 256:  # torchao's 8-bit states
        return Coded(value.codes, value.qmap, value.scale)
    return value.dequantize()


def _stored(value: Tensor | Coded, codec: StateCodec, p: Tensor, noise: Noise, step: Tensor) -> Stored:
    if isinstance(value, Coded):
        points = tuple(value.points.tolist())
        if isinstance(codec, Blockwise) and codec.points == points and codec.size == value.size:
            codes, scale = codec.shapes(p.shape)
            return {"codes": value.codes.reshape(codes), "scale": value.scale.reshape(scale)}
        value = value.decode()
    here = local(value).float().view(local(p).shape if is_sharded(value) else p.shape)
    stored = codec.init(here)
    codec.encode_(stored, here, noise, step)
    return {name: as_stored(part, p) for name, part in stored.items()} if is_sharded(value) else stored
