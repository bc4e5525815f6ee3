# SPDX-License-Identifier: Apache-2.0
"""Show a person how a run goes: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Show progress on stderr.

    Args:
        name: of the run.
        steps: in the run.
        quiet: show nothing, as every process but the first does.
        console: where to; stderr if None.
    """

    def __init__(self, name: str, steps: int, quiet: bool = False, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, quiet=quiet, highlight=False)
        self._steps = steps
        self._bar: Progress | None = None
        if self._console.is_terminal and not quiet:
            text = TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  {task.fields[memory]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text, TimeRemainingColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(name, total=steps, loss="-", speed="-", memory="-")

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int, loss: float) -> None:
        """Move the bar; without a terminal nothing is printed between two lines of the log."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}")

    def step(self, step: int, loss: float, tokens_per_second: float, memory_bytes: int, seconds_left: float) -> None:
        """Show what a line of the log says, and the time that the rest will take."""
        speed, memory = f"{tokens_per_second:,.0f}", f"{memory_bytes / 2**20:,.0f} MiB"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.3f}", speed=speed, memory=memory)
        else:
            left = str(timedelta(seconds=round(seconds_left)))
            self.say(f"step {step}/{self._steps}  loss {loss:.3f}  {speed} tokens/s  {memory}  {left} left")
