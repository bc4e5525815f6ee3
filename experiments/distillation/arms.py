# SPDX-License-Identifier: Apache-2.0
"""One task under every arm of the paper: full precision, after training, quantized distillation, learned points."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.export import Coding, coded_sizes, published_bytes
from lowbits.methods.differentiable_quantization import (
    Start,
    gradient_norms,
    learn_points_,
    point_parameters,
    redistribute,
    resulting_bits,
)
from lowbits.methods.distillation import (
    Levels,
    Mixing,
    Teacher,
    TopK,
    coded_model,
    distillation_loss,
    quantize_weights_,
    set_draw_,
)
from lowbits.quantizers import PerBlock, PerTensor, Rounding

Batch = tuple[tuple[Tensor, ...], Tensor]
Result = dict[str, float]
Runs = dict[str, list[Result]]
Soft = Callable[[int, int, tuple[Tensor, ...]], Tensor | TopK]
BUCKETS = {"no bucket": PerTensor(), "256": PerBlock(256), "64": PerBlock(64)}


@dataclass(frozen=True)
class Plan:
    """Which arms a task runs, and for how long.

    Args:
        bits: of the weights.
        qd: buckets of quantized distillation.
        steps: of a student.
        teacher_steps: of a teacher.
        dq_steps: of learned points.
        lr: peak of Adam for a student.
        teacher_lr: for a teacher.
        dq_lr: for points.
        temperature: of the mixed loss.
        extras: other beginnings and teachers of learned points, and stochastic rounding.
    """

    bits: tuple[int, ...]
    qd: tuple[str, ...]
    steps: int
    teacher_steps: int
    dq_steps: int
    lr: float
    teacher_lr: float
    dq_lr: float = 1e-3
    temperature: float = 2.0
    extras: bool = False

    def scaled(self, share: float) -> Plan:
        """Return the same with a share of the steps, at least one where there are some."""
        whole = {name: getattr(self, name) for name in ("steps", "teacher_steps", "dq_steps")}
        steps = {name: max(min(1, count), round(share * count)) for name, count in whole.items()}
        return replace(self, **steps)  # type: ignore[arg-type]


class Task:
    """What is learned; a task says how its models and batches are made, and what a model is worth."""

    name: str
    unit: str
    higher_is_better: bool
    plan: Plan

    def teacher(self, seed: int) -> nn.Module:
        """Return a teacher, trained or not."""
        raise NotImplementedError

    def trained_teacher(self, seed: int) -> nn.Module:
        """Return a teacher, trained from labels alone if the plan has steps for it."""
        big = self.teacher(seed)
        if self.plan.teacher_steps:
            course = Course(self.plan.teacher_steps, self.plan.teacher_lr, Mixing(0.0))
            learn(self, big, seed + 1000, course, big.parameters())
        return big

    def student(self, seed: int) -> nn.Module:
        """Return a student with fresh weights."""
        raise NotImplementedError

    def batch(self, seed: int, step: int) -> Batch:
        """Return inputs and labels, a pure function of seed and step."""
        raise NotImplementedError

    def score(self, model: nn.Module) -> float:
        """Return what a model is worth on data that it has not seen."""
        raise NotImplementedError

    def soft(self, teacher: Teacher, seed: int, step: int, inputs: tuple[Tensor, ...]) -> Tensor | TopK:
        """Return what the teacher says of a batch."""
        return teacher(*inputs)

    def precision(self) -> AbstractContextManager[Any]:
        """Return the context of every forward pass."""
        return nullcontext()

    def afterwards(self, seed: int) -> dict[str, float]:
        """Return what is measured once, when all runs have ended."""
        return {}


def its_own(model: nn.Module) -> Soft:
    """The unquantized student as the teacher of its own points."""
    own = Teacher(copy.deepcopy(model))
    return lambda seed, step, inputs: own(*inputs)


def fresh(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a model from a seed of its own, whatever ran before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def generator(*numbers: int) -> torch.Generator:
    """A stream that depends on these numbers alone."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 62)
    return torch.Generator().manual_seed(mixed)


@dataclass(frozen=True)
class Course:
    """How long and how fast something learns, and from what.

    Args:
        steps: optimizer steps.
        lr: peak of Adam's learning rate.
        mixing: of the loss.
        soft: (seed, step, inputs) -> what the teacher says; None for labels alone.
    """

    steps: int
    lr: float
    mixing: Mixing
    soft: Soft | None = None


def learn(task: Task, model: nn.Module, seed: int, course: Course, parameters: Iterable[nn.Parameter]) -> None:
    """Adam under half a cosine, ten warm-up steps; the same for every arm."""
    chosen = list(parameters)
    optimizer = torch.optim.Adam(chosen, lr=course.lr, fused=chosen[0].is_cuda)
    turn = math.pi / course.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * (0.02 + 0.98 * (1 + math.cos(turn * step)) / 2)
    )
    model.train()
    for step in range(course.steps):
        inputs, labels = task.batch(seed, step)
        set_draw_(model, step)
        with task.precision():
            logits = model(*inputs)
            told = logits.detach() if course.soft is None else course.soft(seed, step, inputs)
        loss = distillation_loss(logits, told, labels, course.mixing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


Made = tuple[nn.Module, Result]
"""A model that is to be scored, and what else is told of it."""


def seed_arms(task: Task, seed: int) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Name all arms of a seed and how each is made: students begin at the same weights and read the same batches.

    What several arms begin from is trained when the first of them asks.
    """
    plan, labels = task.plan, Mixing(0.0)
    mixing = Mixing(temperature=plan.temperature)
    big = cache(lambda: task.trained_teacher(seed))
    teacher = cache(lambda: Teacher(big()))

    def soft(seed: int, step: int, inputs: tuple[Tensor, ...]) -> Tensor | TopK:
        return task.soft(teacher(), seed, step, inputs)

    def student(mixed: Mixing, levels: Levels | None) -> nn.Module:
        model = task.student(seed)
        if levels is not None:
            quantize_weights_(model, levels, seed=seed)
        course = Course(plan.steps, plan.lr, mixed, soft if mixed.weight else None)
        learn(task, model, seed, course, model.parameters())
        return model

    distilled = cache(partial(student, mixing, None))

    def after(levels: Levels) -> nn.Module:
        model = copy.deepcopy(distilled())
        quantize_weights_(model, levels)
        return model

    yield "teacher", lambda: (big(), {})
    yield "labels, 32 bits", lambda: (student(labels, None), {})
    yield "distilled, 32 bits", lambda: (distilled(), {})
    for bits in plan.bits:
        of = {name: Levels.of_bits(bits, buckets) for name, buckets in BUCKETS.items()}
        for name, levels in of.items():
            yield f"after training, {bits} bits, {name}", lambda levels=levels: (after(levels), {})
        quantized = {name: cache(partial(student, mixing, of[name])) for name in plan.qd}
        for name, make in quantized.items():
            yield f"quantized distillation, {bits} bits, {name}", lambda make=make: (make(), {})
        yield f"labels only, {bits} bits, 64", lambda levels=of["64"]: (student(labels, levels), {})
        yield from learned_points(task, seed, distilled, quantized[plan.qd[-1]], bits, soft)
        if plan.extras:
            noisy = Levels.of_bits(bits, BUCKETS["64"], Rounding.STOCHASTIC)
            told = f"quantized distillation, stochastic, {bits} bits, 64"
            yield told, lambda levels=noisy: (student(mixing, levels), {})


def learned_points(  # noqa: PLR0913  what an arm is made from
    task: Task, seed: int, distilled: Callable[[], nn.Module], quantized: Callable[[], nn.Module], bits: int, soft: Soft
) -> Iterator[tuple[str, Callable[[], Made]]]:
    """Points of the distilled student, and the same from other beginnings."""
    plan, levels = task.plan, Levels.of_bits(bits, BUCKETS["64"])
    mixing = Mixing(temperature=plan.temperature)
    arms: dict[str, tuple[Callable[[], nn.Module], Start, Soft | None, bool]] = {
        "learned points": (distilled, Start.QUANTILE, None, False)
    }
    if plan.extras:
        arms |= {
            "learned points, even start": (distilled, Start.EVEN, None, False),
            "learned points, the big teacher": (distilled, Start.QUANTILE, soft, False),
            "learned points, shared out by gradient": (distilled, Start.QUANTILE, None, True),
            "learned points after quantized distillation": (quantized, Start.EVEN, soft, False),
        }

    def made(start_from: Callable[[], nn.Module], start: Start, taught: Soft | None, shared: bool) -> Made:
        model, told = copy.deepcopy(start_from()), taught or its_own(distilled())
        learn_points_(model, levels, start=start)
        if shared:
            learn_points_(
                model, levels, start=start, counts=shared_out(task, model, seed, bits, Course(5, 0, mixing, told))
            )
        model.requires_grad_(False)
        points = [p.requires_grad_() for p in point_parameters(model).values()]
        learn(task, model, seed + 2000, Course(plan.dq_steps, plan.dq_lr, mixing, told), points)
        return model, {"packed_bits": resulting_bits(model).packed} if shared else {}

    for name, beginning in arms.items():
        yield f"{name}, {bits} bits, 64", partial(made, *beginning)


def shared_out(task: Task, model: nn.Module, seed: int, bits: int, course: Course) -> dict[str, int]:
    """Share the points out by the norm of the gradient over a few batches."""

    def loss(model: nn.Module, step: int) -> Tensor:
        inputs, labels = task.batch(seed, step)
        assert course.soft is not None
        with task.precision():
            logits, told = model(*inputs), course.soft(seed, step, inputs)
        return distillation_loss(logits, told, labels, course.mixing)

    norms = gradient_norms(model, loss, range(course.steps))
    return redistribute(dict.fromkeys(norms, 1 << bits), norms)


def scored(task: Task, model: nn.Module) -> Result:
    """Return the worth of a model as it would be deployed, and its bytes if its weights are quantized."""
    model.eval()
    with torch.no_grad():
        result = {"score": task.score(model)}
    if not any(hasattr(kind, "_viewed") for kind in map(type, model.modules())):
        return result | {"parameters": float(sum(p.numel() for p in model.parameters()))}
    coded = coded_model(model)
    packed, huffman = (coded_sizes(coded, coding) for coding in (Coding.PACKED, Coding.HUFFMAN))
    plain = sum(t.numel() for t in coded.plain.values())
    size = next(iter(coded.coded.values())).buckets
    bucket = getattr(size, "size", max(c.codes.numel() for c in coded.coded.values()))
    return result | {
        "packed_bytes": packed.file, "packed_weight_bytes": packed.codes + packed.ranges,
        "huffman_bytes": huffman.file, "ratio": huffman.ratio,
        "code_bits": huffman.mean_length, "entropy": huffman.entropy, "header_bytes": huffman.header,
        "published_bytes": published_bytes(plain, huffman.elements, huffman.mean_length, bucket),
    }  # fmt: skip


def all_seeds(task: Task, out: Path, seeds: Sequence[int]) -> Runs:
    """Run every seed that has no file yet; the arms of a seed by name.

    What a seed that was cut off has measured stays in a file of its own, `TASK-SEED.part.json`, and is not run again.
    """
    out.mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        whole = out / f"{task.name}-{seed}.json"
        part = whole.with_suffix(".part.json")
        if whole.exists():
            continue
        found: dict[str, Result] = json.loads(part.read_text(encoding="utf-8")) if part.exists() else {}
        for name, make in seed_arms(task, seed):
            if name in found:
                continue
            begun, cpu = time.perf_counter(), time.process_time()
            model, more = make()
            result = scored(task, model) | more
            spent = {"seconds": time.perf_counter() - begun, "cpu_seconds": time.process_time() - cpu}
            found[name] = result | {key: round(value, 2) for key, value in spent.items()}
            print(f"{task.name} seed {seed}: {name}: {result['score']:.4f}", flush=True)
            new = part.with_suffix(".tmp")
            new.write_text(json.dumps(found) + "\n", encoding="utf-8")
            new.replace(part)  # a run that is killed here leaves what it had
        part.replace(whole)
    return collected(task.name, out, seeds)


def collected(name: str, out: Path, seeds: Sequence[int]) -> Runs:
    """Return what the seeds have measured so far: the arms that all of them have, in their order."""
    found: list[dict[str, Result]] = []
    for seed in seeds:
        for path in (out / f"{name}-{seed}.json", out / f"{name}-{seed}.part.json"):
            if path.exists():
                found.append(json.loads(path.read_text(encoding="utf-8")))
                break
    return {arm: [one[arm] for one in found] for arm in (found[0] if found else {}) if all(arm in one for one in found)}
