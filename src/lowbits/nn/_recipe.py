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

from dataclasses import dataclass, fields
from enum import Enum
from typing import NamedTuple

from lowbits.errors import NativeError, SpecError
from lowbits.kernels import Execution, illegal_on_hardware
from lowbits.quantizers import QuantSpec, Rounding


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
        execution: simulated on any device, or native, which is refused where the hardware cannot do it.
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
    execution: Execution = Execution.SIMULATED

    def __post_init__(self) -> None:
        if self.grad_parts < 1:
            raise SpecError(f"grad_parts={self.grad_parts}: at least 1.")
        if self.save is Save.QUANTIZED and (self.fprop.lhs is None or self.fprop.rhs is None):
            raise SpecError("save=Save.QUANTIZED keeps what fprop multiplied: both its operands must be quantized.")
        if self.save is Save.OPERANDS and self.wgrad.rhs is None:
            raise SpecError("save=Save.OPERANDS keeps the input as wgrad multiplies it: wgrad.rhs must be quantized.")
        if self.execution is Execution.NATIVE:
            self._check_native()

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

    def to_dict(self) -> dict[str, object]:
        """Return the recipe in words, for logs and exports (data out, never data in)."""
        out: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Gemm):
                value = {side: None if spec is None else str(spec) for side, spec in value._asdict().items()}
            elif isinstance(value, Enum):
                value = value.value
            elif isinstance(value, QuantSpec):
                value = str(value)
            out[field.name] = value
        return out

    def __str__(self) -> str:
        """One line: `fprop int8 row x int8 row; dgrad int8 row x -; moments int8 tensor, float32`."""
        words = [f"{name} {gemm.lhs or '-'} x {gemm.rhs or '-'}" for name, gemm in self.gemms.items() if any(gemm)]
        if self.first_moment or self.second_moment:
            words.append(f"moments {self.first_moment or 'float32'}, {self.second_moment or 'float32'}")
        if self.save is not Save.ORIGINAL:
            words.append(f"saves {'codes' if self.save is Save.QUANTIZED else 'codes of X for wgrad'}")
        if self.grad_parts > 1:
            words.append(f"G in {self.grad_parts} parts")
        if not self.plain:
            words.append(self.execution.value)
        return "; ".join(words) or "high precision"
