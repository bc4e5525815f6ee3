# SPDX-License-Identifier: Apache-2.0
"""One battery for every method: the public modules of `lowbits.methods`, each by what its `example()` returns.

`example()` is a method that can train a GPT-2 of two layers of width 32 for twelve steps; it stands in the module
beside the class. A method that comes is tested here without a line of its own.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowbits.analysis import causal_loss
from lowbits.cli import main
from lowbits.cli._subject import open_subject
from lowbits.cli.train import with_method
from lowbits.errors import LowbitsError, UnknownNameError
from lowbits.methods import Method, Position, named, names
from lowbits.nn import Recipe, convert_
from lowbits.train import Autocast, Device, Run, checkpoints, train
from tests.train.tiny import log_lines, model, state_bytes, tiny_run, tokens

POSITION = Position(step=3, steps=12, draw=6)


def example(name: str) -> Method:
    return importlib.import_module(f"lowbits.methods.{name}").example()


def plain_model(vocab_size: int, block: int) -> nn.Module:
    return model(vocab_size, block, dropout=0.0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens(tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture(scope="session", params=names())
def trained(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """A finished run of a method, with dropout, two micro-batches a step and a checkpoint every four."""
    run = tiny_run(data, recipe="bf16", method=example(request.param))
    out = tmp_path_factory.mktemp("trained") / request.param
    assert train(run, out)["status"] == "finished"
    return run, out


@pytest.mark.parametrize("name", names())
def test_it_is_plain_data_with_its_name(name: str) -> None:
    method = example(name)
    assert type(named(name)) is type(method) and named(name) == type(method)() and method.name == name
    assert dataclasses.is_dataclass(method) and pickle.loads(pickle.dumps(method)) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1  # type: ignore[attr-defined]
    described = json.loads(json.dumps(Run(method=method).resolved()["method"]))
    assert set(described) == {"name", *(field.name for field in dataclasses.fields(method))}


@pytest.mark.parametrize("name", names())
def test_its_fields_are_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["train", "--method", name, "--help"])
    text = capsys.readouterr().out
    assert exited.value.code == 0
    for field in dataclasses.fields(named(name)):
        assert f"--{field.name.replace('_', '-')}" in text or f"--no-{field.name.replace('_', '-')}" in text


@pytest.mark.parametrize("name", names())
def test_a_field_that_does_not_exist(name: str) -> None:
    with pytest.raises(UnknownNameError, match=f"no field of {name} is called 'colour'"):
        named(f"{name},colour=red")


def test_it_trains_and_tells(trained: tuple[Run, Path]) -> None:
    run, out = trained
    losses = [line["loss"] for line in log_lines(out) if line["kind"] == "step"]
    assert len(losses) == run.steps and all(map(math.isfinite, losses)) and losses[-1] < losses[0]
    told = [line.get("method", {}) for line in log_lines(out) if line["kind"] == "step"]
    assert all(isinstance(value, int | float) and math.isfinite(value) for line in told for value in line.values())
    assert len({tuple(line) for line in told}) == 1  # the same numbers in every line: a curve each
    result = json.loads((out / "result.json").read_text())
    assert result["method"] == run.method.name and math.isfinite(result["val_loss_on"])
    for table in result["tables"]:
        assert table["title"] and table["rows"]
        assert all(len(row) == len(table["columns"]) for row in table["rows"])


def test_a_resumed_run_has_the_same_bits(trained: tuple[Run, Path], tmp_path: Path) -> None:
    run, out = trained
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (again / "result.json").unlink()
    shutil.rmtree(checkpoints(again / "checkpoints")[-1])
    train(run, again, resume=True)
    assert state_bytes(again) == state_bytes(out)
    assert log_lines(again) == log_lines(out)


def test_recomputed_blocks_give_the_same_bits(trained: tuple[Run, Path], tmp_path: Path) -> None:
    """What a forward pass draws does not depend on how often it is run."""
    run, out = trained
    compute = replace(run.compute, gradient_checkpointing=True)
    train(replace(run, compute=compute, steps=2, watching=replace(run.watching, errors_every=0)), tmp_path / "again")
    train(replace(run, steps=2, watching=replace(run.watching, errors_every=0)), tmp_path / "kept")
    assert state_bytes(tmp_path / "again") == state_bytes(tmp_path / "kept")


@pytest.mark.parametrize("name", names())
def test_it_draws_nothing_from_torch(name: str) -> None:
    """Random bits are a pure function of seed and position; the position sets them, whatever ran before."""
    method = example(name)
    network, ids = prepared(method, seed=5), torch.arange(64).view(2, 32)
    before = torch.get_rng_state()
    losses = []
    for at in (POSITION, POSITION._replace(step=4, draw=8), POSITION):
        method.before_forward_(network, at)
        losses.append(method.loss(network, ids).item())
    assert torch.equal(torch.get_rng_state(), before)
    assert losses[0] == losses[2] and math.isfinite(losses[0])


@pytest.mark.parametrize("name", names())
def test_every_parameter_is_in_one_group_and_learns(name: str) -> None:
    method = example(name)
    network = prepared(method, seed=5)
    groups = method.param_groups(network, 0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    learning = [p for p in network.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(id(p) for p in learning)
    method.before_forward_(network, POSITION)
    method.loss(network, torch.arange(64).view(2, 32)).backward()
    without = [key for key, p in network.named_parameters() if p.requires_grad and p.grad is None]
    assert not without  # DDP waits for every parameter's gradient


@pytest.mark.parametrize("name", names())
def test_evaluation_is_repeatable(name: str) -> None:
    method = example(name)
    network, ids = prepared(method, seed=5).eval(), torch.arange(64).view(2, 32)
    with torch.no_grad():
        first = network(input_ids=ids).logits
        method.before_forward_(network, POSITION)
        assert torch.equal(network(input_ids=ids).logits, first) and first.isfinite().all()


def prepared(method: Method, seed: int) -> Any:
    torch.manual_seed(1)
    network = plain_model(96, 32)
    convert_(network, Recipe(), seed=seed, verbose=False)
    method.prepare_(network, seed)
    return network.train()


@dataclasses.dataclass(frozen=True)
class Counting(Method):
    """Count what the loop calls, in a buffer, and stop the loss of learning anything by a factor."""

    factor: float = 1.0

    def prepare_(self, model: nn.Module, seed: int) -> None:
        model.register_buffer("calls", torch.zeros(3, dtype=torch.int64))

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        model.calls[0] = at.draw

    def after_step_(self, model: nn.Module, at: Position) -> None:
        model.calls[1:] += torch.tensor([1, at.step])

    def loss(self, model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
        return super().loss(model, ids) * self.factor

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        first, *others = super().param_groups(model, weight_decay)
        return [first, *({**group, "lr": 0.0} for group in others)]

    def metrics(self, model: nn.Module) -> dict[str, float]:
        return {"draw": float(model.calls[0]), "steps": float(model.calls[1])}


def test_the_loop_calls_each_hook_where_the_contract_says(data: Path, tmp_path: Path) -> None:
    run = tiny_run(data, model=plain_model, recipe="bf16", method=Counting(factor=2.0), steps=4)
    train(run, tmp_path / "own")
    train(replace(run, method=Method()), tmp_path / "usual")
    own, usual = log_lines(tmp_path / "own"), log_lines(tmp_path / "usual")
    told = [line["method"] for line in own if line["kind"] == "step"]
    assert told == [{"draw": 2 * step + 1, "steps": step + 1.0} for step in range(4)]  # two micro-batches
    assert own[0]["loss"] == 2 * usual[0]["loss"] and "method" not in usual[0]
    from safetensors.torch import load_file

    last = checkpoints(tmp_path / "own" / "checkpoints")[-1]
    state = load_file(last / "model.safetensors")
    assert state["calls"].tolist() == [7, 4, 6]
    torch.manual_seed(run.seed)
    fresh = plain_model(300, 32).state_dict()
    # Norms and biases are the second group, whose learning rate is 0.
    assert torch.equal(state["transformer.ln_f.weight"], fresh["transformer.ln_f.weight"])
    assert not torch.equal(state["transformer.h.0.mlp.c_fc.weight"], fresh["transformer.h.0.mlp.c_fc.weight"])


def test_a_method_of_ones_own_has_a_name() -> None:
    assert (Method().name, Counting().name) == ("none", f"{__name__}:Counting")
    assert Run(method=Counting()).title == f"bf16+{__name__}:Counting" and Run().title == "bf16"


def test_names_and_values_from_words() -> None:
    assert named("none") == Method()
    with pytest.raises(UnknownNameError, match="no method is called 'nonsense'"):
        named("nonsense")
    base = Run(method=Counting(factor=3.0))
    assert with_method(base, ["--steps", "3"]) is base
    assert with_method(base, ["--method=none"]).method == Method()
    with pytest.raises(LowbitsError, match="no method is called 'nonsense'"):
        with_method(base, ["--method", "nonsense", "--out", "x"])


def test_analysis_opens_what_it_trained(trained: tuple[Run, Path]) -> None:
    """The model of the checkpoint has the loss that the log has: nothing of the method is left out."""
    run, out = trained
    subject = open_subject(out, None, Device.CPU)
    assert type(subject.method) is type(run.method)
    (*_, last) = [line for line in log_lines(out) if line["kind"] == "eval"]
    data = subject.data(None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=run.compute.autocast is not Autocast.NONE):
        batches = list(data.val_batches(4, run.block, run.watching.eval_batches * run.batch_size))
        losses = [float(causal_loss(subject.model, ids)) * len(ids) for ids in batches]
    assert sum(losses) / sum(map(len, batches)) == pytest.approx(last["loss_on"], rel=1e-3)
