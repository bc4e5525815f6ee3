# SPDX-License-Identifier: Apache-2.0
"""Carry out one run in a process of its own, so that whatever kills it kills nothing else.

Processes are forked from a server that has imported torch and transformers but used neither: importing them anew costs
seconds for every run. Where there is no fork (Windows), they are spawned.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol

from lowbits.study._records import FAILURE, OUTPUT, RESULT, writing
from lowbits.train import Run

# A run that was asked to stop saves its state first.
PATIENCE_SECONDS = 120.0
_PRELOAD = [
    "lowbits.study",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama",
]


class Trainer(Protocol):
    """What carries out a run: `lowbits.train.train`, or a stand-in at module level."""

    def __call__(self, run: Run, out: Path, /, *, resume: bool) -> object:
        """Train as `run` says into `out`; go on with what is there if `resume`."""
        ...


def context() -> BaseContext:
    """Return how processes are started on this system."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    forking = multiprocessing.get_context("forkserver")
    forking.set_forkserver_preload(_PRELOAD)
    return forking


def start(how: BaseContext, trainer: Trainer, run: Run, out: Path, threads: int, gpu: int | None = None) -> BaseProcess:
    """Start a run and return its process.

    Args:
        how: from `context`.
        trainer: carries it out.
        run: what to do.
        out: the run's folder; what the process prints goes into `output.txt` there.
        threads: of torch.
        gpu: which of the GPUs that are visible here is the run's; None leaves it as it is.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / FAILURE).unlink(missing_ok=True)
    process = how.Process(target=_work, args=(trainer, run, out, threads, gpu), name=str(out))  # type: ignore[attr-defined]
    process.start()
    return process


def settle(process: BaseProcess, out: Path) -> None:
    """Note in `failure.json` why a process that has ended left no result.

    Args:
        process: that has ended.
        out: the run's folder.
    """
    process.join()
    if process.exitcode == 0 and (out / RESULT).exists():
        return
    failure = {"message": _reason(process.exitcode or 0, out / OUTPUT), "exit_code": process.exitcode}
    with writing(out / FAILURE):
        (out / FAILURE).write_text(json.dumps(failure) + "\n", encoding="utf-8")


def stop(processes: dict[Path, BaseProcess]) -> None:
    """Ask processes to save and end; end those that do not.

    Args:
        processes: by their run's folder.
    """
    for process in processes.values():
        process.terminate()
    for process in processes.values():
        process.join(PATIENCE_SECONDS)
        if process.is_alive():
            process.kill()
            process.join()


def _work(trainer: Trainer, run: Run, out: Path, threads: int, gpu: int | None) -> None:
    """Be the process: its own session (Ctrl-C reaches the parent alone), its own output, its share of the cores."""
    import torch

    if hasattr(os, "setsid"):
        os.setsid()
    with (out / OUTPUT).open("a", encoding="utf-8") as output:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:  # read when CUDA is first used, which is later
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[gpu] if visible else str(gpu)
    torch.set_num_threads(threads)
    trainer(run, out, resume=True)


def _end_with_parent() -> None:
    """A run that nobody waits for saves and ends: else the same command, given again, would train beside it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def _reason(exit_code: int, output: Path) -> str:
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        return f"killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    lines = output.read_text(encoding="utf-8", errors="replace").split("\n") if output.exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return (re.sub(r"^lowbits\.errors\.\w+: ", "", said) or f"ended with exit code {exit_code}, without a result")[:500]
