# SPDX-License-Identifier: Apache-2.0
"""Comparisons in real processes with trainers that take milliseconds, and one with the real trainer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lowbits.data import prepare
from lowbits.errors import RunError, UnknownNameError
from lowbits.study import compare
from lowbits.study._compare import _Machine
from lowbits.train import Compute, Device, Run, Saving, Watching
from tests.study.fake_training import slow_trainer, tiny_model, trainer

CPU = Compute(device=Device.CPU)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("data")
    lines = (
        f"line {i} of a text about the number {i * i}, which is {'even' if i % 2 == 0 else 'odd'}" for i in range(2000)
    )
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(lines))
    prepare(str(folder / "text.txt"), folder / "tokens", vocab_size=300)
    watching = Watching(log_every=1, eval_every=2, eval_batches=1, errors_every=4)
    sizes = {"steps": 4, "batch_size": 2, "block": 16}
    return Run(model=tiny_model, data=str(folder / "tokens"), **sizes, compute=CPU, watching=watching)


def calls(out: Path) -> dict[str, int]:
    return {f"{p.parent.parent.name}/{p.parent.name}": len(p.read_text().split()) for p in out.glob("*/*/calls")}


def test_a_crash_stops_nobody_else(base: Run, tmp_path: Path) -> None:
    names = ["bf16", "w4_tensor", "a4_tensor", "g4_tensor", "w8a8"]
    summary = compare(names, [0], base, tmp_path, jobs=2, trainer=trainer)
    arms = {arm.name: arm for arm in summary.arms}
    assert arms["w4_tensor"].runs[0].message == "killed by SIGKILL (out of memory?)"
    assert arms["a4_tensor"].runs[0].message == "ValueError: the activations are too coarse"
    assert [arm.runs[0].status for arm in summary.arms] == ["finished", "failed", "failed", "diverged", "finished"]
    assert "hello from w8a8" in (tmp_path / "w8a8" / "seed-0" / "output.txt").read_text()
    cores = len(os.sched_getaffinity(0))
    threads = json.loads((tmp_path / "w8a8" / "seed-0" / "env.json").read_text())["threads"]
    assert threads == max(1, cores // 2)
    assert (tmp_path / "report.html").exists() and (tmp_path / "report.json").exists()
    # Given again: what came to an end stays, what failed is tried again.
    compare(names, [0], base, tmp_path, jobs=2, trainer=trainer)
    assert calls(tmp_path) == {f"{n}/seed-0": 2 if n in ("w4_tensor", "a4_tensor") else 1 for n in names}


def test_more_recipes_and_seeds_join_what_is_there(base: Run, tmp_path: Path) -> None:
    compare(["bf16", "w8a8"], [0], base, tmp_path, trainer=trainer)
    summary = compare(["bf16", "null", "w4_channel"], [0, 1], base, tmp_path, trainer=trainer)
    assert set(calls(tmp_path).values()) == {1} and len(calls(tmp_path)) == 7
    assert [(arm.name, arm.seeds) for arm in summary.arms] == [
        ("bf16", (0, 1)),
        ("null", (1000, 1001)),
        ("w4_channel", (0, 1)),
    ]
    null = json.loads((tmp_path / "null" / "seed-1000" / "config.json").read_text())
    assert null["recipe"] == "bf16" and null["seed"] == 1000
    assert summary.arms[2].gap is not None and summary.arms[2].gap.nats == pytest.approx(0.2)


def test_another_configuration_is_refused_and_nothing_lost(base: Run, tmp_path: Path) -> None:
    compare(["bf16"], [0], base, tmp_path, trainer=trainer)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"another configuration: steps is 4 there, 5 here\. Choose another --out"):
        compare(["bf16", "w8a8"], [0], replace(base, steps=5), tmp_path, trainer=trainer)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("recipes", "seeds", "changes", "message"),
    [
        ([], [0], {}, "no recipe given"),
        (["bf16", "bf16"], [0], {}, "bf16 is given 2 times"),
        (["bf16"], [], {}, "seeds must be"),
        (["bf16"], [3, 3], {}, "seed 3 is given 2 times"),
        (["null", "bf16"], [0], {}, "cannot come first"),
        (["bf16"], [0], {"layers": lambda name, module: None}, "same layers"),
        (["bf16"], [0], {"model": lambda vocab, block: None}, "module level"),
        (["bf16"], [0], {"compute": Compute(device=Device.CUDA)}, "no CUDA device"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    base: Run, tmp_path: Path, recipes: list[str], seeds: list[int], changes: dict[str, object], message: str
) -> None:
    import torch

    if "compute" in changes and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(RunError, match=message):
        compare(recipes, seeds, replace(base, **changes), tmp_path / "x", trainer=trainer)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_unknown_names_get_a_hint(base: Run, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'w8a8'"):
        compare(["bf16", "w8a"], [0], base, tmp_path / "x", trainer=trainer)


def test_if_all_fail_the_first_reason_is_the_error(base: Run, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="every run failed; the first said: ValueError: the activations"):
        compare(["a4_tensor"], [0], base, tmp_path, trainer=trainer)


_STOPPED = """
import sys
from pathlib import Path
from lowbits.study import compare
from lowbits.train import Compute, Device, Run
from tests.study.fake_training import slow_trainer

if __name__ == "__main__":
    base = Run(data=sys.argv[2], steps=4, compute=Compute(device=Device.CPU))
    compare(["bf16"], [0, 1, 2], base, Path(sys.argv[1]), jobs=2, trainer=slow_trainer)
"""


def test_sigterm_saves_the_running_ones_and_the_same_command_goes_on(
    base: Run, tmp_path: Path, repository: Path
) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(_STOPPED)
    out = tmp_path / "out"
    command = [sys.executable, str(script), str(out), base.data]
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(repository)}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while len(list(out.glob("bf16/*/ready"))) < 2 and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 143 and "the same command goes on" in said
    status = {p.parent.name: json.loads(p.read_text())["status"] for p in out.glob("bf16/*/result.json")}
    assert status == {"seed-0": "interrupted", "seed-1": "interrupted"}
    summary = compare(["bf16"], [0, 1], Run(data=base.data, steps=4, compute=CPU), out, trainer=slow_trainer)
    assert summary.arms[0].status == "2 of 2 finished"
    assert (out / "bf16" / "seed-0" / "calls").read_text().split() == ["resume=True"] * 2


def test_with_the_real_trainer(base: Run, tmp_path: Path) -> None:
    """Two recipes, two seeds, four steps; all that the report shows is there."""
    summary = compare(["bf16", "w8a8g8"], [0, 1], replace(base, saving=Saving(save_every=4)), tmp_path, jobs=2)
    assert [arm.status for arm in summary.arms] == ["2 of 2 finished"] * 2
    w8a8g8 = summary.arms[1]
    assert w8a8g8.validation.step == (2, 4) and w8a8g8.training.step == (1, 2, 3, 4)
    assert w8a8g8.execution == "simulated" and w8a8g8.sample
    assert set(w8a8g8.memory_measured) == {"weights", "gradients", "optimizer", "saved_activations"}
    errors = next(iter(w8a8g8.errors.values()))
    assert set(errors) == {"weight", "input", "grad"} and errors["weight"]["sqnr_db"] > 20  # type: ignore[operator]
    assert "weights int8 per channel" in w8a8g8.quantizes and "gradients int8 per token" in w8a8g8.quantizes
    assert dict(summary.environment)["threads"]


def test_runs_spread_over_the_gpus() -> None:
    machine = _Machine(at_once=6, threads=1, gpus=4)
    busy: list[int | None] = []
    for _ in range(6):
        busy.append(machine.idlest_gpu(busy))
    assert busy == [0, 1, 2, 3, 0, 1]
    busy.remove(3)
    assert machine.idlest_gpu(busy) == 3
    assert _Machine(2, 1, gpus=1).idlest_gpu([None]) is None and _Machine(2, 1, gpus=0).idlest_gpu([]) is None
