# SPDX-License-Identifier: Apache-2.0
"""Append to log.jsonl, and hand every line on to the trackers that were asked for."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from lowbits.errors import RunError
from lowbits.train._disk import explained
from lowbits.train._run import Sink

Line = Mapping[str, object]


class Tracker(Protocol):
    """Where lines go besides log.jsonl."""

    def write(self, line: Line) -> None:
        """Take one line of the log."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class Log:
    """Write one JSON object a line; numbers that are not finite become null.

    Args:
        path: of log.jsonl; created if absent.
        trackers: get every line too.
    """

    def __init__(self, path: Path, trackers: Sequence[Tracker] = ()) -> None:
        self._path = path
        self._trackers = trackers
        with explained(path):
            self._file = path.open("a", encoding="utf-8")

    def write(self, line: Line) -> None:
        """Append a line and flush it, so that a crash loses nothing.

        Raises:
            RunError: the disk is full.
        """
        plain = _finite(line)
        assert isinstance(plain, dict)
        with explained(self._path):
            self._file.write(json.dumps(plain, allow_nan=False) + "\n")
            self._file.flush()
        for tracker in self._trackers:
            tracker.write(plain)

    def sync(self) -> None:
        """Force the lines to the disk: a checkpoint promises those up to its step."""
        with explained(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the trackers."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def cut_after(path: Path, step: int) -> int:
    """Cut a log behind the last line of `step`, so that a resumed run repeats no line.

    Args:
        path: of log.jsonl; may be absent.
        step: of the checkpoint that the run goes on from.
    Returns:
        Number of lines cut, a torn last one included.
    """
    if not path.exists():
        return 0
    kept, cut = 0, 0
    for raw in path.read_bytes().splitlines(keepends=True):
        if cut or not _belongs(raw, step):
            cut += 1
        else:
            kept += len(raw)
    with explained(path):
        os.truncate(path, kept)
    return cut


def open_trackers(sinks: Sequence[Sink], out: Path, config: Line, step: int) -> list[Tracker]:
    """Start the trackers that a run asks for.

    Args:
        sinks: which.
        out: of the run.
        config: the resolved run.
        step: optimizer steps done; what a tracker holds of later ones is dropped where it can drop.
    Raises:
        RunError: the package of a sink is not installed.
    """
    openers = {Sink.TENSORBOARD: TensorBoard, Sink.WANDB: WeightsAndBiases}
    return [openers[sink](out, config, step) for sink in sinks]


class TensorBoard:
    """Write scalars under `<out>/tensorboard`.

    Args:
        out: of the run.
        config: the resolved run, shown as text.
        step: optimizer steps done; later ones are dropped.
    """

    def __init__(self, out: Path, config: Line, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing(Sink.TENSORBOARD) from error
        self._writer = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
        self._writer.add_text("config", f"```json\n{json.dumps(config, indent=2)}\n```")

    def write(self, line: Line) -> None:
        """See `Tracker.write`."""
        step = line["step"]
        assert isinstance(step, int)
        for name, value in _scalars(line):
            self._writer.add_scalar(name, value, step)
        if line["kind"] == "event":
            self._writer.add_text(f"event/{line['event']}", str(line["message"]), step)

    def close(self) -> None:
        """See `Tracker.close`."""
        self._writer.close()


class WeightsAndBiases:
    """Send scalars to Weights & Biases; project, entity and mode are set in its own ways (`WANDB_PROJECT`, ...).

    Args:
        out: of the run; its files go there, and its path identifies the run when it is resumed.
        config: the resolved run.
        step: not needed; a resumed run overwrites its later steps.
    """

    def __init__(self, out: Path, config: Line, step: int) -> None:
        import hashlib

        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise _missing(Sink.WANDB) from error
        identity = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:16]
        self._run = wandb.init(id=identity, name=out.name, dir=str(out), config=dict(config), resume="allow")

    def write(self, line: Line) -> None:
        """See `Tracker.write`."""
        step = line["step"]
        assert isinstance(step, int)
        self._run.log({**dict(_scalars(line)), "step": step})

    def close(self) -> None:
        """See `Tracker.close`."""
        self._run.finish()


def _missing(sink: Sink) -> RunError:
    return RunError(
        f"the sink {sink.value} needs the package {sink.value}; install it with `pip install 'lowbits[track]'` "
        "or leave --sinks out."
    )


def _scalars(line: Line) -> list[tuple[str, float]]:
    """`("step/loss", 3.1)`; nested lines by path: `errors/layers/<layer>/<operand>/sqnr_db`."""
    found: list[tuple[str, float]] = []

    def walk(prefix: str, value: object) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix}/{key}", item)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((prefix, value))

    walk(str(line["kind"]), {key: value for key, value in line.items() if key not in ("kind", "step")})
    return found


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return value


def _belongs(raw: bytes, step: int) -> bool:
    try:
        return raw.endswith(b"\n") and json.loads(raw)["step"] <= step
    except (ValueError, KeyError, TypeError):
        return False
