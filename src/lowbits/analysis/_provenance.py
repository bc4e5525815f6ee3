# SPDX-License-Identifier: Apache-2.0
"""Say where a number comes from: versions, device, commit, time."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("lowbits", "torch", "transformers", "triton")


def device_name(device: torch.device) -> str:
    """Return the name of a device as a folder can carry it, for example `nvidia-h200` or `cpu-x86_64`.

    Args:
        device: a torch device.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}-{platform.machine()}"
    return "-".join(name.lower().replace("/", " ").split())


def provenance(device: torch.device) -> dict[str, object]:
    """Return what is needed to judge and to repeat a measurement.

    Args:
        device: where it was measured.
    Returns:
        Package versions, device name, threads, Python, UTC time, and the commit of the source tree (`+` behind it when
        tracked files differ from it; None outside a checkout).
    """
    versions = {name: _version(name) for name in _PACKAGES}
    return {
        "versions": {name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    commit = _git(here, "rev-parse", "--short=12", "HEAD")
    if commit is None:
        return None
    return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
