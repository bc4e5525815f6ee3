# SPDX-License-Identifier: Apache-2.0
"""DiffQ: pseudo-quantization noise that is uniform or normal, with a penalty on the model's size.

Defossez, Adi and Synnaeve 2021, arXiv:2104.09987. Two forms: as the library ships it, and matched to Gaussian weight
sampling, where the distribution of the noise is all that differs. Linear layers alone, like there; the library would
take embeddings too.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.analysis import causal_loss
from lowbits.errors import SpecError
from lowbits.methods._contract import Method, Position, Table
from lowbits.methods._pseudo_noise._draw import PseudoNoise
from lowbits.methods._pseudo_noise._export import bit_forms, write_ladder
from lowbits.methods._pseudo_noise._library import LibraryNoise
from lowbits.methods._pseudo_noise._model import Resample, add_noise_, bit_groups, noisy, number_of
from lowbits.methods._pseudo_noise._numerics import Plan
from lowbits.methods._pseudo_noise._tables import bit_metrics, bit_tables
from lowbits.methods._pseudo_noise._weight import NoisyWeight, set_draw_
from lowbits.nn import quantized_layers
from lowbits.optim import param_groups

__all__ = ["DiffQ", "Form", "LibraryNoise", "example", "model_size"]

_BYTES_A_MB = 2**20
_MOST_BITS = 15


class Form(Enum):
    """As the library ships it, or with GaussWS's blocks, steps and bit-widths."""

    LIBRARY = "library"
    MATCHED = "matched"


def library_weights(model: nn.Module) -> dict[str, tuple[nn.Parameter, LibraryNoise]]:
    """Return the weights with the library's noise, by the name of the layer."""
    found = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.weight_fn, LibraryNoise) and isinstance(layer.weight, nn.Parameter):
            found[name] = (layer.weight, layer.weight_fn)
    return found


def model_size(model: nn.Module) -> Tensor:
    """Return the size in MB of the weights with the library's noise, differentiable in their bits."""
    return torch.stack([noise.size() for _, noise in library_weights(model).values()]).sum()


@dataclass(frozen=True)
class DiffQ(Method):
    """Train under DiffQ's weight noise (Defossez, Adi and Synnaeve 2021, arXiv:2104.09987).

    Args:
        form: the library's, or matched to GaussWS.
        noise: `normal` is the library's default, `uniform` the paper's.
        group: library: consecutive weights that share their bits.
        b_init: bits at first; GaussWS has 6.
        b_min: library: fewest bits; matched: bits to which they are pulled.
        b_max: library: most bits.
        penalty: library: weight of the model's size in MB in the loss; matched: weight decay of the bit-widths.
        bit_lr: peak learning rate of the bits; none: that of the run.
        smallest: library: weights of fewer MB are left alone.
        rows_and_columns: matched: sides of a block.
        resample: when new noise is drawn.
    Raises:
        SpecError: a number is out of its range.
    """

    form: Form = Form.LIBRARY
    noise: PseudoNoise = PseudoNoise.NORMAL
    group: int = 8
    b_init: float = 8.0
    b_min: float = 2.0
    b_max: float = 15.0
    penalty: float = 0.1
    bit_lr: float | None = 1e-3
    smallest: float = 0.01
    rows_and_columns: int = 32
    resample: Resample = Resample.MICRO

    def __post_init__(self) -> None:
        if self.noise not in (PseudoNoise.NORMAL, PseudoNoise.UNIFORM):
            raise SpecError(f"DiffQ's noise is normal or uniform, got {self.noise.value}; others are GaussWS's.")
        if not 1 <= self.b_min < self.b_init < self.b_max <= _MOST_BITS:
            raise SpecError(
                f"1 <= b_min < b_init < b_max <= {_MOST_BITS} is needed, got {self.b_min}, {self.b_init}, {self.b_max}."
            )
        numbers = (self.penalty, self.smallest, self.bit_lr or 0.0)
        if self.group < 1 or not all(0 <= number < math.inf for number in numbers):
            raise SpecError(
                f"group is at least 1; penalty, smallest and bit_lr at least 0 and finite; got {self.group}, "
                f"{self.penalty}, {self.smallest} and {self.bit_lr}."
            )
        if self.form is Form.MATCHED:
            _ = self.plan

    @property
    def plan(self) -> Plan:
        """What the matched form does to each weight."""
        block = (self.rows_and_columns, self.rows_and_columns)
        return Plan(noise=self.noise, block=block, b_init=self.b_init, b_target=self.b_min)

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Give every converted layer its noise."""
        if self.form is Form.MATCHED:
            add_noise_(model, self.plan, seed)
            return
        bits, least = (self.b_min, self.b_max, self.b_init), self.smallest * _BYTES_A_MB
        for name, layer in quantized_layers(model).items():
            w = layer.weight
            if w.numel() * w.element_size() >= least:
                layer.weight_fn = LibraryNoise(w, self.noise, self.group, bits, seed=seed, name=name).to(w.device)
        if not library_weights(model):
            raise SpecError(f"DiffQ: no weight has {self.smallest} MB; make `smallest` smaller.")

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Put the bits into a group of their own: without decay in the library's form."""
        if self.form is Form.MATCHED:
            return bit_groups(model, weight_decay, self.penalty, self.bit_lr)
        own = {"weight_decay": 0.0, "name": "bits"} | ({} if self.bit_lr is None else {"lr": self.bit_lr})
        return param_groups(
            model, weight_decay, lambda name, module, p: own if isinstance(module, LibraryNoise) else None
        )

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        """Number the draw."""
        weights: list[NoisyWeight | LibraryNoise] = [*noisy(model), *(n for _, n in library_weights(model).values())]
        set_draw_(weights, number_of(at, self.resample))

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the usual loss, and in the library's form the penalty on the size."""
        loss = causal_loss(model, ids)
        return loss if self.form is Form.MATCHED else loss + self.penalty * model_size(model)

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return bits over all groups or blocks, and in the library's form the size."""
        found = [noise for _, noise in library_weights(model).values()]
        if not found:
            return bit_metrics(model)
        bits = torch.cat([noise.bits().detach() for noise in found])
        told = {"bits": bits.mean().item(), "bits, lowest": bits.amin().item(), "bits, highest": bits.amax().item()}
        return told | {"size, MB": sum(noise.true_size() for noise in found)}

    def forms(self, model: nn.Module) -> dict[str, AbstractContextManager[object]]:
        """Return, in the matched form, the model as its exported file would hold it."""
        return bit_forms(model)

    def write(self, model: nn.Module, folder: Path) -> None:
        """Leave, in the matched form, the file that GaussWS leaves."""
        write_ladder(model, folder)

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return bits and size by layer, or in the matched form what GaussWS returns."""
        found = library_weights(model)
        if not found:
            return bit_tables(model)
        rows = []
        for name, (w, noise) in found.items():
            bits = noise.bits().detach()
            told = (bits.mean().item(), bits.amin().item(), bits.amax().item(), noise.true_size())
            rows.append((name, noise.logit.numel(), *told, w.numel() * 4 / _BYTES_A_MB))
        columns = ("layer", "groups", "mean bits", "lowest", "highest", "MB", "MB in float32")
        note = "Size with bits rounded to integers, the table of bits and the bounds of each weight included."
        return (Table("bits and size by layer", columns, tuple(rows), note),)


def example() -> DiffQ:
    """Return what the tests of the contract train: weights of 3,072 elements and more, bits move in a few steps."""
    return DiffQ(bit_lr=0.1)
