# SPDX-License-Identifier: Apache-2.0
"""Show how the runs of a comparison go: a bar for each and one for all; plain lines where nobody watches."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from lowbits.study._numbers import duration, nats
from lowbits.study._records import LOG, Record, finite

_PLAIN_SECONDS = 30.0


@dataclass
class Tail:
    """Follow a log as it grows.

    Args:
        path: of log.jsonl; need not exist.
        step: the last one seen.
        note: losses seen last.
    """

    path: Path
    step: int = 0
    note: str = ""
    _offset: int = 0

    def read(self) -> None:
        """Take in the whole lines that were appended; start over if the log was cut."""
        if not self.path.exists():
            return
        if self.path.stat().st_size < self._offset:
            self._offset = 0
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                self._offset += len(raw)
                self._take(raw)

    def _take(self, raw: bytes) -> None:
        try:
            line = json.loads(raw)
        except ValueError:
            return
        self.step = int(line.get("step", self.step))
        if line.get("kind") == "step":
            self.note = f"loss {nats(finite(line.get('loss')))}"


class Board:
    """Show all runs.

    Args:
        total_steps: of all runs together.
        done_steps: of them, done before.
        console: where to; stderr if None.
    """

    def __init__(self, total_steps: int, done_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._total, self._before = total_steps, done_steps
        self._settled = done_steps
        self._began = self._said = time.monotonic()
        self._tails: dict[str, Tail] = {}
        self._tasks: dict[str, TaskID] = {}
        self._bar: Progress | None = None
        if self.console.is_terminal:
            note = TextColumn("{task.fields[note]}", style="dim")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
            self._bar = Progress(*columns, console=self.console, speed_estimate_period=120)
            self._all = self._bar.add_task("[bold]all runs", total=total_steps, completed=done_steps, note="")

    def __enter__(self) -> Board:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self.console.print(text, markup=False, soft_wrap=True)

    def begin(self, name: str, out: Path, steps: int) -> None:
        """Show a run that starts or goes on."""
        self._tails[name] = Tail(out / LOG)
        if self._bar is not None:
            self._tasks[name] = self._bar.add_task(name, total=steps, note="")
        else:
            self.say(f"{name}: begun")

    def update(self) -> None:
        """Take in what the logs say."""
        for name, tail in self._tails.items():
            tail.read()
            if self._bar is not None:
                self._bar.update(self._tasks[name], completed=tail.step, note=tail.note)
        done = self._settled + sum(tail.step for tail in self._tails.values())
        if self._bar is not None:
            self._bar.update(self._all, completed=done)
        elif time.monotonic() - self._said > _PLAIN_SECONDS:
            self._said = time.monotonic()
            running = ", ".join(f"{name} step {tail.step} {tail.note}" for name, tail in self._tails.items())
            self.say(f"{done} of {self._total} steps, {self._left(done)} left: {running}")

    def end(self, name: str, record: Record, steps: int) -> None:
        """Say what became of a run."""
        self._tails.pop(name)
        self._settled += steps
        if self._bar is not None:
            self._bar.remove_task(self._tasks.pop(name))
        loss = finite(record.result.get("val_loss_on"))
        told = f", validation loss {nats(loss)}" if record.status == "finished" else f": {record.message}"
        seconds = finite(record.result.get("seconds"))
        took = f", {duration(seconds)} of training" if seconds is not None else ""
        self.say(f"{name}: {record.status}{told if told != ': ' else ''}{took}")

    def _left(self, done: int) -> str:
        passed = done - self._before
        return duration((time.monotonic() - self._began) * (self._total - done) / passed) if passed > 0 else "?"
