# SPDX-License-Identifier: Apache-2.0
"""The summary of run directories whose numbers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lowbits.errors import RunError
from lowbits.study import Summary, summarize
from lowbits.study._arms import Arm
from tests.study.synthetic import example, loss_at, write_comparison, write_run


def arm(summary: Summary, name: str) -> Arm:
    return next(a for a in summary.arms if a.name == name)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    return summarize(example(tmp_path_factory.mktemp("runs") / "x"))


def test_losses_and_gaps(everything: Summary) -> None:
    w8a8 = arm(everything, "w8a8")
    assert w8a8.loss_on.mean == pytest.approx(3.103) and w8a8.loss_off.mean == pytest.approx(3.101)
    assert w8a8.perplexity.values[0] == pytest.approx(math.exp(3.102))
    assert w8a8.gap is not None and w8a8.gap.nats == pytest.approx(3.103 - 3.1 - 0.002 / 3)
    assert w8a8.verdict == "same" and w8a8.words == "no difference seen"
    assert arm(everything, "w4_tensor").verdict == "worse"
    assert [arm(everything, name).execution for name in ("bf16", "null", "w8a8")] == [
        "high precision",
        "high precision",
        "simulated",
    ]


def test_verdicts_reach_the_headline(everything: Summary) -> None:
    said = {finding.verdict: finding.text for finding in everything.findings}
    assert "w8a8" in said["same"] and "w4_tensor" in said["worse"]
    assert "g4_tensor" in said["unstable"] and "transformer.h.0.attn.c_attn (grad)" in said["unstable"]
    assert "a4_column" in said["none"]
    assert "cannot be told from chance" in everything.noise_words
    assert "no difference seen, as it must be" in everything.null_words
    assert arm(everything, "null").role == "null" and "null" not in said["same"]


def test_what_did_not_finish_is_there_as_such(everything: Summary) -> None:
    diverged, crashed = arm(everything, "g4_tensor"), arm(everything, "a4_column")
    assert diverged.status == "1 of 3 finished, 2 diverged" and diverged.loss_on.values == (3.4,)
    assert [run.diverged_at for run in diverged.runs] == [None, 230, 250]
    assert [run.status for run in crashed.runs] == ["unfinished", "failed", "missing"]
    assert "SIGKILL" in crashed.runs[1].message or "signal 9" in crashed.runs[1].message
    assert crashed.gap is None and crashed.verdict == "none"


def test_iso_quality_is_interpolated(tmp_path: Path) -> None:
    write_comparison(tmp_path, [{"name": n, "seeds": [0]} for n in ("bf16", "better", "worse")])
    for name, final in (("bf16", 3.1), ("better", 3.0), ("worse", 3.2)):
        write_run(tmp_path, name, 0, final)
    summary = summarize(tmp_path)
    # One seed: chance is unknown, so the target is the baseline's own final loss.
    assert summary.target_loss == pytest.approx(3.1)
    assert arm(summary, "bf16").reach.tokens == 400 * 2048
    # The validation loss is logged every 50 steps; `better` crosses 3.1 between 250 and 300.
    at = next(step for step in range(50, 401, 50) if loss_at(step, 3.0) <= 3.1)
    high, low = loss_at(at - 50, 3.0), loss_at(at, 3.0)
    steps = at - 50 + 50 * (high - 3.1) / (high - low)
    reach = arm(summary, "better").reach
    assert reach.tokens == pytest.approx(steps * 2048) and reach.tokens_ratio == pytest.approx(steps / 400)
    # It runs at 7,000 tokens a second, the baseline at 10,000.
    assert reach.seconds_ratio == pytest.approx(steps / 400 * 10 / 7)
    assert arm(summary, "worse").reach.tokens is None
    assert arm(summary, "worse").reach.short_by == pytest.approx(0.1)
    assert arm(summary, "worse").verdict == "single" and "unknown" in summary.noise_words


def test_curves_and_bands(tmp_path: Path) -> None:
    write_comparison(tmp_path, [{"name": n, "seeds": [0, 1]} for n in ("bf16", "w8a8")])
    for name, seed, final in (("bf16", 0, 3.0), ("bf16", 1, 3.2), ("w8a8", 0, 3.3), ("w8a8", 1, 3.3)):
        write_run(tmp_path, name, seed, final)
    bf16, w8a8 = summarize(tmp_path).arms
    last = [series[-1] for series in (bf16.validation.mean, bf16.validation.low, bf16.validation.high)]
    assert last == pytest.approx([3.1, 3.0, 3.2]) and bf16.validation.tokens[-1] == 400 * 2048
    assert w8a8.gap_curve.mean[-1] == pytest.approx(0.2) and not bf16.gap_curve.step
    assert bf16.training.step[-1] == 400


def test_a_log_with_repeated_and_torn_lines(tmp_path: Path) -> None:
    write_comparison(tmp_path, [{"name": "bf16", "seeds": [0]}])
    log = write_run(tmp_path, "bf16", 0, 3.0) / "log.jsonl"
    again = {"kind": "eval", "step": 400, "tokens": 819200, "seconds": 80.0, "loss_on": 2.5, "loss_off": 2.5}
    log.write_text(log.read_text() + '{"kind": "eval", "st\n' + json.dumps(again) + "\n")
    (bf16,) = summarize(tmp_path).arms
    assert bf16.validation.mean[-1] == 2.5 and bf16.validation.step.count(400) == 1


def test_a_final_loss_that_is_not_finite_is_no_result(tmp_path: Path) -> None:
    write_comparison(tmp_path, [{"name": n, "seeds": [0]} for n in ("bf16", "w4a4")])
    write_run(tmp_path, "bf16", 0, 3.0)
    write_run(tmp_path, "w4a4", 0, 3.0, val_loss_on=None)
    w4a4 = arm(summarize(tmp_path), "w4a4")
    assert w4a4.status == "0 of 1 finished, 1 diverged" and w4a4.words == "1 of 1 runs diverged"


def test_folders_without_comparison_json(tmp_path: Path) -> None:
    write_run(tmp_path, "a8_token", 0, 3.0)
    write_run(tmp_path, "bf16", 4, 3.0)
    assert [(a.name, a.role, a.seeds) for a in summarize(tmp_path).arms] == [
        ("bf16", "baseline", (4,)),
        ("a8_token", "recipe", (0,)),
    ]


def test_json_is_strict_and_complete(everything: Summary) -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    told = json.loads(everything.to_json(), parse_constant=refuse)
    assert told["schema"] == "lowbits-report-1" and len(told["arms"]) == 8
    assert told["arms"][2]["gap"]["nats"] == pytest.approx(arm(everything, "w8a8").gap.nats)  # type: ignore[union-attr]


def test_unreadable_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no runs here"):
        summarize(tmp_path)
    write_comparison(tmp_path, [{"name": "bf16", "seeds": [0]}])
    (write_run(tmp_path, "bf16", 0, 3.0) / "result.json").write_text('{"status": ')
    with pytest.raises(RunError, match=r"result\.json: not readable as JSON"):
        summarize(tmp_path)
