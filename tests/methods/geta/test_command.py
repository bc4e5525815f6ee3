# SPDX-License-Identifier: Apache-2.0
"""`lowbits graph`, the method in `lowbits train`, and the arms of the experiments."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from experiments import checks as checks_file
from experiments.geta import arms
from experiments.geta.runs import Study
from lowbits.cli import main
from lowbits.errors import SpecError
from lowbits.methods import Position, geta
from lowbits.nn import Recipe, convert_
from lowbits.train import train
from tests.methods.geta.zoo import example, gpt2, outputs
from tests.train.tiny import model as tiny_model
from tests.train.tiny import tiny_run, tokens


def test_a_named_size_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["graph", "gpt2-pico", "--out", str(tmp_path / "a.html"), "--keep", "*.h.0.mlp.c_fc.*"]) == 0
    text = capsys.readouterr().out
    assert "15 dimensions, 1,808 units" in text and "looked up by number" in text
    page = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<svg" in page and "asked to be kept" in page and "transformer.h.3.mlp.c_fc" in page


def test_a_folder_is_drawn_and_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = example("vit").model
    model.config.architectures = ["ViTForImageClassification"]
    model.config.save_pretrained(tmp_path)
    assert main(["graph", str(tmp_path), "--out", str(tmp_path / "b.svg")]) == 0
    drawing = ElementTree.fromstring((tmp_path / "b.svg").read_text(encoding="utf-8"))
    circles = drawing.findall("{http://www.w3.org/2000/svg}circle")
    assert len(circles) == sum(len(d.members) for d in example("vit").graph.dimensions)
    capsys.readouterr()
    for words, complaint in (
        (["gpt2-pico", "--out", "x.png"], "written as .html or .svg"),
        (["gpt3"], "no model is called 'gpt3'"),
        ([str(tmp_path / "b.svg")], "no model is called"),
    ):
        assert main(["graph", *words]) == 2
        assert complaint in capsys.readouterr().err


def test_a_trained_model_becomes_its_sub_network() -> None:
    model, method = gpt2().train(), geta.GETA(sparsity=0.4, lowest=4, highest=12, stage_steps=20)
    convert_(model, Recipe(), seed=0, verbose=False)
    method.prepare_(model, 0)
    optimizer = torch.optim.AdamW(method.param_groups(model, 0.1), 1e-3)
    noise = torch.Generator().manual_seed(0)
    for step in range(20):
        at = Position(step, 20, step)
        method.before_forward_(model, at)
        method.loss(model, torch.randint(0, 32, (2, 16), generator=noise)).backward()
        optimizer.step()
        method.after_step_(model, at)
        optimizer.zero_grad()
    told = method.metrics(model)
    assert told["bits_lowest"] >= 4 and told["bits_highest"] <= 12 and told["units_pruned"] == pytest.approx(92 / 230)
    small = geta.finished(model.eval())
    inputs = {"input_ids": torch.randint(0, 32, (3, 9), generator=noise)}
    torch.testing.assert_close(outputs(small, inputs), outputs(model, inputs), rtol=1e-4, atol=1e-5)
    units, bits = method.tables(model)
    assert sum(row[2] for row in units.rows) == 138 and len(bits.rows) == 8  # type: ignore[misc]
    with pytest.raises(SpecError, match="not prepared by GETA"):
        geta.finished(gpt2())


def test_a_run_leaves_its_sub_network(tmp_path: Path) -> None:
    """With moments in 8 bits; the program in the folder is the network that the checkpoint's masked model is."""
    run = tiny_run(tokens(tmp_path / "data").folder, recipe="adam8bit", method=geta.GETA(0.4, 4, 14, stage_steps=12))
    out = tmp_path / "run"
    (out / "sub-network").mkdir(parents=True)  # of an attempt that was killed
    (out / "sub-network" / "subnetwork.json").write_text("{}", encoding="utf-8")
    result = train(run, out, resume=True)
    small, facts = geta.load(out / "sub-network")
    model = tiny_model(300, 32, dropout=0.0)
    convert_(model, Recipe(), seed=0, verbose=False)
    run.method.prepare_(model, 0)
    state = load_file(next((out / "checkpoints").glob("*12/model.safetensors")))
    model.load_state_dict(state, strict=False)
    ids = {"input_ids": torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(0))}
    torch.testing.assert_close(outputs(small, ids), outputs(model.eval(), ids), rtol=1e-4, atol=1e-5)
    assert set(facts["bits"].values()) <= set(range(4, 15)) and facts["sparsity"] == pytest.approx(0.4, abs=0.01)
    size, units, _ = result["tables"]  # type: ignore[misc]
    assert size["rows"][0][2] < size["rows"][0][1] and "No sub-network-transformers: GPT2LMHeadModel" in size["note"]
    assert "<svg" in units["drawing"] and "left</text>" in units["drawing"]


@pytest.mark.slow
def test_a_run_shorter_than_the_stages_leaves_none(tmp_path: Path) -> None:
    run = tiny_run(tokens(tmp_path / "data").folder, recipe="bf16", method=geta.GETA(0.4, stage_steps=40))
    assert train(run, tmp_path / "run")["status"] == "finished" and not (tmp_path / "run" / "sub-network").exists()


@pytest.mark.parametrize("method, words", [
    (geta.GETA(0.4, stage_steps=5), "too few for four stages"),
    pytest.param(geta.GETA(0.99), "ask for at most", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_cannot_be_reached_is_said_before_training(method: geta.GETA, words: str, tmp_path: Path) -> None:
    run = tiny_run(tokens(tmp_path / "data").folder, recipe="bf16", method=method)
    with pytest.raises(SpecError, match=words):
        train(run, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Tiny(arms.Task):
    name, steps = "tiny", 80

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (torch.ones(2, 4),), {}

    def loss(self, model: nn.Module, step: int, seed: int) -> Tensor:
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(seed << 20 | step))
        return (model(x) - x[:, :2].abs()).square().mean()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), 1e-2)

    def score(self, network: nn.Module) -> arms.Result:
        return {"loss": float(self.loss(network.eval(), 1 << 19, 0).detach())}


def test_all_arms_have_the_budget_that_they_say() -> None:
    names = [name for name in arms.ARMS if "30 %" not in name and "70 %" not in name]
    for name, arm in ((name, arms.ARMS[name]) for name in names):
        found = arms.measured(Tiny(), arm, 0)
        assert found["pruned"] == int(arm.sparsity * 32) and found["units"] == 32
        if name != "dense":
            assert arm.lowest <= found["mean_bits"] <= arm.highest and found["relative_bops"] < 0.3


def test_results_grow_with_their_runs(tmp_path: Path) -> None:
    names = ("dense", "GETA 50 %, 4 bits")

    def study(steps: int) -> Study:
        task = Tiny()
        task.steps = steps
        claim = checks_file.Check("x", "is told once all is there", "", True)
        own = {name: arms.ARMS[name] for name in names}
        return Study("tiny", task, lambda _: own, lambda _: [claim], {}, tmp_path / "runs", tmp_path / "results")

    study(80).carry_out_one(1, (0, 1))
    (path,) = (tmp_path / "results").glob("*/geta_tiny.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    assert not found["complete"] and not found["checks"] and [len(r) for r in found["runs"].values()] == [1, 1]
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "runs").iterdir()}
    study(80).carry_out((0, 1))
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["complete"] and len(found["checks"]) == 1 and [len(r) for r in found["runs"].values()] == [2, 2]
    assert all((tmp_path / "runs" / name).stat().st_mtime_ns == at for name, at in before.items())
    assert not study(90).collected((0, 1))  # runs of another length are not taken for these


def test_ranges_are_fitted_to_the_least_error() -> None:
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    quantizer = geta.Quantizer(1.0, 3)
    arms.fit_(quantizer, weight, 3)
    fitted = float((quantizer(weight) - weight).square().mean().detach())
    quantizer.set_range_(float(weight.abs().max()), 3)
    assert fitted < 0.6 * float((quantizer(weight) - weight).square().mean().detach())
