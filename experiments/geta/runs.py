# SPDX-License-Identifier: Apache-2.0
"""Runs that are not repeated, claims, and results files that grow with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import checks as checks_file
from experiments.checks import RESULTS, Check
from experiments.geta.arms import Arm, Result, Task, measured
from lowbits.analysis import provenance

SEEDS = (0, 1, 2)
Runs = dict[str, list[Result]]


@dataclass(frozen=True)
class Study:
    """All arms of a task, and what they are to show.

    Args:
        name: of the results file, behind `geta_`.
        task: what is trained.
        arms: by name, for a seed.
        claims: of the runs, once all are there.
        setting: what the results file says of the task.
        out: folder of the runs.
        results: folder of results files.
    """

    name: str
    task: Task
    arms: Callable[[int], Mapping[str, Arm]]
    claims: Callable[[Runs], Sequence[Check]]
    setting: Mapping[str, object]
    out: Path
    results: Path = RESULTS

    def carry_out(self, seeds: Sequence[int]) -> Path:
        """Carry out every run that is not there, all arms of a seed before any of the next."""
        for seed in seeds:
            self.carry_out_one(seed, seeds)
        return self.write(seeds, aloud=True)

    def carry_out_one(self, seed: int, seeds: Sequence[int]) -> None:
        """Carry out the runs of one seed that are not there; write after each what there is of all."""
        self.out.mkdir(parents=True, exist_ok=True)
        for name, arm in self.arms(seed).items():
            if self._read(name, seed) is None:
                found = {**measured(self.task, arm, seed), "steps": self.task.steps}
                self._path(name, seed).write_text(json.dumps(found) + "\n", encoding="utf-8")
                print(f"{self.name}, {name}, seed {seed}: {json.dumps(found)}", flush=True)
                self.write(seeds)

    def write(self, seeds: Sequence[int], aloud: bool = False) -> Path:
        """Write what there is; the claims are judged once all runs of the seeds are there."""
        runs = self.collected(seeds)
        whole = len(runs) == len(self.arms(0)) and all(len(found) == len(seeds) for found in runs.values())
        claims = self.claims(runs) if whole else []
        content = {"setting": dict(self.setting), "seeds": list(seeds), "complete": whole, "runs": runs}
        where = provenance(self.task.device)
        path = checks_file.save(f"geta_{self.name}", where, content, claims, self.results)
        if aloud:
            checks_file.tell(path, claims)
        return path

    def collected(self, seeds: Sequence[int]) -> Runs:
        """Return the runs that are there."""
        found = {name: [self._read(name, seed) for seed in seeds] for name in self.arms(0)}
        return {name: own for name, all_ in found.items() if (own := [result for result in all_ if result is not None])}

    def _path(self, name: str, seed: int) -> Path:
        return self.out / f"{self.task.name}-{name.replace(' ', '_').replace(',', '').replace('%', 'pc')}-{seed}.json"

    def _read(self, name: str, seed: int) -> Result | None:
        """Return a run of as many steps as are asked for."""
        path = self._path(name, seed)
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        return found if found is None or found.get("steps", self.task.steps) == self.task.steps else None


def side_by_side(study: Study, seeds: Sequence[int]) -> Path:
    """Run each seed in a process of its own; each writes what all have measured."""
    own = [sys.executable, "-m", "experiments.geta", *sys.argv[1:]]
    running = [subprocess.Popen([*own, "--only", str(seed)]) for seed in seeds]
    failed = [seed for seed, process in zip(seeds, running, strict=True) if process.wait()]
    path = study.write(seeds, aloud=True)
    if failed:
        sys.exit(f"seeds {failed} failed; what was measured is in {path}.")
    return path


def mean(runs: Mapping[str, list[Result]], name: str, key: str) -> float:
    """Return the mean over seeds."""
    return sum(float(result[key]) for result in runs[name]) / len(runs[name])


def told(runs: Mapping[str, list[Result]], name: str, key: str) -> str:
    """Return the numbers of an arm by seed."""
    return " ".join(f"{result[key]:.4g}" for result in runs[name])


def write(name: str, content: dict[str, object], checks: Sequence[Check], device: torch.device, results: Path) -> Path:
    """Write <results>/<device>/geta_<name>.json and print the claims."""
    path = checks_file.save(f"geta_{name}", provenance(device), content, checks, results)
    checks_file.tell(path, checks)
    return path
