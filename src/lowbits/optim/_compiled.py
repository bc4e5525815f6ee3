# SPDX-License-Identifier: Apache-2.0
"""Update parameters on a CPU in one pass over memory: the rule translated to C, on all cores, for all tensors at once.

Which tensors: float32 and bfloat16 ones of torch's own classes, contiguous, whose moments are stored by `Exact` or by
`Blockwise`, with dynamic 8-bit codes or a 4-bit code book, in blocks of one size. The rest, all tensors where there is
no C compiler, and steps of fewer than 65,536 elements are left to the eager definition, whose bits these are.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lowbits.formats import DYNAMIC8, UDYNAMIC8, Codebook, Format
from lowbits.kernels import c_library
from lowbits.optim._as_c import rule_as_c
from lowbits.optim._blockwise import SMALLEST_SCALE, Blockwise
from lowbits.optim._codec import Exact, StateCodec
from lowbits.optim._steps import SHIFTS, steps_of
from lowbits.quantizers import Noise, Rounding

if TYPE_CHECKING:
    from lowbits.optim._optimizer import CodecOptimizer, Target

Work = Sequence[tuple["Target", Tensor | None]]
"""Parameters, each with a float32 factor of its gradient."""

SMALLEST_STEP = 2**16
"""A step of fewer elements takes about a millisecond eagerly and is not worth the half second of a compiler."""

_FLOATS = {torch.float32: 0, torch.bfloat16: 1}
_FORMATS: dict[Format, int] = {DYNAMIC8: 2, UDYNAMIC8: 3}
_CODEBOOK4 = 4
_EXACT_BLOCK = 256
_NUMEL = 4  # in a row, before the block's size
Row = list[int]


def update_(optimizer: CodecOptimizer, work: Work) -> Work:
    """Update those parameters that compiled code knows how to.

    Args:
        optimizer: whose state has been made.
        work: parameters with gradients.
    Returns:
        The rest, untouched.
    """
    from lowbits.optim._optimizer import CodecOptimizer

    elements = sum(t.parameter.numel() for t, _ in work if t.parameter.device.type == "cpu")
    whole_tensors = type(optimizer)._new is not CodecOptimizer._new
    if elements < SMALLEST_STEP or whole_tensors or torch.compiler.is_compiling():
        return work
    step = _Step(optimizer)
    rest = [(target, factor) for target, factor in work if not step.take(target, factor)]
    step.run()
    return rest


class _Step:
    """The tensors of one step, gathered by rule."""

    def __init__(self, optimizer: CodecOptimizer) -> None:
        self.optimizer = optimizer
        self.rows: dict[ctypes.CDLL, list[Row]] = {}
        self.scalars: dict[tuple[int, int], Tensor] = {}  # by group and t
        self.steps: list[Tensor] = []
        self.kept: list[Tensor] = []  # what rows hold the addresses of

    def take(self, target: Target, factor: Tensor | None) -> bool:
        """Accept a parameter and count its step, or leave it as it is."""
        p, state = target.parameter, self.optimizer.state[target.parameter]
        codecs = list(self.optimizer.codecs(p, target.group).items())
        sizes = {codec.size for _, codec in codecs if isinstance(codec, Blockwise)} or {_EXACT_BLOCK}
        stored = [tensor for name, tensor in state.items() if "." in name]
        plain = all(type(t) in (Tensor, nn.Parameter) and t.is_contiguous() for t in (p, *stored))
        kinds = [_kind(codec) for _, codec in codecs]
        if not plain or p.device.type != "cpu" or p.dtype not in _FLOATS or len(sizes) != 1 or None in kinds:
            return False
        rule = self.optimizer.rule_of(target.group)
        t = int(state["step"]) + 1
        names = ("lr", *rule.constants(target.group, t), *(f"c_{name}" for name in rule.corrections))
        body = rule_as_c(rule.update, len(codecs), names)
        made = _library(body, len(codecs)) if body is not None else None
        if made is None:
            return False
        self.steps.append(state["step"])
        row = self._head(target, factor, t, sizes.pop())
        for (name, codec), kind in zip(codecs, kinds, strict=True):
            row += _moment(state, name, codec, kind)
        self.rows.setdefault(made, []).append(row)
        return True

    def _head(self, target: Target, factor: Tensor | None, t: int, block: int) -> Row:
        p, g = target.parameter, target.parameter.grad
        assert g is not None
        if g.dtype not in _FLOATS or not g.is_contiguous() or type(g) is not Tensor:
            g = g.float().contiguous()
        noise = self.optimizer.rounding is Rounding.STOCHASTIC and p.dtype == torch.bfloat16
        key = Noise.of(self.optimizer.seed, target.name, "weight").key if noise else (0, 0)
        scalars = self._scalars(target, t)
        self.kept += [g, scalars]
        bits = 0x3F800000 if factor is None else int(factor.view(torch.int32))
        return [
            p.data_ptr(), _FLOATS[p.dtype], g.data_ptr(), _FLOATS[g.dtype], p.numel(), block, scalars.data_ptr(), bits,
            int(noise), int(key[0]), int(key[1]), t,
        ]  # fmt: skip

    def _scalars(self, target: Target, t: int) -> Tensor:
        name = (id(target.group), t)
        if name not in self.scalars:
            found = self.optimizer._scalars(target.group, torch.tensor(t))
            self.scalars[name] = torch.stack(list(found.values()))
        return self.scalars[name]

    def run(self) -> None:
        """Count the steps and update what was accepted."""
        if self.steps:
            torch._foreach_add_(self.steps, 1.0)  # type: ignore[reportPrivateImportUsage]
        for made, rows in self.rows.items():
            words, blocks = [], 0
            for row in rows:
                words += [blocks, *row]
                blocks += -(-row[_NUMEL] // row[_NUMEL + 1])
            table = (ctypes.c_int64 * len(words))(*words)
            made.update(table, *map(ctypes.c_int64, (len(rows), blocks, torch.get_num_threads())))


def _kind(codec: StateCodec) -> int | None:
    """Return how the C source calls a codec; None where it does not know it."""
    if isinstance(codec, Exact):
        return _FLOATS.get(codec.dtype)
    if not isinstance(codec, Blockwise):
        return None
    if isinstance(codec.format, Codebook) and codec.format.bits == 4:
        return _CODEBOOK4
    return next((kind for known, kind in _FORMATS.items() if codec.format == known), None)


def _moment(state: dict[str, Tensor], name: str, codec: StateCodec, kind: int | None) -> Row:
    assert kind is not None
    if isinstance(codec, Exact):
        return [state[f"{name}.value"].data_ptr(), kind, 0, 0, 0]
    assert isinstance(codec, Blockwise)
    steps = steps_of(codec).data_ptr() if codec.format in SHIFTS else 0
    return [state[f"{name}.codes"].data_ptr(), kind, state[f"{name}.scale"].data_ptr(), _table(codec).data_ptr(), steps]


@cache
def _table(codec: Blockwise) -> Tensor:
    """Return what each code stands for and, of a code book of 4 bits, where its codes end; see the C source."""
    values = list(codec.points)
    if isinstance(codec.format, Codebook) and codec.format.bits == 4:
        bounds = codec.format.boundaries
        values += [*bounds, *[math.inf] * (15 - len(bounds)), codec.format.max, sum(v < 0 for v in codec.format.points)]
    return torch.tensor(values, dtype=torch.float32)


@cache
def _library(body: str, moments: int) -> ctypes.CDLL | None:
    """Return the step compiled for one rule."""
    constants = {"MOMENTS": str(moments), "SMALLEST_SCALE": f"{SMALLEST_SCALE.hex()}f"}
    source = resources.files("lowbits.kernels").joinpath("optimizer.c").read_text(encoding="utf-8")
    defined = "".join(f"#define {name} {value}\n" for name, value in constants.items())
    return c_library(defined + source.replace("    RULE\n", f"    {body}\n"))
