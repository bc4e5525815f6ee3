# SPDX-License-Identifier: Apache-2.0
"""The mixed loss against the oracle, for the three kinds of task, and with a teacher cut to its top classes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from lowbits.errors import ShapeError, SpecError
from lowbits.methods import _distillation_loss
from lowbits.methods.distillation import KlMean, Mixing, TopK, distillation_loss
from tests.oracles import distillation as oracle


def batch(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(0, shape[-1], shape[:-1], generator=generator)


@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 2.0), (0.7, 1.0), (0.0, 2.0), (1.0, 4.0)])
def test_the_loss_is_the_oracles(weight: float, temperature: float) -> None:
    student, teacher, labels = batch(6, 10)
    found = distillation_loss(student, teacher, labels, Mixing(weight, temperature))
    expected = oracle.loss(student.tolist(), teacher.tolist(), labels.tolist(), temperature, weight)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_sequences_are_averaged_over_tokens_that_count() -> None:
    student, teacher, labels = batch(3, 5, 7)
    labels[0, 3:] = labels[2] = -100
    kept = labels != -100
    found = distillation_loss(student, teacher, labels)
    expected = oracle.loss(student[kept].tolist(), teacher[kept].tolist(), labels[kept].tolist(), 2.0, 0.7)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_classes_without_probability_change_nothing() -> None:
    student, teacher, labels = batch(4, 10)
    more = [torch.cat([z, torch.full_like(z, -torch.inf)], 1) for z in (student, teacher)]
    for mixing in (Mixing(), Mixing(temperature=1.0)):
        expected = distillation_loss(student, teacher, labels, mixing)
        assert distillation_loss(more[0], more[1], labels, mixing).item() == pytest.approx(expected.item(), abs=1e-6)
    element = distillation_loss(*more, labels, Mixing(1.0, kl_mean=KlMean.ELEMENT))
    assert element.item() == pytest.approx(distillation_loss(student, teacher, labels, Mixing(1.0)).item() / 20)


def test_an_excluded_class_gives_no_nan_gradient() -> None:
    student, teacher, labels = batch(4, 10)
    teacher[:, 3] = -torch.inf
    labels.zero_()
    student.requires_grad_()
    distillation_loss(student, teacher, labels).backward()
    assert student.grad is not None and student.grad.isfinite().all()


def test_the_temperature_keeps_the_size_of_the_gradient() -> None:
    student, teacher, labels = batch(64, 10)
    norms = []
    for temperature in (1.0, 2.0, 4.0, 8.0):
        z = (0.3 * student).requires_grad_()
        distillation_loss(z, 0.3 * teacher, labels, Mixing(1.0, temperature)).backward()
        norms.append(z.grad.norm().item())
    assert max(norms) < 2 * min(norms)


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher, labels = batch(4, 5)
    teacher.requires_grad_()
    distillation_loss(student.requires_grad_(), teacher, labels).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("k", [1, 3, 12])
def test_a_top_k_teacher_joins_all_other_classes(k: int) -> None:
    student, teacher, labels = batch(5, 12)
    top = TopK.of_logits(teacher, k, 2.0)
    found = distillation_loss(student, top, labels, Mixing(1.0)) / 4
    p, q = (functional.softmax(z / 2, -1) for z in (teacher, student))
    chosen = p.topk(k, -1).indices
    expected = 0.0
    for row in range(5):
        kept = chosen[row].tolist()
        pairs = [(p[row, i], q[row, i]) for i in kept]
        pairs += [(1 - p[row, kept].sum(), 1 - q[row, kept].sum())] if k < 12 else []
        expected += sum((a * (a / b).log()).item() for a, b in pairs)
    assert found.item() == pytest.approx(expected / 5, rel=1e-5)
    whole = distillation_loss(student, teacher, labels, Mixing(1.0)) / 4
    assert found <= whole + 1e-6 and (k < 12 or found.item() == pytest.approx(whole.item(), rel=1e-5))


@pytest.mark.parametrize("k", [None, 4])
def test_many_logits_some_at_a_time_give_the_same(k: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher, labels = batch(3, 5, 12)
    labels[0, 2:] = -100
    found = []
    for together in (1 << 26, 12 * 4):  # all 15 positions, or four
        monkeypatch.setattr(_distillation_loss, "_TOGETHER", together)
        z = student.clone().requires_grad_()
        loss = distillation_loss(z, teacher if k is None else TopK.of_logits(teacher, k, 2.0), labels)
        loss.backward()
        found.append((loss.detach(), z.grad))
    (whole, gradient), (parts, other) = found
    assert torch.allclose(whole, parts, rtol=1e-14) and torch.allclose(gradient, other, rtol=1e-12, atol=1e-16)


def test_other_vocabularies_positions_and_temperatures_are_refused() -> None:
    student, teacher, labels = batch(4, 10)
    with pytest.raises(ShapeError, match="teacher has 9 classes, the student 10"):
        distillation_loss(student, teacher[:, :9], labels)
    with pytest.raises(ShapeError, match="9 classes"):
        distillation_loss(student, TopK.of_logits(teacher[:, :9], 3, 2.0), labels)
    with pytest.raises(ShapeError, match="positions differ"):
        distillation_loss(student[:3], teacher, labels)
    with pytest.raises(ShapeError, match="positions differ"):
        distillation_loss(student[0], teacher, labels)
    with pytest.raises(SpecError, match="temperature 1.0, the loss wants 2.0"):
        distillation_loss(student, TopK.of_logits(teacher, 3, 1.0), labels)
    with pytest.raises(SpecError, match="between 0 and 1"):
        Mixing(1.5)
    with pytest.raises(SpecError, match="above 0"):
        Mixing(temperature=0.0)
