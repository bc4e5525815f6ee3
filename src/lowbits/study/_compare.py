# SPDX-License-Identifier: Apache-2.0
"""Train every recipe under every seed on equal terms: the runs differ in recipe and seed, and in nothing else."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import sys
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import NoReturn

from lowbits.errors import RunError
from lowbits.methods import named
from lowbits.study._arms import Plan
from lowbits.study._changes import changed
from lowbits.study._plan import plan
from lowbits.study._process import Trainer, context, settle, start, stop
from lowbits.study._progress import Board
from lowbits.study._records import COMPARISON, CONFIG, LOG, RESULT, Line, Record, read_json, read_run, writing
from lowbits.study._report import write_report
from lowbits.study._summary import Summary
from lowbits.train import Device, Run, train

DATA = "stdlib-tokens"
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Args:
        name: for people.
        run: what to do.
        out: its folder.
    """

    name: str
    run: Run
    out: Path


def compare(
    recipes: Sequence[str],
    seeds: Sequence[int],
    base: Run,
    out: str | Path,
    *,
    jobs: int | None = None,
    trainer: Trainer = train,
) -> Summary:
    """Train each recipe under each seed, then write `report.html` and `report.json` into `out`.

    Runs that have come to an end are not repeated, interrupted ones go on where they stopped. A run that crashes or
    diverges stops no other; it is in the report as such.

    Args:
        recipes: names of `lowbits.recipes.NAMED`, each perhaps with `+method`, the baseline first; `null` repeats the
            baseline under other seeds.
        seeds: each recipe is trained once with each.
        base: everything that the runs have in common; its recipe and seed are replaced, and its method where an arm
            names one.
        out: the folder of the comparison.
        jobs: runs at a time; None: one a GPU, one a core on the CPU. Cores and GPUs are shared out evenly.
        trainer: what carries out a run.
    Returns:
        What the report shows.
    Raises:
        RunError: the comparison makes no sense, `out` holds runs of another configuration, or every run failed.
        UnknownNameError: a recipe or a method does not exist.
        DataError: the data cannot be used.
    """
    out = Path(out)
    plans = plan(recipes, seeds)
    _check(base, jobs)
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose a folder for --out.")
    gpus = _gpus(base)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    every = _jobs_of(plans, base, out)
    at_once = jobs or gpus or cores
    todo = [job for job in every if _open(job).status not in ("finished", "diverged")]
    _prepare(base, out, needed=bool(todo))
    _claim(out, plans, base, at_once)
    machine = _Machine(at_once, max(1, cores // at_once), gpus)
    _train_all(todo, machine, (len(every) - len(todo)) * base.steps, trainer)
    summary = write_report(out)
    _complain_if_all_failed(summary)
    return summary


def _check(base: Run, jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise RunError(f"jobs is the number of runs at a time, at least 1, got {jobs}.")
    if base.layers is not None:
        raise RunError("base.layers would give every recipe the same layers; leave it None and name recipes.")
    try:
        pickle.dumps(base)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise RunError(
            f"base cannot be sent to another process ({error}); define its model at module level."
        ) from error


def _jobs_of(plans: Sequence[Plan], base: Run, out: Path) -> list[Job]:
    """The runs, all recipes of the first seed before any of the second: an early look compares them all."""
    data = str(out / DATA) if base.data == "stdlib" else base.data
    jobs = []
    for p in plans:
        run = replace(base, recipe=p.recipe, method=named(p.method) if p.method else base.method, data=data)
        run = changed(run, p.changes)
        for index, seed in enumerate(p.seeds):
            jobs.append((index, Job(f"{p.name} seed {seed}", replace(run, seed=seed), _folder(out, p, seed))))
    return [job for _, job in sorted(jobs, key=lambda pair: pair[0])]


def _folder(out: Path, arm: Plan, seed: int) -> Path:
    return out / arm.folder / f"seed-{seed}"


def _open(job: Job) -> Record:
    """Read what a run's folder holds and refuse a run of another configuration."""
    there = read_json(job.out / CONFIG)
    known = json.loads(json.dumps(Run().resolved())) | there  # an option that is newer than the run was at its default
    if there and (other := _differences(known, json.loads(json.dumps(job.run.resolved())))):
        raise RunError(
            f"{job.out} holds a run with another configuration: {'; '.join(other)}. Choose another --out, or give the "
            "options of then; nothing was changed."
        )
    if not there and any((job.out / name).exists() for name in (LOG, RESULT)):
        raise RunError(f"{job.out} holds a run without {CONFIG}, so it cannot be gone on with. Choose another --out.")
    return read_run(job.out, job.run.seed)


def _differences(there: Line, here: Line, prefix: str = "") -> list[str]:
    """What two configurations disagree in, of the keys that are here."""
    found: list[str] = []
    for key, value in here.items():
        theirs = there.get(key)
        if isinstance(value, dict) and isinstance(theirs, dict):
            found += _differences(theirs, value, f"{prefix}{key}.")
        elif theirs != value:
            found.append(f"{prefix}{key} is {theirs} there, {value} here")
    return found


def _claim(out: Path, plans: Sequence[Plan], base: Run, at_once: int) -> None:
    """Say in comparison.json what is compared; runs of earlier recipes stay on disk beside it."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    told = {
        "arms": [asdict(p) for p in plans],
        "command": shlex.join(words),
        "runs_at_a_time": at_once,
        "base": base.resolved(),
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        aside = out / f"{COMPARISON}.tmp"
        aside.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        aside.replace(out / COMPARISON)


def _prepare(base: Run, out: Path, needed: bool) -> None:
    """Make or check the data once, before the runs need it at the same time."""
    from lowbits.data import TokenData, prepare

    if not needed:
        return
    if base.data == "stdlib":
        prepare("stdlib", out / DATA)
    else:
        TokenData.open(base.data)


def _gpus(base: Run) -> int:
    """On how many GPUs the runs will be, 0 for the CPU."""
    import torch

    wish, available = base.compute.device, torch.cuda.is_available()
    if wish is Device.CUDA and not available:
        raise RunError("--device cuda was asked for, but torch sees no CUDA device here; use --device cpu or auto.")
    return torch.cuda.device_count() if wish is not Device.CPU and available else 0


@dataclass(frozen=True)
class _Machine:
    """What the runs share: runs at a time, threads of each, GPUs of all."""

    at_once: int
    threads: int
    gpus: int

    def idlest_gpu(self, busy: Collection[int | None]) -> int | None:
        """The GPU with the fewest runs; None where the runs are on a CPU, or there is one GPU for all."""
        taken = list(busy)
        return min(range(self.gpus), key=taken.count) if self.gpus > 1 else None


def _train_all(todo: Sequence[Job], machine: _Machine, done_steps: int, trainer: Trainer) -> None:
    """Keep as many processes busy as the machine is to bear until all runs have ended."""
    if not todo:
        return
    how, waiting = context(), list(reversed(todo))
    running: dict[Path, tuple[Job, BaseProcess]] = {}
    gpu_of: dict[Path, int | None] = {}
    with Board(done_steps + sum(job.run.steps for job in todo), done_steps) as board, _sigterm_as_exit():
        where = f" on {machine.gpus} GPUs" if machine.gpus > 1 else ""
        board.say(f"{len(todo)} runs, {machine.at_once} at a time{where}, {machine.threads} threads each")
        try:
            while waiting or running:
                while waiting and len(running) < machine.at_once:
                    job = waiting.pop()
                    gpu = gpu_of[job.out] = machine.idlest_gpu([gpu_of[out] for out in running])
                    running[job.out] = job, start(how, trainer, job.run, job.out, machine.threads, gpu)
                    board.begin(job.name, job.out, job.run.steps)
                wait([process.sentinel for _, process in running.values()], _POLL_SECONDS)
                board.update()
                for job, process in [pair for pair in running.values() if not pair[1].is_alive()]:
                    del running[job.out]
                    settle(process, job.out)
                    board.end(job.name, read_run(job.out, job.run.seed), job.run.steps)
        finally:
            if running:
                board.say("stopping: the running ones save their state; the same command goes on")
                stop({out: process for out, (_, process) in running.items()})


@contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C does, so that the runs are told to save."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain_if_all_failed(summary: Summary) -> None:
    runs = [run for arm in summary.arms for run in arm.runs]
    if all(run.status == "failed" for run in runs):
        raise RunError(f"every run failed; the first said: {runs[0].message} Its output is in {runs[0].directory}.")
