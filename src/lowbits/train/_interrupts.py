# SPDX-License-Identifier: Apache-2.0
"""Turn Ctrl-C and SIGTERM into a flag that the loop reads between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interrupts:
    """Remember the first signal that asks this process to stop; a second one stops it at once.

    Use it as a context manager around the loop. Outside the main thread signals cannot be caught, and nothing happens.

    Attributes:
        caught: the signal, or None.
    """

    def __init__(self) -> None:
        self.caught: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._previous = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _catch(self, number: int, _: FrameType | None) -> None:
        self.caught = signal.Signals(number)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
