# SPDX-License-Identifier: Apache-2.0
"""The parts of the 8-bit experiments that can be wrong without anybody seeing it."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch

from experiments.eightbit_optimizers import classifiers, gpt2, language, memory, picture, runs, states
from lowbits.formats import DYNAMIC8, UDYNAMIC8


def test_runs_that_are_there_are_not_repeated(tmp_path: Path) -> None:
    calls = []

    def run(name: str, seed: int) -> runs.Result:
        calls.append((name, seed))
        return {"loss": math.nan if name == "b c" else float(seed)}

    first = runs.each(tmp_path, ["a", "b c"], run, seeds=(0, 1))
    assert calls == [("a", 0), ("b c", 0), ("a", 1), ("b c", 1)]  # an early look compares all arms
    again = runs.each(tmp_path, ["a", "b c"], run, seeds=(0, 1))
    assert len(calls) == 4 and again["a"] == first["a"]
    assert runs.mean_gap(again, "a", "a", "loss") == 0 and runs.mean_gap(again, "b c", "a", "loss") == math.inf


def test_claims_of_the_language_model_can_fail_and_hold() -> None:
    gap = {"linear 256": 100.0, "linear tensor": 200.0, "stable linear tensor": 150.0, "dynamic tensor": 0.02,
           "stable dynamic tensor": 0.01, "stable dynamic 256": -0.02, "stable 32-bit": -0.02,
           "bf16 nearest": 0.05, "untied stable 32-bit": -0.02}  # fmt: skip
    made: runs.Runs = {
        name: [{"loss": 4.0 + gap.get(name, 0.0), "state_bytes": 2.03} for _ in range(3)] for name in language.ARMS
    }
    assert all(check.holds for check in language.checks(made))
    made["dynamic 256"][1]["loss"] = 4.1
    made["linear 256"] = [{"loss": 4.1, "state_bytes": 2.04}] * 3
    failed = [check.statement for check in language.checks(made) if not check.holds]
    assert len(failed) == 4 and any("0.005" in statement for statement in failed)


def test_schedules() -> None:
    rates = [language.learning_rate(step) for step in range(language.STEPS)]
    assert max(rates) == 1 and rates.index(1) in (language.WARMUP - 1, language.WARMUP) and rates[-1] < 0.11
    assert [classifiers.one_cycle(t) for t in (0.0, 0.2, 0.6, 1.0)] == pytest.approx([0, 1, 0.5, 0])


@pytest.mark.parametrize("name", states.WAYS)
def test_every_way_of_storage_gives_back_something_near(name: str) -> None:
    m = torch.randn(64, 64)
    v = m.square() + 0.1
    for through, x in zip(states.WAYS[name], (m, v), strict=True):
        back = through(x)
        assert back.shape == x.shape and (back - x).norm() < (0.6 if "inverse" in name else 0.2) * x.norm()


def test_books() -> None:
    signed, unsigned = (states.inverse_dynamic(flag) for flag in (True, False))
    assert len(signed.points) == len(DYNAMIC8.points) and len(unsigned.points) == len(UDYNAMIC8.points)
    tiny, gone = torch.tensor([1e-9]), torch.tensor([0.0])
    assert language.PUBLISHED.project(tiny) == gone != UDYNAMIC8.project(tiny)


def test_exact_moments_do_not_drift() -> None:
    found = states.drift(0.25, count=512, steps=10)
    assert 0 < found["first moment only"]["drift"] < 0.2
    exact = states.walk((states.Exact(), states.Exact()), 0.25, 512, 10, 1e-3)
    assert torch.equal(exact, states.walk((states.Exact(), states.Exact()), 0.25, 512, 10, 1e-3))


def test_images_keep_their_place_in_the_mosaic(tmp_path: Path) -> None:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (200, 32, 32, 3), dtype=np.uint8)
    mosaic = pixels.reshape(2, 100, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(64, 3200, 3)
    Image.fromarray(mosaic).save(tmp_path / "x.webp", lossless=True)
    np.save(tmp_path / "x_labels.npy", np.arange(200) % 10)
    images, labels = classifiers.images(tmp_path, "x")
    mean, deviation = (torch.tensor(c).view(3, 1, 1) for c in (classifiers.MEAN, classifiers.DEVIATION))
    restored = ((images * deviation + mean) * 255).round().byte()
    assert torch.equal(restored, torch.from_numpy(pixels).permute(0, 3, 1, 2)) and labels[13] == 3
    assert classifiers.resnet(0)(images[:2]).shape == (2, 10)


def test_the_largest_that_fits() -> None:
    assert [memory.largest(lambda w, n=n: w <= n, (1, 2, 4, 8)) for n in (0, 1, 3, 8, 9)] == [None, 1, 2, 8, 8]
    gpt = memory.FAMILIES["GPT"]
    assert [gpt.depth(width) for width in (512, 768, 896, 1600, 20000)] == [12, 12, 18, 48, 96]
    plain, rounded = (memory.cell("Llama", 512, setup, True) for setup in ("32-bit", "8-bit, bf16 weights"))
    assert plain["parameters"] == rounded["parameters"] and plain["peak"] > 1.5 * rounded["peak"]


def test_the_picture_has_a_dot_for_every_model() -> None:
    setups = list(memory.SETUPS)
    rows = [{"family": family, "gib": gib, "setup": setup, "parameters": 10**9 * gib}
            for family in ("GPT", "Llama") for gib in (8, 16) for setup in setups]  # fmt: skip
    del rows[0]["parameters"]  # nothing fits
    root = ElementTree.fromstring(picture.draw(rows, setups))
    dots = [e for e in root.iter("{http://www.w3.org/2000/svg}circle") if len(e)]
    assert len(dots) == len(rows) - 1
    assert [picture.short(n) for n in (2.34e8, 9.97e9, 3.14e10)] == ["0.23 B", "10 B", "31 B"]


def test_claims_of_gpt2_count_a_run_that_diverged() -> None:
    losses = {"bf16": [6.40, 6.42, 6.44], "adam8bit": [6.41, 6.42, 6.43], "adam8bit_linear": [6.5]}
    assert [check.holds for check in gpt2.check(losses)] == [True, True]
    losses["adam8bit"], losses["adam8bit_linear"] = [6.5, 6.51, 6.52], [6.42, 6.43, 6.44]
    assert [check.holds for check in gpt2.check(losses)] == [False, False]
