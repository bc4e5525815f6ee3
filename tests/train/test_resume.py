# SPDX-License-Identifier: Apache-2.0
"""A run whose process dies at any moment ends, once resumed, with the bits of one that was never disturbed (U11)."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from lowbits.errors import CheckpointError, RunError
from lowbits.train import Optimizer, Saving, checkpoints, train
from tests.train.tiny import (
    STOCHASTIC,
    log_lines,
    run_command,
    state_bytes,
    tiny_run,
    train_until,
)

# A fork server imports torch once; every process that is killed is a real one all the same.
FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.train.tiny", "transformers.models.gpt2.modeling_gpt2"])


@dataclass(frozen=True)
class Undisturbed:
    out: Path
    moments: int


@pytest.fixture(scope="module")
def undisturbed(tiny_tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert _exit_code(0, tiny_tokens, out) == 0
    return Undisturbed(out, int(Path(f"{out}.moments").read_text()))


def _exit_code(moment: int, data: Path, out: Path) -> int | None:
    process = FORK.Process(target=train_until, args=(moment, str(data), str(out)))
    process.start()
    process.join()
    return process.exitcode


def test_sigkill_at_random_moments(undisturbed: Undisturbed, tiny_tokens: Path, tmp_path: Path) -> None:
    out, draw = tmp_path / "run", random.Random(7)
    # A third of the moments is a checkpoint's interval: most lives die inside one or in its writing.
    lives = [_exit_code(draw.randrange(1, undisturbed.moments // 2), tiny_tokens, out) for _ in range(6)]
    assert lives.count(-signal.SIGKILL) >= 4
    assert _exit_code(0, tiny_tokens, out) == 0
    assert state_bytes(out) == state_bytes(undisturbed.out)
    assert log_lines(out) == log_lines(undisturbed.out)
    assert _final(out) == _final(undisturbed.out)


def test_sigkill_from_outside_at_any_time(undisturbed: Undisturbed, tiny_tokens: Path, tmp_path: Path) -> None:
    out, draw = tmp_path / "run", random.Random()
    for _ in range(2):
        process = FORK.Process(target=train_until, args=(-1, str(tiny_tokens), str(out)))
        process.start()
        _wait_for(out / "log.jsonl")
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.join()
    assert _exit_code(0, tiny_tokens, out) == 0
    assert state_bytes(out) == state_bytes(undisturbed.out)
    assert log_lines(out) == log_lines(undisturbed.out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(tiny_tokens: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    out, file = tmp_path / "run", tmp_path / "mine.py"
    # So many steps that only the signal ends it.
    file.write_text(
        "from pathlib import Path\nfrom tests.train.tiny import tiny_run\n"
        f"def run():\n    return tiny_run(Path({str(tiny_tokens)!r}), steps=100_000)\n"
    )
    process = FORK.Process(target=run_command, args=(["train", str(file), "--out", str(out)],))
    process.start()
    _wait_for(out / "log.jsonl")
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    result = json.loads((out / "result.json").read_text())
    assert process.exitcode == code
    assert (result["status"], result["signal"]) == ("interrupted", number.name)
    assert (
        [int(path.name.removeprefix("step-")) for path in checkpoints(out / "checkpoints")][-1] == result["steps"] > 0
    )


def test_a_torn_checkpoint_falls_back(undisturbed: Undisturbed, tiny_tokens: Path, tmp_path: Path) -> None:
    """Killed near its end, and its newest checkpoint torn: it falls back to the one before, and says so."""
    run, out = tiny_run(tiny_tokens, recipe=STOCHASTIC), tmp_path / "run"
    assert _exit_code(undisturbed.moments - 2, tiny_tokens, out) == -signal.SIGKILL
    *_, older, last = checkpoints(out / "checkpoints")
    weights = last / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    train(run, out, resume=True)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    events = [line for line in lines if line["kind"] == "event"]
    assert [event["event"] for event in events] == ["fallback", "resumed"]
    assert "truncated" in events[0]["message"] and int(older.name[-2:]) == events[1]["step"]
    assert state_bytes(out) == state_bytes(undisturbed.out)


def test_a_finished_run_is_not_run_again(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, steps=2)
    result = train(run, tmp_path)
    before = (tmp_path / "log.jsonl").read_bytes()
    assert train(run, tmp_path, resume=True) == json.loads((tmp_path / "result.json").read_text()) == result
    assert (tmp_path / "log.jsonl").read_bytes() == before
    with pytest.raises(RunError, match="already holds a run; go on with it by --resume"):
        train(run, tmp_path)


def test_another_run_is_refused(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, steps=2)
    train(run, tmp_path)
    with pytest.raises(CheckpointError, match=r"its optimizer\.lr is 0\.01, asked for is 0\.02"):
        train(replace(run, optimizer=Optimizer(lr=0.02)), tmp_path, resume=True)
    assert train(replace(run, saving=Saving(save_every=1)), tmp_path, resume=True)["status"] == "finished"


def test_no_intact_checkpoint_is_an_error_and_nothing_is_lost(tiny_tokens: Path, tmp_path: Path) -> None:
    run = tiny_run(tiny_tokens, steps=4)
    train(run, tmp_path)
    (tmp_path / "result.json").unlink()
    trainer = checkpoints(tmp_path / "checkpoints")[-1] / "trainer.json"
    trainer.write_text(trainer.read_text().replace('"step": 4', '"step": 3'))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"trainer.json was altered.*No intact checkpoint is left"):
        train(run, tmp_path, resume=True)
    assert sorted(tmp_path.rglob("*")) == before


def _final(out: Path) -> dict[str, object]:
    result = json.loads((out / "result.json").read_text())
    clock = ("seconds", "tokens_per_second", "peak_memory_bytes")
    return {key: value for key, value in result.items() if key not in clock}


def _wait_for(path: Path) -> None:
    while not path.exists() or not path.stat().st_size:
        time.sleep(0.01)
