# SPDX-License-Identifier: Apache-2.0
"""What the NVFP4 comparison on a GPU says of losses and logs, also of those that end early."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from experiments.checks import Check
from experiments.nvfp4_pretraining import gpt2
from lowbits.train import Run

BF16 = [6.50, 6.52, 6.51]


def above(gap: float) -> list[float]:
    return [loss + gap for loss in BF16]


def switch(nvfp4: float, switched: float, seeds: int = 3) -> Check:
    """G7d of arms that lie so far above bf16."""
    losses = {"bf16": BF16, "nvfp4": above(nvfp4), gpt2.SWITCHED: above(switched)}
    return gpt2.judge({arm: found[:seeds] for arm, found in losses.items()}, switched=True)[-1]


def test_half_of_a_gap_is_recovered_or_not() -> None:
    assert switch(0.10, 0.04).holds and switch(0.10, 0.04).measured.startswith("60%")
    assert not switch(0.10, 0.06).holds


@pytest.mark.parametrize(("nvfp4", "seeds"), [(-0.003, 3), (0.0, 3), (0.016, 3), (0.10, 1)])
def test_where_there_is_no_gap_nothing_is_recovered(nvfp4: float, seeds: int) -> None:
    """The seeds scatter by 0.01, so the difference of two means of three by 0.0082; one seed says nothing of it."""
    found = switch(nvfp4, nvfp4 / 4, seeds)
    assert found.id == "G7d" and not found.holds and found.measured.startswith("not resolvable")
    assert switch(0.017, 0.004).holds


def repeat(folder: Path, monkeypatch: pytest.MonkeyPatch, first: list[float], second: list[float]) -> tuple[Check, int]:
    """G3 from two logs with these losses, and how many runs were begun."""
    begun: list[Path] = []

    def train(run: Run, out: Path, *, resume: bool) -> None:
        begun.append(out)
        out.mkdir(parents=True)
        losses = first if out.name == "first" else second
        lines = [{"kind": "start"}, *({"kind": "step", "loss": loss, "grad_norm": 1.0} for loss in losses)]
        (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(gpt2, "train", train)
    return gpt2.twice(gpt2.RUN, folder), len(begun)


def test_two_runs_are_compared_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = [11.0 - step / 10 for step in range(gpt2.REPEATED)]
    same, _ = repeat(tmp_path / "a", monkeypatch, losses, losses)
    assert same.holds and same.measured == "50 of 50 steps"
    other, _ = repeat(tmp_path / "b", monkeypatch, losses, [*losses[:-1], losses[-1] + 1e-7])
    assert not other.holds and other.measured == "49 of 50 steps"


@pytest.mark.parametrize(
    ("lengths", "name", "runs"), [((50, 16), "second", 2), ((16, 50), "first", 1), ((0, 0), "first", 1)]
)
def test_a_stopped_run_is_a_check_that_does_not_hold(
    lengths: tuple[int, int], name: str, runs: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, begun = repeat(tmp_path, monkeypatch, *([1.0] * length for length in lengths))
    assert not found.holds and begun == runs
    assert found.measured == f"not measured: the {name} run has {min(lengths)} of 50 steps"


def test_losses_are_written_before_the_repetition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that is stopped while it repeats its 50 steps keeps the results of hours."""
    written: list[list[Check]] = []

    def stopped(run: Run, out: Path) -> Check:
        assert written == [[]]
        raise KeyboardInterrupt

    monkeypatch.setattr(gpt2, "compare", lambda *_, **__: "summary")
    monkeypatch.setattr(gpt2, "report", lambda summary, out, name, repeated: written.append(repeated))
    monkeypatch.setattr(gpt2, "twice", stopped)
    monkeypatch.setattr(sys, "argv", ["gpt2", "--data", "tokens", "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        gpt2.main()
    assert written == [[]]
