# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
import io
import json
import math
import sys
import types
from pathlib import Path

import pytest
from rich.console import Console

from lowbits.errors import RunError
from lowbits.train import Run, Sink, Watching, train
from lowbits.train._display import Display
from lowbits.train._log import Log, cut_after, open_trackers
from tests.train.tiny import tiny_run


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = Log(tmp_path / "log.jsonl")
    log.write({"kind": "step", "step": 1, "loss": math.nan, "deep": {"sqnr_db": math.inf, "zero": 0.5}})
    log.close()
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "step", "step": 1, "loss": None, "deep": {"sqnr_db": None, "zero": 0.5}}


@pytest.mark.parametrize(("step", "left"), [(0, 0), (1, 1), (2, 3), (3, 4), (9, 4)])
def test_the_log_is_cut_behind_a_checkpoint(tmp_path: Path, step: int, left: int) -> None:
    path = tmp_path / "log.jsonl"
    whole = [
        json.dumps({"kind": kind, "step": at}) for kind, at in (("step", 1), ("step", 2), ("eval", 2), ("step", 3))
    ]
    path.write_text("\n".join(whole) + '\n{"kind": "step", "st')
    assert cut_after(path, step) == 5 - left
    assert path.read_text() == "".join(f"{line}\n" for line in whole[:left])


def test_an_absent_tracker_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        RunError, match=r"wandb needs the package wandb; install it with `pip install 'lowbits\[track\]'`"
    ):
        open_trackers([Sink.WANDB], tmp_path, {}, 0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RunError, match="tensorboard needs the package tensorboard"):
        open_trackers([Sink.TENSORBOARD], tmp_path, {}, 0)


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, float]] = []
    run = types.SimpleNamespace(log=sent.append, finish=lambda: sent.append({}))
    options: dict[str, object] = {}
    fake = types.SimpleNamespace(init=lambda **words: options.update(words) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    (tracker,) = open_trackers([Sink.WANDB], tmp_path, Run().resolved(), 0)
    log = Log(tmp_path / "log.jsonl", [tracker])
    log.write({"kind": "eval", "step": 3, "loss_on": 2.5, "loss_off": math.nan})
    log.write({"kind": "errors", "step": 3, "layers": {"h.0": {"input": {"sqnr_db": 40.0}, "grad": {}}}})
    log.close()
    assert sent == [{"eval/loss_on": 2.5, "step": 3}, {"errors/layers/h.0/input/sqnr_db": 40.0, "step": 3}, {}]
    assert (options["resume"], options["dir"]) == ("allow", str(tmp_path))


def test_tensorboard_files_hold_the_losses(tiny_tokens: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(RunError, match=r"lowbits\[track\]"):
            open_trackers([Sink.TENSORBOARD], tmp_path, {}, 0)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watching = Watching(log_every=1, eval_every=2, sinks=(Sink.TENSORBOARD,))
    result = train(tiny_run(tiny_tokens, steps=2, watching=watching), tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    (last,) = events.Scalars("eval/loss_on")
    assert (last.step, last.value) == (2, pytest.approx(result["val_loss_on"], rel=1e-6))


def test_plain_lines_without_a_terminal() -> None:
    text = io.StringIO()
    with Display("w8a8", 400, console=Console(file=text, width=200)) as display:
        display.advance(1, 3.2)
        display.step(100, 3.21, 10234.4, 412 << 20, 31.2)
        display.say("[bold] is no markup")
    assert text.getvalue() == (
        "step 100/400  loss 3.210  10,234 tokens/s  412 MiB  0:00:31 left\n[bold] is no markup\n"
    )


def test_a_bar_in_a_terminal() -> None:
    text = io.StringIO()
    with Display("w8a8", 400, console=Console(file=text, width=120, force_terminal=True)) as display:
        display.step(100, 3.21, 10234.4, 412 << 20, 31.2)
    assert all(words in text.getvalue() for words in ("w8a8", "loss 3.210", "10,234 tokens/s", "412 MiB"))


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    Display("w8a8", 4, quiet=True).say("nothing")
    assert capsys.readouterr() == ("", "")
