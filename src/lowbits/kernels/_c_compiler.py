# SPDX-License-Identifier: Apache-2.0
"""Turn C into a library with the system's compiler, once a source; no headers of torch, so in half a second."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import cache
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
# No contraction to fused multiply-adds and no fast-math: the results are those of eager torch, bit for bit.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
MACHINE = ("-march=native",)


@cache
def library(source: str) -> ctypes.CDLL | None:
    """Return the compiled source, from `$XDG_CACHE_HOME/lowbits` (`~/.cache/lowbits`) when it was compiled before.

    It is for this machine's processor alone, by whose name it is kept. A compiler that does not know the processor, or
    not OpenMP, is asked again without.

    Args:
        source: C.
    Returns:
        The library; None, with a warning, where no compiler makes one of it.
    """
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    said = "there is none"
    if compiler is not None:
        for flags in ((*FLAGS, *MACHINE, "-fopenmp"), (*FLAGS, "-fopenmp"), (*FLAGS, *MACHINE), FLAGS):
            name = hashlib.sha256("\0".join((source, compiler, processor(), *flags)).encode()).hexdigest()[:24] + ".so"
            path = folder() / name
            said = "" if path.exists() else _compile((compiler, *flags), source, path)
            if not said:
                return ctypes.CDLL(str(path))
    warnings.warn(
        f"no C compiler ({said}): optimizer steps and int8 on the CPU run eagerly, many times slower.", stacklevel=2
    )
    return None


@cache
def processor() -> str:
    """Return what tells processors apart that do not run each other's code: a home may be shared by many machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(kept)))


@cache
def folder() -> Path:
    """Return the folder for compiled libraries; one for this process where the user's cannot be written."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbits"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="lowbits-"))
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="lowbits-"))


def _compile(command: tuple[str, ...], source: str, path: Path) -> str:
    """Write the library; return what the compiler complained of."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / "made.so"
        done = subprocess.run(
            [*command, "-x", "c", "-", "-o", str(made), "-lm"], input=source, capture_output=True, text=True
        )
        if done.returncode:
            return f"{command[0]}: {done.stderr.strip().splitlines()[0] if done.stderr.strip() else done.returncode}"
        os.replace(made, path)  # whole or not at all, whoever else compiles the same
        return ""
