# SPDX-License-Identifier: Apache-2.0
"""Keep a run's folder: claim it, describe the run and the machine in it, refuse to mix two runs."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

from lowbits.analysis import provenance
from lowbits.errors import CheckpointError, RunError
from lowbits.train._disk import explained, write_json
from lowbits.train._state import check_same_run
from lowbits.train._world import World

CONFIG, ENVIRONMENT, LOG, RESULT, CHECKPOINTS = "config.json", "env.json", "log.jsonl", "result.json", "checkpoints"


def earlier_result(out: Path, config: Mapping[str, object], resume: bool) -> dict[str, object] | None:
    """Return the result of the run that `out` holds, if it has come to its end; write nothing.

    Args:
        out: of the run.
        config: the resolved run that was asked for.
        resume: whether an earlier run may be there.
    Raises:
        RunError: `out` is in use and `resume` was not asked for.
        CheckpointError: `out` holds a run with other options.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose a folder for --out.")
    if not any((out / name).exists() for name in (CONFIG, LOG, RESULT, CHECKPOINTS)):
        return None
    if not resume:
        raise RunError(f"{out} already holds a run; go on with it by --resume, or choose another --out.")
    theirs = _read(out / CONFIG)
    check_same_run(out, {key: value for key, value in theirs.items() if key in config}, config)
    result = _read(out / RESULT) if (out / RESULT).exists() else {}
    return result if result.get("status") in ("finished", "diverged") else None


def begin(out: Path, config: Mapping[str, object], world: World) -> None:
    """Make the folder of a run and describe the run and the machine in it, once.

    Args:
        out: of the run.
        config: the resolved run.
        world: where it runs.
    Raises:
        RunError: the folder cannot be written.
    """
    with explained(out):
        out.mkdir(parents=True, exist_ok=True)
    if not (out / CONFIG).exists():
        write_json(out / ENVIRONMENT, environment(world))
        write_json(out / CONFIG, config)


def environment(world: World) -> dict[str, object]:
    """Return what a number in the log may depend on besides the configuration."""
    here = {"platform": platform.platform(), "device_type": world.device.type, "processes": world.size}
    return {**provenance(world.device), **here}


def changed_environment(out: Path, world: World) -> str:
    """Return in words what of versions, device and threads is another than when the run began; empty if nothing."""
    then = _read(out / ENVIRONMENT)
    now = environment(world)
    names = ("versions", "commit", "device", "processes", "threads")
    return ", ".join(f"{n} {then.get(n)} is now {now[n]}" for n in names if then.get(n) != now[n])


def _read(path: Path) -> dict[str, object]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is missing or unreadable; choose another --out.") from error
    return value
