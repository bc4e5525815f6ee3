# SPDX-License-Identifier: Apache-2.0
"""Learn from labels and from a teacher's soft outputs.

    L = w T^2 KL(softmax(z_teacher / T) || softmax(z_student / T)) + (1 - w) CE(z_student, y)

(Hinton et al. 2015, arXiv:1503.02531; Polino et al. 2018, arXiv:1802.05668, sec. 3.) Published: w = 0.7, T = 2 for
images, T = 1 a word for translation.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lowbits.errors import ShapeError, SpecError

IGNORED = -100
_TOGETHER = 1 << 26  # logits at a time: a dozen temporaries of 256 MiB


class KlMean(Enum):
    """Over what the divergence is averaged."""

    EXAMPLE = "example"
    """Over examples or tokens, and summed over classes: what the equation says."""
    ELEMENT = "element"
    """Over classes, too, as the published code does: its term is C times weaker for C classes."""


@dataclass(frozen=True)
class Mixing:
    """Weigh the teacher against the labels.

    Args:
        weight: of the teacher, 0 to 1.
        temperature: of both softmaxes, above 0.
        kl_mean: over what the divergence is averaged.
    Raises:
        SpecError: a value outside its range.
    """

    weight: float = 0.7
    temperature: float = 2.0
    kl_mean: KlMean = KlMean.EXAMPLE

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise SpecError(f"Mixing: the teacher's weight is between 0 and 1, got {self.weight}.")
        if not self.temperature > 0:
            raise SpecError(f"Mixing: the temperature is above 0, got {self.temperature}.")


@dataclass(frozen=True)
class TopK:
    """The largest probabilities of a teacher, as a cache holds them.

    Args:
        log_probs: floating point, [..., K]: log softmax(z / T) of the K likeliest classes.
        classes: integers, [..., K].
        rest: floating point, [...]: log of the probability of all others together, -inf for none.
        num_classes: C.
        temperature: T.
    """

    log_probs: Tensor
    classes: Tensor
    rest: Tensor
    num_classes: int
    temperature: float

    @staticmethod
    def of_logits(logits: Tensor, k: int, temperature: float) -> TopK:
        """Return the K likeliest classes; all of them if K is C.

        Args:
            logits: floating point, [..., C].
            k: at most C.
            temperature: above 0.
        """
        log_probs = functional.log_softmax(logits.float() / temperature, -1)
        top, classes = log_probs.topk(k, -1)
        others = torch.full_like(top[..., 0], -torch.inf)
        if k < logits.shape[-1]:
            others = log_probs.scatter(-1, classes, -torch.inf).logsumexp(-1)
        return TopK(top, classes, others, logits.shape[-1], temperature)

    def flat(self) -> TopK:
        """Return the same with all positions in a row."""
        parts = self.log_probs.flatten(0, -2), self.classes.flatten(0, -2), self.rest.flatten()
        return TopK(*parts, self.num_classes, self.temperature)

    def __getitem__(self, positions: slice) -> TopK:
        """Return some of the first axis."""
        parts = self.log_probs[positions], self.classes[positions], self.rest[positions]
        return TopK(*parts, self.num_classes, self.temperature)


def distillation_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor,
    mixing: Mixing = Mixing(),
) -> Tensor:
    """Return the mixed loss of classification, language modelling or sequence-to-sequence.

    Positions with the label -100 (padding) count nowhere. For a causal language model pass `logits[:, :-1]` of both and
    `ids[:, 1:]`; for an encoder-decoder model its decoder's logits and labels as they are. With a `TopK` teacher all
    other classes are one: the divergence is then a lower bound, and exact for K = C. Of many logits some positions are
    computed at a time, and again in backward, so that no temporary is as large as all of them.

    Args:
        student: floating point, [..., C].
        teacher: floating point, [..., C], or what a cache holds. No gradient reaches it.
        labels: int64, [...].
        mixing: weight and temperature.
    Returns:
        Scalar, float32 or float64.
    Raises:
        ShapeError: teacher and student have different classes or positions.
        SpecError: the cache was made at another temperature.
    """
    _check(student, teacher, labels, mixing)
    z, y = student.flatten(0, -2), labels.flatten()
    told = teacher.flat() if isinstance(teacher, TopK) else teacher.detach().flatten(0, -2)
    rows = max(1, _TOGETHER // z.shape[-1])
    if len(z) <= rows:
        total = _sum(z, told, y, mixing)
    else:
        pieces = [slice(i, i + rows) for i in range(0, len(z), rows)]
        parts = [
            checkpoint(_sum, z[i], told[i], y[i], mixing, use_reentrant=False, preserve_rng_state=False) for i in pieces
        ]
        total = torch.stack(parts).sum()
    return total / (y != IGNORED).sum().clamp_min(1)


def _sum(z: Tensor, teacher: Tensor | TopK, labels: Tensor, mixing: Mixing) -> Tensor:
    """The loss of some positions, added up; z [N, C]."""
    z = z if z.dtype == torch.float64 else z.float()
    hard = functional.cross_entropy(z, labels, ignore_index=IGNORED, reduction="sum")
    if mixing.weight == 0:
        return hard
    each = _top_divergence(z, teacher) if isinstance(teacher, TopK) else _divergence(z, teacher, mixing.temperature)
    soft = torch.where(labels != IGNORED, each, 0).sum()
    if mixing.kl_mean is KlMean.ELEMENT:
        soft = soft / z.shape[-1]
    return mixing.weight * mixing.temperature**2 * soft + (1 - mixing.weight) * hard


def _divergence(z: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL of each position; a class that the teacher excludes (-inf) adds nothing."""
    log_p = functional.log_softmax(teacher.to(z.dtype) / temperature, -1)
    log_q = functional.log_softmax(z / temperature, -1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _top_divergence(z: Tensor, teacher: TopK) -> Tensor:
    """KL where all classes but the K likeliest are one class."""
    log_q = functional.log_softmax(z / teacher.temperature, -1)
    classes, log_p = teacher.classes.long(), teacher.log_probs.to(z.dtype)
    p = log_p.exp()
    found = torch.where(p > 0, p * (log_p - log_q.gather(-1, classes)), 0).sum(-1)
    if teacher.classes.shape[-1] == teacher.num_classes:
        return found
    others = log_q.scatter(-1, classes, -torch.inf).logsumexp(-1)
    log_rest = teacher.rest.to(z.dtype)
    rest = log_rest.exp()
    return found + torch.where(rest > 0, rest * (log_rest - others), 0)


def _check(student: Tensor, teacher: Tensor | TopK, labels: Tensor, mixing: Mixing) -> None:
    classes = teacher.num_classes if isinstance(teacher, TopK) else teacher.shape[-1]
    if classes != student.shape[-1]:
        raise ShapeError(
            f"the teacher has {classes} classes, the student {student.shape[-1]}: their vocabularies differ. "
            "Take a teacher with the student's tokenizer, or give the student the teacher's vocabulary; logits that "
            "only fill up a vocabulary can be cut off before."
        )
    positions = teacher.classes.shape[:-1] if isinstance(teacher, TopK) else teacher.shape[:-1]
    if not positions == student.shape[:-1] == labels.shape:
        raise ShapeError(
            f"positions differ: student {tuple(student.shape[:-1])}, teacher {tuple(positions)}, labels "
            f"{tuple(labels.shape)}. Run both models on the same batch, and shift both logits for a causal model."
        )
    if isinstance(teacher, TopK) and teacher.temperature != mixing.temperature:
        raise SpecError(
            f"the cached teacher was written at temperature {teacher.temperature}, the loss wants "
            f"{mixing.temperature}. Write a cache at that temperature, or use the cache's."
        )
