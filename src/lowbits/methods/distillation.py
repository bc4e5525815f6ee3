# SPDX-License-Identifier: Apache-2.0
"""Quantized distillation. Polino, Pascanu and Alistarh 2018, arXiv:1802.05668.

A student runs forward and backward on weights of few levels, its loss mixes labels with a teacher's soft outputs, and
the optimizer moves a master copy in full precision. The parts are plain functions for any loop:

    quantize_weights_(student, Levels.of_bits(4))
    teacher = Teacher(big)
    loss = distillation_loss(student(x), teacher(x), y)
    ...
    save_coded("student.safetensors", coded_model(student))        # of lowbits.export

`lowbits train --method distillation` does it for causal language models and leaves the file in the run's folder.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lowbits.export import save_coded
from lowbits.methods._contract import Method, Position, Table
from lowbits.methods._distillation_loss import KlMean, Mixing, TopK, distillation_loss
from lowbits.methods._distilled_runs import (
    FILE,
    NONE,
    SELF,
    UNQUANTIZED,
    Cut,
    Ends,
    attach_source_,
    levels_of,
    mixed_loss,
    size_table,
    weight_metrics,
)
from lowbits.methods._first_and_last import FirstAndLast, first_and_last
from lowbits.methods._levels import Backward, Levels, encode, round_to_levels
from lowbits.methods._quantized_weights import Choose, LevelView, quantize_weights_
from lowbits.methods._teacher import Teacher, free_memory, load_teacher
from lowbits.methods._teacher_cache import CacheSettings, Stored, TeacherCache, content_keys
from lowbits.methods._weight_views import coded_model, master_weights, remove_views_, set_draw_, settle_, viewed
from lowbits.quantizers import Rounding

__all__ = [
    "Backward",
    "CacheSettings",
    "Cut",
    "Ends",
    "FirstAndLast",
    "KlMean",
    "LevelView",
    "Levels",
    "Mixing",
    "QuantizedDistillation",
    "Stored",
    "Teacher",
    "TeacherCache",
    "TopK",
    "coded_model",
    "content_keys",
    "distillation_loss",
    "encode",
    "example",
    "first_and_last",
    "free_memory",
    "load_teacher",
    "master_weights",
    "quantize_weights_",
    "remove_views_",
    "round_to_levels",
    "set_draw_",
    "settle_",
    "viewed",
]


@dataclass(frozen=True)
class QuantizedDistillation(Method):
    """Train a causal language model on weights of few levels, from labels and a teacher.

    Args:
        teacher: `self`, the model's own weights at the start, in high precision (with --model FOLDER the trained model
            teaches its own few bits); `none`, labels alone; `cached`, what `cache` holds; or a transformers folder.
        bits: of a level's number, 2^bits levels, 1 to 16; 32 for distillation alone, of a student whose few bits are
            its recipe's.
        cut: what shares a range.
        size: of a bucket or group.
        rounding: to levels in training; evaluation and files are on the nearest.
        backward: the gradient of the rounding.
        ends: whether embeddings and output head are quantized too.
        weight: of the teacher against the labels.
        temperature: of the teacher's and the student's softmax.
        cache: folder for the teacher's likeliest classes, filled as it runs and read instead of running it again.
        classes: how many a new cache keeps for each token.
    """

    teacher: str = SELF
    bits: int = 4
    cut: Cut = Cut.BUCKET
    size: int = 256
    rounding: Rounding = Rounding.NEAREST
    backward: Backward = Backward.STRAIGHT_THROUGH
    ends: Ends = Ends.QUANTIZED
    weight: float = 0.7
    temperature: float = 1.0
    cache: str = ""
    classes: int = 64

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Attach the teacher, then let the layers see their weights quantized."""
        levels = self._levels(model)
        attach_source_(model, self.teacher, self.cache, self.classes, Mixing(self.weight, self.temperature).temperature)
        if levels is not None:
            quantize_weights_(model, levels, backward=self.backward, seed=seed)

    def _levels(self, model: nn.Module) -> Levels | Choose | None:
        if self.bits == UNQUANTIZED:
            return None
        return levels_of(model, Levels.of_bits(self.bits, self.cut.buckets(self.size), self.rounding), self.ends)

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        """Set the counter of the random bits, if there are any."""
        if self.rounding is Rounding.STOCHASTIC:
            set_draw_(model, at.draw)

    def loss(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Return the mixed loss."""
        return mixed_loss(model, ids, Mixing(self.weight, self.temperature))

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return the error of the weights and the entropy of their codes."""
        return {} if self.bits == UNQUANTIZED else weight_metrics(model)

    def write(self, model: nn.Module, folder: Path) -> None:
        """Leave the model as Huffman-coded levels: coded.safetensors, for `lowbits.export.load_coded`."""
        if self.bits != UNQUANTIZED:
            save_coded(folder / FILE, coded_model(model))

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return where the bytes of the model would be."""
        return () if self.bits == UNQUANTIZED else (size_table(model),)


def example() -> QuantizedDistillation:
    """Return one that a model of two layers can be trained with."""
    return QuantizedDistillation(teacher=NONE, bits=4, rounding=Rounding.STOCHASTIC, size=32)
