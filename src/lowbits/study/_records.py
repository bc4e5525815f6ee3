# SPDX-License-Identifier: Apache-2.0
"""Read run directories as they are: finished, diverged, interrupted, crashed, or never begun.

A log is only ever appended to: a resumed run repeats the steps after its last checkpoint, so of two lines of one kind
and step the later counts; a run that was killed leaves a torn line, which is counted and passed over.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lowbits.errors import RunError

# What json.loads returns: the value types are the writer's business (docs/architecture.md).
Line: TypeAlias = dict[str, Any]

COMPARISON = "comparison.json"
CONFIG = "config.json"
ENVIRONMENT = "env.json"
FAILURE = "failure.json"
LOG = "log.jsonl"
OUTPUT = "output.txt"
RESULT = "result.json"


@dataclass(frozen=True)
class Record:
    """One run as its directory tells it.

    Args:
        directory: where it lies.
        seed: its seed.
        status: `finished`, `diverged`, `interrupted`, `failed`, `unfinished` or `missing`.
        message: why, where it did not finish.
        config: the resolved Run.
        environment: versions, device, threads, commit.
        result: result.json; empty while there is none.
        steps: training lines, in the order of their steps, each step once.
        evaluations: evaluation lines, likewise.
        errors: quantization-error lines, likewise.
        events: everything out of the ordinary, in the order of writing.
        torn_lines: lines of the log that are not JSON.
    """

    directory: Path
    seed: int
    status: str
    message: str = ""
    config: Line = field(default_factory=dict)
    environment: Line = field(default_factory=dict)
    result: Line = field(default_factory=dict)
    steps: tuple[Line, ...] = ()
    evaluations: tuple[Line, ...] = ()
    errors: tuple[Line, ...] = ()
    events: tuple[Line, ...] = ()
    torn_lines: int = 0


def read_json(path: Path) -> Line:
    """Return the object in a JSON file, or an empty one where there is no file.

    Raises:
        RunError: the file is not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Mend it, or choose another folder.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not readable as JSON ({error}); move it away and repeat the command.") from error
    if not isinstance(value, dict):
        raise RunError(f"{path}: holds no JSON object; move it away and repeat the command.")
    return value


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about writing `path` into one line.

    Raises:
        RunError: the disk is full, writing is forbidden, or a parent is no folder.
    """
    try:
        yield
    except OSError as error:
        raise RunError(
            f"{path} cannot be written: {error.strerror}. Nothing written before is lost; free the disk or choose "
            "another --out."
        ) from error


def read_log(path: Path) -> tuple[list[Line], int]:
    """Return the lines of a log and how many were torn."""
    if not path.exists():
        return [], 0
    lines: list[Line] = []
    torn = 0
    for text in path.read_bytes().splitlines():
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError):
            torn += 1
            continue
        if isinstance(line, dict):
            lines.append(line)
        else:
            torn += 1
    return lines, torn


def read_run(directory: Path, seed: int) -> Record:
    """Read one run directory.

    Args:
        directory: the run directory; it need not exist.
        seed: the seed that the run has or would have.
    """
    if not directory.is_dir():
        return Record(directory, seed, "missing", "never begun")
    result = read_json(directory / RESULT)
    failure = read_json(directory / FAILURE)
    lines, torn = read_log(directory / LOG)
    status, message = _status(result, failure)
    return Record(
        directory=directory,
        seed=int(result.get("seed", seed)),
        status=status,
        message=message,
        config=read_json(directory / CONFIG),
        environment=read_json(directory / ENVIRONMENT),
        result=result,
        steps=_by_step(lines, "step"),
        evaluations=_by_step(lines, "eval"),
        errors=_by_step(lines, "errors"),
        events=tuple(line for line in lines if line.get("kind") == "event"),
        torn_lines=torn,
    )


def _status(result: Line, failure: Line) -> tuple[str, str]:
    """What became of a run, and why; a failure is of the last attempt, so it outweighs an earlier interruption."""
    status = str(result.get("status", "unfinished"))
    if status == "finished" and finite(result.get("val_loss_on")) is None:
        return "diverged", "by the end: the final validation loss is not finite"
    if status in ("finished", "diverged"):
        return status, ""
    if failure:
        return "failed", str(failure.get("message", ""))
    if status == "interrupted":
        return status, f"stopped at step {result.get('steps')}; the same command goes on"
    return "unfinished", "no result yet"


def _by_step(lines: list[Line], kind: str) -> tuple[Line, ...]:
    """Lines of one kind, the last of each step, in the order of the steps."""
    latest = {int(line["step"]): line for line in lines if line.get("kind") == kind and "step" in line}
    return tuple(latest[step] for step in sorted(latest))


def find_runs(directory: Path) -> Iterator[tuple[str, int, Path]]:
    """Yield arm, seed and path of every `<arm>/seed-<n>` below a directory, in order."""
    for path in sorted(directory.glob("*/seed-*")):
        seed = path.name.removeprefix("seed-")
        if path.is_dir() and seed.isdigit():
            yield path.parent.name, int(seed), path


def finite(value: object) -> float | None:
    """Return a number that is one, else None: NaN, infinity, null and text are no results."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
