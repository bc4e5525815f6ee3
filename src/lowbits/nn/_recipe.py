# SPDX-License-Identifier: Apache-2.0
"""Say what is quantized, as data.

A linear layer is three GEMMs. With N tokens:

    fprop   Y  = X W^T     [tokens, out]     contracts in
    dgrad   dX = G W       [tokens, in]      contracts out
    wgrad   dW = G^T X     [out, in]         contracts tokens

Each has a left and a right operand, and each operand may be quantized in a way of its own. `Recipe()` computes what
`nn.Linear` computes. The two placements of the linear-quantization study are two values:

- the reference's ("ref-STE"): fprop quantizes X and W, the backward GEMMs see the originals (and G, where asked);
- operand-faithful: `save=Save.QUANTIZED`, backward sees the very operands that fprop multiplied. Only this one saves
  memory: what waits for backward is codes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from enum import Enum
from typing import NamedTuple

import torch

from lowbits.errors import NativeError, SpecError
from lowbits.formats import IntFormat
from lowbits.kernels import Execution, illegal_on_hardware, missing_unit
from lowbits.quantizers import Amax, PerBlock, PowerOfTwo, QuantSpec, ReciprocalAmax, Rounding

GEMMS = ("fprop", "dgrad", "wgrad")
_LATE = {"late": True}
"""Of fields that are not told while they have their default: runs from before they were there go on."""


class Gemm(NamedTuple):
    """The two operands of one GEMM; None stays in high precision."""

    lhs: QuantSpec | None = None
    rhs: QuantSpec | None = None


class Save(Enum):
    """What waits for backward.

    - ORIGINAL: input and weight in high precision;
    - QUANTIZED: what fprop multiplied, as packed codes; the backward GEMMs see those numbers;
    - OPERANDS: the input as wgrad's quantized operand, as packed codes; the numbers are those of ORIGINAL, the bytes of
      codes. The weight stays, which costs nothing: it is a parameter.
    """

    ORIGINAL = "original"
    QUANTIZED = "quantized"
    OPERANDS = "operands"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a linear layer and its optimizer state are quantized to.

    Args:
        fprop: Y = X W^T; lhs is X [tokens, in], rhs is W [out, in].
        dgrad: dX = G W; lhs is G [tokens, out], rhs is W as [in, out].
        wgrad: dW = G^T X; lhs is G as [out, tokens], rhs is X as [in, tokens].
        save: what backward sees of X and W.
        grad_parts: split G into this many equal parts along `out`, each with scales of its own: 3 for a fused QKV
            projection, whose parts have very different ranges.
        first_moment: how the optimizer stores the first moment of the layer's weight; None is float32.
        second_moment: likewise the second moment.
        saved_activations: how everything else is stored that autograd keeps for the backward pass of the blocks, beside
            codes: inputs of norms, of attention, of activation functions, and of this layer where `save` says ORIGINAL.
            A scale for so many elements together in memory (`PerBlock`), the same for all layers of a model; backward
            sees these numbers. `convert_` puts it in force; a recipe that is assigned to a layer later does not. None
            keeps them as they are.
        fast_accumulation: GEMMs by name whose FP8 sums a GPU may keep in its units, in 14 bits on Hopper, instead of
            adding them up in float32: faster, and a few times further from the exact sum. Simulated sums are float32.
        execution: simulated on any device; native, which is refused where scales or hardware do not allow it; or auto,
            each GEMM natively where they do, simulated elsewhere.
    Raises:
        SpecError: the fields contradict each other.
        NativeError: native was asked for and a quantized GEMM cannot run so; names the GEMM and the reason.
    """

    fprop: Gemm = Gemm()
    dgrad: Gemm = Gemm()
    wgrad: Gemm = Gemm()
    save: Save = Save.ORIGINAL
    grad_parts: int = 1
    first_moment: QuantSpec | None = None
    second_moment: QuantSpec | None = None
    saved_activations: QuantSpec | None = field(default=None, metadata=_LATE)
    fast_accumulation: tuple[str, ...] = field(default=(), metadata=_LATE)
    execution: Execution = Execution.SIMULATED
    _legal: tuple[bool, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.grad_parts < 1:
            raise SpecError(f"grad_parts={self.grad_parts}: at least 1.")
        if self.save is Save.QUANTIZED and (self.fprop.lhs is None or self.fprop.rhs is None):
            raise SpecError("save=Save.QUANTIZED keeps what fprop multiplied: both its operands must be quantized.")
        if self.save is Save.OPERANDS and self.wgrad.rhs is None:
            raise SpecError("save=Save.OPERANDS keeps the input as wgrad multiplies it: wgrad.rhs must be quantized.")
        if unknown := set(self.fast_accumulation) - set(GEMMS):
            raise SpecError(
                f"fast_accumulation={self.fast_accumulation}: {unknown.pop()} is none of {', '.join(GEMMS)}."
            )
        _check_saved(self.saved_activations)
        if self.execution is Execution.NATIVE:
            self._check_native()
        # Computed now: asking anew in every forward pass would cost as much as a launch.
        legal = tuple(any(gemm) and self.illegal(name) is None for name, gemm in self.gemms.items())
        object.__setattr__(self, "_legal", legal)

    def _check_native(self) -> None:
        if not any(any(gemm) for gemm in self.gemms.values()):
            raise NativeError("native execution of a recipe that quantizes no GEMM means nothing. Leave it simulated.")
        for name, gemm in self.gemms.items():
            reason = self.illegal(name)
            if any(gemm) and reason:
                raise NativeError(f"{name} cannot run natively: {reason}. Use Execution.SIMULATED or legal scales.")

    @property
    def gemms(self) -> dict[str, Gemm]:
        """The three GEMMs by name."""
        return {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}

    @property
    def plain(self) -> bool:
        """Whether the layer computes exactly what `nn.Linear` computes."""
        return not any(any(gemm) for gemm in self.gemms.values())

    @property
    def stochastic(self) -> bool:
        """Whether any operand is rounded stochastically."""
        operands = [spec for gemm in self.gemms.values() for spec in gemm if spec is not None]
        return any(spec.rounding is not Rounding.NEAREST for spec in operands)

    def illegal(self, gemm: str) -> str | None:
        """Say why a GEMM could not run on integer or FP8 units, None if it could.

        Args:
            gemm: `fprop`, `dgrad` or `wgrad`.
        """
        if self.grad_parts > 1 and self.gemms[gemm].lhs is not None and gemm != "fprop":
            return f"G is split into {self.grad_parts} parts with scales of their own"
        return illegal_on_hardware(*self.gemms[gemm])

    def native(self, device: torch.device) -> tuple[bool, bool, bool]:
        """Return whether fprop, dgrad and wgrad run on the integer or FP8 units of a device.

        Args:
            device: of the layer's input.
        Raises:
            NativeError: `execution` is NATIVE and the device has no such units.
        """
        fprop, dgrad, wgrad = (self._missing(i, device) is None for i in range(len(GEMMS)))
        return fprop, dgrad, wgrad

    def _missing(self, gemm: int, device: torch.device) -> str | None:
        """Why a GEMM does not run natively."""
        if self.execution is Execution.SIMULATED:
            return "simulation is asked for"
        if not self._legal[gemm]:
            return self.illegal(GEMMS[gemm]) or "nothing is quantized"
        spec = (self.fprop, self.dgrad, self.wgrad)[gemm].lhs
        assert spec is not None
        reason = missing_unit(spec, device)
        if reason is not None and self.execution is Execution.NATIVE:
            raise NativeError(f"{reason}. Use Execution.AUTO or SIMULATED, or another device.")
        return reason

    def runs(self, device: torch.device) -> str:
        """Say how the GEMMs run on a device: `native`, `simulated`, or which run natively; and why not all do.

        Args:
            device: of the layer.
        """
        asked = [i for i, gemm in enumerate(self.gemms.values()) if any(gemm)]
        if not asked:
            return Execution.SIMULATED.value
        try:
            reasons = {i: self._missing(i, device) for i in asked}
        except NativeError as error:
            return f"cannot run here: {error}"
        native = [GEMMS[i] for i, reason in reasons.items() if reason is None]
        if len(native) == len(asked):
            return Execution.NATIVE.value
        if self.execution is Execution.SIMULATED:
            return Execution.SIMULATED.value
        why = next(reason for reason in reasons.values() if reason is not None)
        return f"{'native ' + ', '.join(native) + ' alone' if native else 'simulated'}: {why}"

    def to_dict(self) -> dict[str, object]:
        """Return the recipe in words, for logs and exports (data out, never data in)."""
        out: dict[str, object] = {}
        for one in fields(self):
            value = getattr(self, one.name) if one.init else None
            if not one.init or (one.metadata == _LATE and value == one.default):
                continue
            if isinstance(value, Gemm):
                value = {side: None if spec is None else str(spec) for side, spec in value._asdict().items()}
            elif isinstance(value, Enum):
                value = value.value
            elif isinstance(value, QuantSpec):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)  # as JSON gives it back
            out[one.name] = value
        return out

    def __str__(self) -> str:
        """One line: `fprop int8 row x int8 row; dgrad int8 row x -; moments int8 tensor, float32`."""
        words = [f"{name} {gemm.lhs or '-'} x {gemm.rhs or '-'}" for name, gemm in self.gemms.items() if any(gemm)]
        if self.first_moment or self.second_moment:
            words.append(f"moments {self.first_moment or 'float32'}, {self.second_moment or 'float32'}")
        if self.save is not Save.ORIGINAL:
            words.append(f"saves {'codes' if self.save is Save.QUANTIZED else 'codes of X for wgrad'}")
        if self.saved_activations is not None:
            words.append(f"what else waits for backward {self.saved_activations}")
        if self.grad_parts > 1:
            words.append(f"G in {self.grad_parts} parts")
        if self.fast_accumulation:
            words.append(f"fast accumulation in {', '.join(self.fast_accumulation)}")
        if not self.plain:
            words.append(self.execution.value)
        return "; ".join(words) or "high precision"


def _check_saved(spec: QuantSpec | None) -> None:
    """What waits has any shape, may hold infinities below zero (masks), and nothing is drawn for it."""
    if spec is None:
        return
    fmt, plain = spec.format, spec.rounding is Rounding.NEAREST and spec.transform is None
    free = isinstance(fmt, IntFormat) and fmt.signed and fmt.lowest and fmt.has_zero
    symmetric = isinstance(spec.scale, Amax | PowerOfTwo | ReciprocalAmax)
    if not (isinstance(spec.granularity, PerBlock) and plain and free and symmetric):
        raise SpecError(
            f"saved_activations={spec}: tensors of any shape, masks among them, are kept in signed integers with a "
            "lowest code to spare, a symmetric scale for so many elements of memory, rounded to nearest. Take "
            "QuantSpec(INT8, PerBlock(128))."
        )
