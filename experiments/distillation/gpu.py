# SPDX-License-Identifier: Apache-2.0
"""`text-gpu`: a Llama of twelve layers teaches one of six on real text. One teacher for all seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.distillation.arms import BUCKETS, Batch, Course, Plan, Task, fresh, learn
from experiments.distillation.text import LogitsOf
from lowbits import models
from lowbits.data import TokenData
from lowbits.methods.distillation import Levels, Mixing, quantize_weights_, settle_

STEPS: dict[str, Levels | None] = {"32 bits": None, "4 bits": Levels.of_bits(4, BUCKETS["64"])}


class Pages(Task):
    """Language modelling in bfloat16 under autocast.

    Args:
        folder: of `lowbits data prepare`.
        out: where the teacher is kept.
        device: to train on.
        size: of the teacher, a name of `lowbits.models`; the student has half its layers.
        batch: sequences a step.
        block: tokens in a sequence.
    """

    name, unit, higher_is_better = "text_gpu", "validation loss, nats", False
    plan = Plan(bits=(4, 2), qd=("64",), steps=320, teacher_steps=640, dq_steps=60, lr=1e-3, teacher_lr=6e-4,
                temperature=1.0)  # fmt: skip

    def __init__(  # noqa: PLR0913  what a look at another size changes
        self, folder: Path, out: Path, device: str, size: str = "llama-110m", batch: int = 16, block: int = 512
    ) -> None:
        self.data, self.out, self.size, self.sequences, self.block = TokenData.open(folder), out, size, batch, block
        self.device = torch.device(device)

    def model(self, halves: int) -> nn.Module:
        """The architecture with that many halves of its layers."""
        from transformers import AutoModelForCausalLM

        config = models.config(self.size, self.data.vocab_size, self.block)
        name = "num_hidden_layers" if "num_hidden_layers" in vars(config) else "n_layer"
        setattr(config, name, halves * getattr(config, name) // 2)
        return LogitsOf(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))

    def teacher(self, seed: int) -> nn.Module:
        return fresh(lambda: self.model(2), 500).to(self.device)

    def trained_teacher(self, seed: int) -> nn.Module:
        """The one of all seeds, in bfloat16: trained by who comes first, then read."""
        path, big = self.out / "teacher.pt", self.teacher(seed)
        if path.exists():
            big.load_state_dict(torch.load(path, map_location=self.device, weights_only=True))
        else:
            course = Course(self.plan.teacher_steps, self.plan.teacher_lr, Mixing(0.0))
            learn(self, big, 1000, course, big.parameters())
            torch.save(big.state_dict(), path)
        return big.bfloat16()

    def student(self, seed: int) -> nn.Module:
        return fresh(lambda: self.model(1), seed).to(self.device)

    def batch(self, seed: int, step: int) -> Batch:
        ids = self.data.batch("train", step, batch_size=self.sequences, block=self.block, seed=seed)
        ids = ids.to(self.device, non_blocking=True)
        return (ids[:, :-1],), ids[:, 1:]

    def precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16)

    def score(self, model: nn.Module) -> float:
        nats, count = torch.zeros((), dtype=torch.float64, device=self.device), 0
        for ids in self.data.val_batches(self.sequences, self.block, 16 * self.sequences):
            ids = ids.to(self.device)  # noqa: PLW2901
            with self.precision():
                logits = model(ids[:, :-1])
            nats += nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")
            count += ids[:, 1:].numel()
        return nats.item() / count

    def afterwards(self, seed: int) -> dict[str, float]:
        """Tokens a second of greedy decoding, and the time of a step with and without levels."""
        big, student = self.trained_teacher(seed), self.student(seed)
        found = {"decode tokens/s, teacher, bf16": self.decoding(big)}
        found |= {f"step, student, {name}, ms": self.stepping(levels) for name, levels in STEPS.items()}
        quantize_weights_(student, Levels.of_bits(4, BUCKETS["64"]))
        settle_(student)
        found["decode tokens/s, student with 4-bit weights held in bf16"] = self.decoding(student.bfloat16())
        with_, without = (found[f"step, student, {name}, ms"] for name in ("4 bits", "32 bits"))
        found["share of a step that levels add, %"] = 100 * (with_ / without - 1)
        return found

    def decoding(self, model: nn.Module) -> float:
        prompt = torch.zeros(1, 16, dtype=torch.int64, device=self.device)
        count = min(64, self.block - 16)
        new: dict[str, Any] = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return count / self.median_seconds(lambda: model.network.generate(prompt, **new), 3)  # type: ignore[operator]

    def stepping(self, levels: Levels | None) -> float:
        model = self.student(0)
        if levels is not None:
            quantize_weights_(model, levels)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
        (ids,), labels = self.batch(0, 0)

        def step() -> None:
            with self.precision():
                logits = model(ids)
            nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return 1e3 * self.median_seconds(step, 10)

    def median_seconds(self, work: Callable[[], object], repeats: int) -> float:
        """Two warm-up calls, then the median."""
        seconds = []
        for _ in range(repeats + 2):
            self.wait()
            begun = time.perf_counter()
            work()
            self.wait()
            seconds.append(time.perf_counter() - begun)
        return statistics.median(seconds[2:])

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
