# SPDX-License-Identifier: Apache-2.0
"""Write a file whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from lowbits.errors import RunError


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` beside `path`, sync it, and rename: at any instant `path` is the old file or the new one.

    Args:
        path: of the file; its folder exists.
        data: all of it.
    Raises:
        RunError: the operating system refuses; the old file stands as it was.
    """
    aside = path.with_name(f".{path.name}.partial")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror or error}. What was there before is untouched; "
            "free some space, or choose another folder."
        ) from error
