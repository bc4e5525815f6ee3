# SPDX-License-Identifier: Apache-2.0
"""Write files so that a crash, a full disk or a missing permission leaves the old content, and an error that helps."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lowbits.errors import RunError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def explained(path: Path, intact: str = "Nothing written before is lost") -> Iterator[None]:
    """Turn what the operating system says about writing `path` into one line that says what to do.

    Args:
        path: file or folder that is being written.
        intact: what still stands, for the message.
    Raises:
        RunError: the disk is full, writing is forbidden, or a parent is no folder.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise RunError(_explain(path, error.errno, error.strerror or str(error), intact)) from error
    except SafetensorError as error:  # its I/O errors carry the number in the text: "... (os error 28)"
        number = next((n for n in (*_FULL, *_FORBIDDEN) if f"os error {n}" in str(error)), None)
        raise RunError(_explain(path, number, str(error), intact)) from error


def _explain(path: Path, number: int | None, text: str, intact: str) -> str:
    if number in _FULL:
        return f"the disk is full, {path} could not be written. {intact}; free some space and go on with --resume."
    if number in _FORBIDDEN:
        return f"no permission to write {path} ({text}); choose another --out or change its owner."
    return f"{path} cannot be written: {text}. {intact}; choose another --out, or mend it and go on with --resume."


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file atomically: aside, synced, renamed.

    Args:
        path: of the file.
        value: what `json` can hold.
    """
    aside = path.with_name(f".{path.name}.partial")
    with explained(path):
        with aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a folder that may be half written or half deleted."""
    shutil.rmtree(folder, ignore_errors=True)
