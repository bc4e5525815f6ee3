# SPDX-License-Identifier: Apache-2.0
"""Keep an optimizer's moments in few bits between steps.

A codec says how one moment is stored; the update rule sees float32 and knows nothing of it. Quantizing on store
is bit-identical to the published study's "store float32, quantize on load" (the state is read exactly once a
step), and the bytes are really few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lowbits.quantizers import Noise, PackedTensor, PerBlock, QTensor, QuantSpec, Rounding, quantize

Stored = dict[str, Tensor]


class StateCodec(Protocol):
    """How one moment is stored: as named tensors, all of which go into a checkpoint as they are."""

    @property
    def layout(self) -> str:
        """What a checkpoint says of the stored tensors; what has another layout cannot be loaded."""
        ...

    def init(self, like: Tensor) -> Stored:
        """Return the stored form of zeros of `like`'s shape."""
        ...

    def decode(self, stored: Stored, shape: torch.Size) -> Tensor:
        """Return the moment, float32, of `shape`."""
        ...

    def encode_(self, stored: Stored, value: Tensor, noise: Noise, step: Tensor) -> None:
        """Store `value`, float32, in place; a codec that rounds stochastically draws from `noise` at `step`."""
        ...


@dataclass(frozen=True)
class Exact:
    """Store the moment as a float tensor; float32 loses nothing.

    Args:
        dtype: float32 or bfloat16.
    """

    dtype: torch.dtype = torch.float32

    @property
    def layout(self) -> str:
        """See `StateCodec.layout`."""
        return str(self.dtype).removeprefix("torch.")

    def init(self, like: Tensor) -> Stored:
        """See `StateCodec.init`."""
        return {"value": torch.zeros_like(like, dtype=self.dtype)}

    def decode(self, stored: Stored, shape: torch.Size) -> Tensor:
        """See `StateCodec.decode`."""
        return stored["value"].float()

    def encode_(self, stored: Stored, value: Tensor, noise: Noise, step: Tensor) -> None:
        """See `StateCodec.encode_`."""
        stored["value"].copy_(value)


FLOAT32 = Exact()


@dataclass(frozen=True)
class Quantized:
    """Store the moment as codes and scales.

    Args:
        spec: how it is quantized. Along its last axis, like a weight [out, in]; so `PerRow` is per output channel.
        transposed: the parameter is stored as [in, out] (transformers' `Conv1D`), so rows are its columns.
    """

    spec: QuantSpec
    transposed: bool = False

    @property
    def layout(self) -> str:
        """See `StateCodec.layout`."""
        return f"quantized v1, {self.spec}{', transposed' if self.transposed else ''}"

    def init(self, like: Tensor) -> Stored:
        """See `StateCodec.init`."""
        zeros = self._oriented(torch.zeros_like(like, dtype=torch.float32))
        noise = None if self.spec.rounding is Rounding.NEAREST else zeros.new_zeros(self.spec.padded(zeros.shape))
        return self._parts(quantize(zeros, self.spec, noise))

    def decode(self, stored: Stored, shape: torch.Size) -> Tensor:
        """See `StateCodec.decode`."""
        oriented = shape[::-1] if self._flips(len(shape)) else shape
        optional = stored.get("zero_point"), stored.get("outer")
        packed = PackedTensor(stored["codes"], stored["scale"], self.spec, tuple(oriented), *optional)
        return self._oriented(packed.unpack().dequantize())

    def encode_(self, stored: Stored, value: Tensor, noise: Noise, step: Tensor) -> None:
        """See `StateCodec.encode_`."""
        value = self._oriented(value)
        bits = self.spec.draw(noise, value.shape, step, device=value.device)
        for name, part in self._parts(quantize(value, self.spec, bits)).items():
            stored[name].copy_(part)

    def _parts(self, quantized: QTensor) -> Stored:
        names = ("codes", "scale", "zero_point", "outer")
        return {name: t for name, t in zip(names, quantized.pack().tensors(), strict=True) if t is not None}

    def _oriented(self, x: Tensor) -> Tensor:
        return x.t() if self._flips(x.ndim) else x

    def _flips(self, ndim: int) -> bool:
        # Blocks run over the flattened parameter as it lies in memory, so its orientation does not matter to them.
        return self.transposed and ndim == 2 and not isinstance(self.spec.granularity, PerBlock)
