# SPDX-License-Identifier: Apache-2.0
"""`gpu`: H1, the published 130M shape on real text, every arm at its own learning rate; `gpu-speed`: H2 and H6.

A run is a file, so that several calls, and several processes at once on one GPU, add up; `gpu-report` reads them.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments import checks as checks_file
from experiments.direct_quantized_training.arms import ARMS, Arm, Kind
from experiments.direct_quantized_training.device import DEVICE
from experiments.direct_quantized_training.model import Shape
from experiments.direct_quantized_training.results import Check, Ways, mean, once, spread
from experiments.direct_quantized_training.training import Plan, Result, run
from lowbits.analysis import provenance
from lowbits.data import TokenData
from lowbits.errors import RunError
from lowbits.methods.dqt import Environment
from lowbits.nn import Execution

OTHER_LR, VALIDATION = 1e-3, 256  # sequences
SEARCHED = ("fp", "bitnet", "dqt_8", "dqt_ternary")
LIKE = {"rtn_ternary": "dqt_ternary", "frozen_ternary": "dqt_ternary"}
NAMES = (*SEARCHED, *LIKE)
RATES, SEARCH_SHARE, SEARCH_SEED = (3e-4, 1e-3, 3e-3), 4, 100
"""The search is on a seed that is not reported, a quarter as long; other rates are looked at by `--lr`."""
SPEEDS = (
    "fp", "bitnet", "dqt_8", "dqt_ternary", "dqt_8 native", "dqt_ternary native", "dqt_8 float32 gradients",
    "dqt_ternary float32 gradients",
)  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """What a call of `gpu` trains, and how much of it.

    Args:
        data: folder of tokens.
        out: folder of the runs.
        shape: of the model.
        steps: updates.
        batch: sequences in one.
        length: tokens of a sequence.
        compiled: torch.compile on every block: for losses, which it leaves alone; peaks of memory are of eager steps.
    """

    data: Path
    out: Path
    shape: Shape
    steps: int
    batch: int
    length: int
    compiled: bool = False

    def plan(self, tokens: TokenData, steps: int, sequences: int) -> Plan:
        shape = replace(self.shape, vocab=max(self.shape.vocab, -(-tokens.vocab_size // 8) * 8))
        batches = max(1, sequences // self.batch)
        return Plan(shape, steps, max(1, steps // 10), OTHER_LR, half=True, validation=batches, compiled=self.compiled)


@dataclass(frozen=True)
class Job:
    """One run."""

    name: str
    lr: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return f"{self.name} {self.lr:g} {self.seed} {self.steps}"


def arm_of(name: str) -> Arm:
    """On a GPU codes have bfloat16 gradients; a word behind the arm's name says otherwise, or has integers in fprop."""
    base, _, more = name.partition(" ")
    arm = ARMS[base]
    if arm.kind is not Kind.DQT:
        return arm
    if arm.environment is Environment.FP32 and more != "float32 gradients":
        arm = replace(arm, environment=Environment.BF16)
    return replace(arm, execution=Execution.NATIVE if more == "native" else Execution.SIMULATED)


def main(sizes: Sizes, names: Sequence[str], seeds: Sequence[int], jobs: int, lr: float | None = None) -> None:
    """Search where no rate is told, then train every arm on every seed; what has a file is not run again."""
    unknown = [name for name in names if name not in ARMS]
    if unknown:
        raise RunError(f"gpu: there is no arm {unknown[0]}; there are {', '.join(ARMS)}.")
    if lr is not None:
        every(sizes, [Job(name, lr, seed, sizes.steps) for seed in seeds for name in names], jobs)
        return
    short = max(1, sizes.steps // SEARCH_SHARE)
    searched = dict.fromkeys(LIKE.get(name, name) for name in names)
    every(sizes, [Job(name, lr, SEARCH_SEED, short) for name in searched for lr in RATES], jobs)
    best = rates(runs(sizes.out), short)
    print(f"learning rates: {best}", flush=True)
    wanted = [Job(name, best[LIKE.get(name, name)], seed, sizes.steps) for seed in seeds for name in names]
    every(sizes, wanted, jobs)


def every(sizes: Sizes, wanted: Sequence[Job], jobs: int) -> None:
    if jobs == 1:
        for job in wanted:
            one(sizes, job)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(one, sizes, job) for job in wanted]:
            done.result()


def one(sizes: Sizes, job: Job) -> None:
    setting = {"shape": asdict(sizes.shape), "batch": sizes.batch, "length": sizes.length}
    told = {"setting": setting, "provenance": provenance(DEVICE)}
    once(sizes.out, job.key, lambda: told | {"result": trained(sizes, job)})


def trained(sizes: Sizes, job: Job, sequences: int = VALIDATION) -> Result:
    tokens = TokenData.open(sizes.data)
    torch.backends.cuda.matmul.allow_tf32 = True

    def batch(split: str, index: int) -> Tensor:
        seed = job.seed if split == "train" else 0
        return tokens.batch(split, index, batch_size=sizes.batch, block=sizes.length, seed=seed).to(DEVICE)

    return run(arm_of(job.name), sizes.plan(tokens, job.steps, sequences), job.lr, job.seed, batch, DEVICE)


def rates(held: Mapping[str, Any], short: int) -> dict[str, float]:
    """The best rate of each arm that was searched for: by validation loss, among runs that stayed finite."""
    found = {key: run["result"] for key, run in held.items() if key.endswith(f" {SEARCH_SEED} {short}")}
    best: dict[str, float] = {}
    for key in sorted(found, key=lambda key: found[key]["val"] if found[key]["finite"] else float("inf")):
        name, lr = key.split()[:2]
        best.setdefault(name, float(lr))
    return best


def runs(out: Path) -> dict[str, Any]:
    """All runs of a folder, by arm, rate, seed and steps."""
    paths = sorted(out.glob("*.json"))
    keys = ["_".join(path.stem.split("_")[:-3]) + " " + " ".join(path.stem.split("_")[-3:]) for path in paths]
    return {k: json.loads(path.read_text(encoding="utf-8")) for k, path in zip(keys, paths, strict=True)}


def speed(sizes: Sizes, names: Sequence[str], results: Path) -> None:
    """H2 and H6, one arm after the other with the GPU to itself: <results>/<device>/dqt_gpu_speed.json."""
    setting = {"shape": asdict(sizes.shape), "batch": sizes.batch, "length": sizes.length, "steps": sizes.steps}
    file = Ways("gpu_speed", setting, lambda ways: saved(ways, sizes.shape), DEVICE, results)
    for name in names:
        found = trained(sizes, Job(name, 1e-3, 0, sizes.steps), 1)
        keys = ("resident_bytes", "peak_bytes", "weight_bytes", "state_bytes", "step_ms")
        tokens = 1000 * sizes.batch * sizes.length / found["step_ms"]
        file.add(name, {key: found[key] for key in keys} | {"tokens_per_second": tokens})
        print(f"{name}: {file.ways[name]}", flush=True)
    file.tell()


def saved(ways: dict[str, Any], shape: Shape) -> list[Check]:
    """What codes save against masters, in bytes a weight of a linear layer, by allocator and by ledger."""
    claims = []
    expected = {"dqt_8": 3.0, "dqt_ternary": 3.75}
    for name, want in expected.items():
        for what, by in (("resident_bytes", "allocator, between steps"), ("weight_bytes", "ledger of weights")):
            if name in ways and "bitnet" in ways:
                each = (ways["bitnet"][what] - ways[name][what]) / shape.linear_parameters
                claims.append(Check("H2", f"{name} saves {want} bytes a weight against bitnet's masters within 5 %, by "
                                    f"{by}", f"{each:.3f}", abs(each / want - 1) < 0.05))  # fmt: skip
        alike = f"{name} float32 gradients"
        if alike in ways and "bitnet" in ways:
            each = (ways["bitnet"]["peak_bytes"] - ways[alike]["peak_bytes"]) / shape.linear_parameters
            claims.append(Check("H2", f"{alike}: as much at the peak of a step, within 5 %", f"{each:.3f}",
                                abs(each / want - 1) < 0.05))  # fmt: skip
    return claims


def report(folders: Sequence[Path], results: Path) -> None:
    """Merge the runs of all calls into <results>/<device>/dqt_gpu.json, with the claims of H1."""
    held = {key: found for folder in folders for key, found in runs(folder).items()}
    if not held:
        raise RunError(f"gpu-report: no runs in {', '.join(map(str, folders))}. `gpu --out` writes them.")
    searches = [int(key.split()[3]) for key in held if key.split()[2] == str(SEARCH_SEED)]
    best = rates(held, min(searches, default=0))
    arms: dict[str, list[Result]] = {}
    later: dict[tuple[str, float], list[Result]] = {}
    for key, found in sorted(held.items()):
        name, lr, seed, _ = key.split()
        if int(seed) != SEARCH_SEED:
            chosen = float(lr) == best.get(LIKE.get(name, name), float(lr))
            (arms.setdefault(name, []) if chosen else later.setdefault((name, float(lr)), [])).append(found["result"])
    first = next(iter(held.values()))
    told, setting = first["provenance"], first["setting"]
    content = {"setting": setting, "runs": {key: found["result"] for key, found in held.items()}}
    claims = checks(arms) + afterwards(later, arms)
    checks_file.tell(checks_file.save("dqt_gpu", told, content, claims, results), claims)


def checks(arms: dict[str, list[Result]]) -> list[Check]:
    """The claims of which all arms have been trained."""
    found = []

    def of(name: str, key: str = "val") -> list[float]:
        return [result[key] for result in arms[name]]

    def told(names: Sequence[str], key: str = "val", form: str = ".3f") -> str:
        return ", ".join(f"{n} {mean(of(n, key)):{form}} ± {spread(of(n, key)):{form}}" for n in names)

    def claim(id: str, statement: str, names: Sequence[str], key: str = "val", form: str = ".3f") -> None:
        """Means of the arms rise in this order."""
        if all(name in arms for name in names):
            means = [mean(of(name, key)) for name in names]
            found.append(Check(id, statement, told(names, key, form), means == sorted(means)))

    claim("H1a", "floats are no worse than BitNet, nor BitNet than ternary codes", ("fp", "bitnet", "dqt_ternary"))
    claim("H1b", "8-bit codes beat ternary codes", ("dqt_8", "dqt_ternary"))
    claim("H1c", "ternary codes beat frozen ones", ("dqt_ternary", "frozen_ternary"))
    claim("H1d", "ternary codes beat rounding to nearest", ("dqt_ternary", "rtn_ternary"))
    claim("H1e", "8-bit codes change more often than ternary ones", ("dqt_ternary", "dqt_8"), "changed_at_peak", ".3%")
    settled = [n for n in ("dqt_8", "dqt_ternary") if n in arms]
    if settled:
        still = all(mean(of(n, "changed_at_end")) < 0.05 * mean(of(n, "changed_at_peak")) for n in settled)
        found.append(Check("H1f", "at the end of the cosine next to none change",
                           told(settled, "changed_at_end", ".4%"), still))  # fmt: skip
    finite = all(result["finite"] for results in arms.values() for result in results)
    found.append(Check("H1g", "every loss was finite", f"{sum(map(len, arms.values()))} runs", finite))
    if "dqt_8" in arms and "fp" in arms:
        rise = {n: mean(of(n, "val_ternary")) - mean(of(n)) for n in ("dqt_8", "fp")}
        found.append(Check("H1h", "ternary weights cost 8-bit codes less than half of what they cost floats",
                           ", ".join(f"{n} {v:+.3f}" for n, v in rise.items()),
                           rise["dqt_8"] < 0.5 * rise["fp"]))  # fmt: skip
    return found


def afterwards(later: dict[tuple[str, float], list[Result]], arms: dict[str, list[Result]]) -> list[Check]:
    """8-bit codes at rates that the search did not choose, against the arms as they were reported."""
    found = []
    for (name, lr), results in later.items():
        if name != "dqt_8":
            continue
        ours = [result["val"] for result in results]
        for other, words in (("dqt_ternary", "ternary codes"), ("bitnet", "BitNet")):
            theirs = [result["val"] for result in arms.get(other, [])]
            if theirs:
                told = ", ".join(f"{n} {mean(v):.3f} ± {spread(v):.3f}" for n, v in ((name, ours), (other, theirs)))
                found.append(Check("H1b by rate", f"looked at afterwards: 8-bit codes at {lr:g} beat {words}", told,
                                   mean(ours) <= mean(theirs)))  # fmt: skip
    return found
