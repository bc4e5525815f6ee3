# SPDX-License-Identifier: Apache-2.0
"""Keep checkpoints that are either whole or recognised as torn.

A checkpoint is filled in a hidden folder, every file is synced, a manifest with the SHA-256 of each is written last,
and only then the folder gets its name. Whatever instant the process dies at, a folder called `step-...` is whole; what
the disk does to it later, the manifest shows.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

from lowbits.errors import CheckpointError
from lowbits.train._disk import explained, remove, sync_folder

MANIFEST = "MANIFEST.json"


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Write a checkpoint atomically and delete all but the last `keep`.

    Args:
        folder: of all checkpoints of a run.
        step: optimizer steps done.
        fill: writes the files into the folder that it is given.
        keep: number of checkpoints that stay.
    Returns:
        The checkpoint's folder.
    Raises:
        RunError: the disk is full or not writable; the older checkpoints are untouched.
    """
    final = folder / f"step-{step:08d}"
    aside = folder / f".{final.name}.partial"
    remove(aside)
    older = checkpoints(folder)
    intact = f"The checkpoint {older[-1].name} is intact" if older else "Nothing written before is lost"
    try:
        with explained(aside, intact):
            aside.mkdir(parents=True)
            fill(aside)
            _seal(aside)
            _discard(final)  # only a torn one can have this name
            aside.rename(final)
            sync_folder(folder)
    finally:
        remove(aside)
    for old in checkpoints(folder)[:-keep]:
        _discard(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of all checkpoints, oldest first, whole or not."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def tidy(folder: Path) -> None:
    """Delete what an interrupted write or deletion left behind."""
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.removed")]:
        remove(path)


def verify(checkpoint: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        CheckpointError: a file is missing, truncated or altered; names it.
    """
    try:
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint} is torn: {MANIFEST} is missing or unreadable.") from error
    for name, entry in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{checkpoint} is torn: {name} is missing.")
        if path.stat().st_size != entry["bytes"]:
            raise CheckpointError(
                f"{checkpoint} is torn: {name} is truncated, {path.stat().st_size} of {entry['bytes']} bytes."
            )
        if _sha256(path) != entry["sha256"]:
            raise CheckpointError(f"{checkpoint} is torn: {name} was altered, its SHA-256 is not the manifest's.")


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole checkpoint, and what is wrong with newer ones.

    Raises:
        CheckpointError: there are checkpoints, but none is whole.
    """
    complaints: list[str] = []
    for checkpoint in reversed(checkpoints(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            complaints.append(str(error))
        else:
            return checkpoint, complaints
    if complaints:
        raise CheckpointError(f"{complaints[0]} No intact checkpoint is left; start the run again in another --out.")
    return None, []


def _seal(aside: Path) -> None:
    entries = {}
    for path in sorted(p for p in aside.rglob("*") if p.is_file()):
        _sync(path)
        entries[path.relative_to(aside).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = aside / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=2) + "\n", encoding="utf-8")
    _sync(manifest)
    sync_folder(aside)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; hidden first, so that a half-deleted one is never taken for a torn one."""
    if checkpoint.exists():
        hidden = checkpoint.with_name(f".{checkpoint.name}.removed")
        remove(hidden)
        checkpoint.rename(hidden)
        remove(hidden)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
