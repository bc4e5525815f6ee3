# SPDX-License-Identifier: Apache-2.0
"""The parts of the distillation experiments that can be wrong without anybody seeing it."""

from __future__ import annotations

import json
import lzma
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from experiments.distillation import arms, checks, gpu, text, translation
from experiments.distillation.images import PublishedStudent, ResNet20
from lowbits.methods.distillation import Mixing
from tests.train.tiny import tokens

PLAN = arms.Plan(bits=(4, 2), qd=("64",), steps=6, teacher_steps=6, dq_steps=3, lr=1e-2, teacher_lr=1e-2, extras=True)


class Toy(arms.Task):
    name, unit, higher_is_better, plan = "toy", "accuracy", True, PLAN

    def teacher(self, seed: int) -> nn.Module:
        return arms.fresh(lambda: nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)), seed + 500)

    def student(self, seed: int) -> nn.Module:
        return arms.fresh(lambda: nn.Linear(4, 3), seed)

    def batch(self, seed: int, step: int) -> arms.Batch:
        x = torch.randn(8, 4, generator=arms.generator(seed, step))
        return (x,), x[:, :3].argmax(1)

    def score(self, model: nn.Module) -> float:
        x = torch.randn(50, 4, generator=arms.generator(9))
        return (model(x).argmax(1) == x[:, :3].argmax(1)).double().mean().item()


def test_a_seed_runs_every_arm_once_and_again_gives_the_same(tmp_path: Path) -> None:
    runs = arms.all_seeds(Toy(), tmp_path / "one", [5])
    assert len(runs) == 3 + 2 * (3 + 1 + 1 + 5 + 1) and all(len(found) == 1 for found in runs.values())
    torch.manual_seed(77)
    again = arms.all_seeds(Toy(), tmp_path / "two", [5])
    for name, (found,) in runs.items():
        timeless = {"seconds": 0, "cpu_seconds": 0}
        assert {**again[name][0], **timeless} == {**found, **timeless}
    before = (tmp_path / "one" / "toy-5.json").stat().st_mtime_ns
    assert arms.all_seeds(Toy(), tmp_path / "one", [5]) == runs
    assert (tmp_path / "one" / "toy-5.json").stat().st_mtime_ns == before
    found = runs["quantized distillation, 4 bits, 64"][0]
    assert found["huffman_bytes"] > found["header_bytes"] and found["entropy"] <= found["code_bits"] <= 4


def test_a_run_that_is_cut_off_leaves_what_it_has_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored, count = arms.scored, 0

    def cut_off(task: arms.Task, model: nn.Module) -> arms.Result:
        nonlocal count
        count += 1
        if count == 8:
            raise KeyboardInterrupt
        return scored(task, model)

    monkeypatch.setattr(arms, "scored", cut_off)
    with pytest.raises(KeyboardInterrupt):
        arms.all_seeds(Toy(), tmp_path, [5])
    found = arms.collected("toy", tmp_path, [5, 6])
    assert len(found) == 7 and list(found)[:2] == ["teacher", "labels, 32 bits"]
    path = checks.save_runs(Toy(), found, torch.device("cpu"), tmp_path)
    assert json.loads(path.read_text(encoding="utf-8"))["runs"] == found
    whole = arms.all_seeds(Toy(), tmp_path, [5])
    assert count == 8 + len(whole) - 7
    undisturbed = arms.all_seeds(Toy(), tmp_path / "undisturbed", [5])
    assert {name: of[0]["score"] for name, of in whole.items()} == {n: of[0]["score"] for n, of in undisturbed.items()}
    assert list(whole) == list(undisturbed)


def test_an_arm_learns() -> None:
    task = replace_plan(Toy(), steps=200)
    model = task.student(0)
    arms.learn(task, model, 0, arms.Course(200, 1e-2, Mixing(0.0)), model.parameters())
    assert task.score(model) > 0.8


def test_claims_can_hold_and_fail() -> None:
    order = {
        "distilled, 32 bits": 99.0,
        "labels, 32 bits": 97.0,
        "quantized distillation, 4 bits, 64": 98.9,
        "quantized distillation, 2 bits, 64": 90.0,
        "labels only, 4 bits, 64": 98.0,
        "labels only, 2 bits, 64": 89.0,
        "after training, 4 bits, no bucket": 98.0,
        "after training, 4 bits, 256": 98.2,
        "after training, 4 bits, 64": 98.3,
        "after training, 2 bits, no bucket": 30.0,
        "after training, 2 bits, 256": 40.0,
        "after training, 2 bits, 64": 50.0,
        "learned points, 4 bits, 64": 98.95,
        "learned points, 2 bits, 64": 60.0,
    }
    runs = {name: [{"score": score}] * 3 for name, score in order.items()}
    assert all(check.holds and check.seeds == "3 of 3" for check in checks.orderings(runs, PLAN, higher=True))
    reversed_ = {name: [{"score": -score}] * 3 for name, score in order.items()}
    assert all(
        check.holds for check in checks.orderings(reversed_, PLAN, higher=False) if "within" not in check.statement
    )
    runs["quantized distillation, 2 bits, 64"] = [{"score": s} for s in (40.0, 40.0, 55.0)]
    failed = {check.statement: check.seeds for check in checks.orderings(runs, PLAN, higher=True) if not check.holds}
    worse = "quantized distillation, 2 bits, 64 better than after training, 2 bits, 64"
    assert failed[worse] == "1 of 3" and len(failed) >= 3


def test_translation_pairs(tmp_path: Path) -> None:
    lines = ["Go.\tVete ya.\tx", "I see.\tYa veo.\ty", "a b c d e f g\tnada\tz", "Go now.\tVete.\tw"]
    for name in ("train", "val"):
        with lzma.open(tmp_path / f"tatoeba_en-es.{name}.tsv.xz", "wt", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    task = translation.Translation(tmp_path)
    assert sum(len(sources) for sources, _ in task.train.values()) == 3  # the third is too long
    sources, targets = task.train[2]
    assert sources.shape == (1, 2) and targets[0].tolist()[3:] == [translation.END, -100, -100, -100]
    (inputs, labels), model = task.batch(0, 3), task.teacher(0)
    assert torch.equal(task.batch(0, 3)[1], labels) and model(*inputs).shape == (*labels.shape, len(task.target) + 3)
    moved = inputs[1].clone()
    moved[:, -1] = 5  # what is written later is not seen earlier
    assert torch.equal(model(inputs[0], moved)[:, :-1], model(*inputs)[:, :-1])
    assert task.score(model) > 0


def test_characters(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("to be, or not to be: that is the question. " * 60, encoding="utf-8")
    task = text.Characters(file)
    (ids,), labels = task.batch(0, 1)
    assert torch.equal(ids[:, 1:], labels[:, :-1]) and torch.equal(task.batch(0, 1)[1], labels)
    assert task.score(task.student(0)) == pytest.approx(torch.tensor(float(task.characters)).log().item(), abs=0.2)


def test_published_student_and_stored_teacher(shared_data: Path) -> None:
    import numpy as np

    with np.load(shared_data / "weights" / "cifar10_resnet20.npz") as stored:
        missing = ResNet20().load_state_dict({key: torch.from_numpy(stored[key]) for key in stored}, strict=False)
    assert not missing.unexpected_keys and all("num_batches" in key for key in missing.missing_keys)
    student = PublishedStudent.student(type("Here", (), {"device": "cpu"})(), 0)  # type: ignore[arg-type]
    weights = sum(p.numel() for p in student.parameters() if p.ndim >= 2)
    assert weights == pytest.approx(1e6, rel=0.01)


def test_one_teacher_on_real_text_for_all_seeds(tmp_path: Path) -> None:
    task = gpu.Pages(tokens(tmp_path).folder, tmp_path, "cpu", "gpt2-pico", batch=2, block=32)
    task.plan = task.plan.scaled(0.004)
    big = task.trained_teacher(0)
    again = gpu.Pages(tmp_path / "tokens", tmp_path, "cpu", "gpt2-pico", batch=2, block=32).trained_teacher(2)
    pairs = zip(big.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(a, b) and a.dtype == torch.bfloat16 for a, b in pairs)
    student = task.student(0)
    assert len(student.network.transformer.h) == 2 and len(big.network.transformer.h) == 4
    (ids,), labels = task.batch(0, 3)
    assert torch.equal(ids[:, 1:], labels[:, :-1]) and not torch.equal(task.batch(1, 3)[1], labels)
    assert task.score(student.eval()) == pytest.approx(torch.tensor(300.0).log().item(), abs=0.3)
    found = task.afterwards(0)
    assert len(found) == 5 and all(map(math.isfinite, found.values()))


def replace_plan(task: arms.Task, **changes: int) -> arms.Task:
    task.plan = replace(task.plan, **changes)  # type: ignore[arg-type]
    return task
