# SPDX-License-Identifier: Apache-2.0
"""What the kernels of a step know how to update, and what the parameters of one launch have in common."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbits.formats import DYNAMIC4, DYNAMIC8, E4M3, E4M3_NO_UNDERFLOW, INT8, UDYNAMIC8, UINT8_NO_ZERO, ULINEAR4
from lowbits.nn import Grid, QParameter, Scaling
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._grid import memory_of
from lowbits.optim._sharding import first_element
from lowbits.quantizers import Rounding

if TYPE_CHECKING:
    from lowbits.optim._optimizer import CodecOptimizer, Target

_KINDS = {
    DYNAMIC8: "SIGNED", UDYNAMIC8: "UNSIGNED", DYNAMIC4: "SIGNED4", ULINEAR4: "ULINEAR4", INT8: "INT8",
    UINT8_NO_ZERO: "UINT8_NO_ZERO", E4M3: "E4M3", E4M3_NO_UNDERFLOW: "E4M3_NO_UNDERFLOW",
}  # fmt: skip
_FLOATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
TYPES = _FLOATS | {torch.int8: "int8", torch.uint8: "uint8"}
_EXACT_BLOCK = 256


@cache
def kernels() -> ModuleType | None:
    """The kernels, where triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lowbits.kernels import optimizer

    return optimizer


def usable(device: torch.device) -> bool:
    """Whether the kernels run on a device: CUDA, or a CPU where Triton interprets them, which only tests ask for."""
    if device.type == "cuda":
        return kernels() is not None
    loaded = sys.modules.get("lowbits.kernels.optimizer")
    return loaded is not None and bool(loaded.rules.INTERPRETED)


@dataclass(frozen=True)
class Signature:
    """What parameters of one launch of `update` have in common."""

    rule: str
    codecs: tuple[StateCodec, ...]
    size: int
    parameter: torch.dtype
    gradient: torch.dtype
    aligned: bool
    stochastic: bool
    grid: Grid | None = None
    per_channel: bool = False


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without a look at its class."""
    return getattr(tensor, "_local_tensor", tensor)


def bytes_of(p: Tensor) -> Tensor:
    """What the kernels write of a parameter: this rank's numbers or codes."""
    return memory_of(local_part(p))


def _on_grid(parameter: Tensor) -> bool:
    """Whether the kernels know how a parameter's codes lie: rows that end with a byte, steps that stay."""
    p = local_part(parameter)
    if not isinstance(p, QParameter):
        return True
    whole_bytes = p.grid.per_byte <= 4 and p.shape[-1] % p.grid.per_byte == 0 and first_element(parameter) % 4 == 0
    return whole_bytes and p.grid.scaling is Scaling.FIXED and p.codes.is_contiguous() and p.step.is_contiguous()


def signature_of(optimizer: CodecOptimizer, target: Target) -> Signature | None:
    """Return the launch that a parameter belongs to, or None where the kernels cannot update it."""
    logical, g = local_part(target.parameter), local_part(target.parameter.grad)  # type: ignore[arg-type]
    p, grid = memory_of(logical), logical.grid if isinstance(logical, QParameter) else None
    found = kernels() if usable(p.device) else None
    rule = optimizer.rule_of(target.group)
    whole_tensors = type(optimizer)._new is not _base()._new
    if found is None or whole_tensors or not hasattr(found.rules, rule.name):
        return None
    # Small tensors keep float32 moments, but share the launch of the others of their group.
    small = target.parameter.numel() < target.group["min_8bit_size"]
    codecs = optimizer.codecs(target.parameter, target.group)
    if small:
        codecs = {moment: target.group[moment] for moment in codecs}
    sizes = {codec.size for codec in codecs.values() if isinstance(codec, Blockwise)} or {_EXACT_BLOCK}
    known = all(codec == FLOAT32 or kind_of(codec) for codec in codecs.values())
    fits = (
        known and len(sizes) == 1 and p.dtype in (_FLOATS if grid is None else TYPES) and g.dtype in _FLOATS
        and g.device == p.device and p.is_contiguous() and g.is_contiguous() and p.numel() > 0
        and _on_grid(target.parameter)
    )  # fmt: skip
    if not fits:
        return None
    state = optimizer.state[target.parameter]
    stored = [local_part(t).data_ptr() for name, t in state.items() if "." in name]
    aligned = logical.numel() % 16 == 0 and all(a % 16 == 0 for a in (p.data_ptr(), g.data_ptr(), *stored))
    stochastic = optimizer.rounding is Rounding.STOCHASTIC and p.dtype == torch.bfloat16
    common = (rule.name, tuple(codecs.values()), sizes.pop(), p.dtype, g.dtype, aligned)
    if not isinstance(logical, QParameter):
        return Signature(*common, stochastic)
    return Signature(*common, logical.grid.rounding is Rounding.STOCHASTIC, grid, logical.per_channel)


@cache
def _base() -> type:
    from lowbits.optim._optimizer import CodecOptimizer

    return CodecOptimizer


def kind_of(codec: StateCodec) -> str | None:
    """What the kernels call the format of a moment; None: it is no code that they know."""
    return _KINDS.get(codec.format) if isinstance(codec, Blockwise) else None


def grid_switches(s: Signature) -> dict[str, int | bool]:
    """The switches of `update` that say how codes of a weight lie; GRID 0: it is floats."""
    if s.grid is None:
        return {"GRID": 0, "LOW": 0, "HIGH": 0, "CHANNELS": False}
    return {"GRID": s.grid.per_byte, "LOW": s.grid.low, "HIGH": s.grid.high, "CHANNELS": s.per_channel}
