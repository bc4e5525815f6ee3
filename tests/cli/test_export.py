# SPDX-License-Identifier: Apache-2.0
"""`lowbits export`: the file of a run is as large as its report says, and computes what the run evaluated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbits import models
from lowbits.cli import main
from lowbits.export import Coding, load_coded
from lowbits.methods import Method
from lowbits.methods.differentiable_quantization import DifferentiableQuantization
from lowbits.methods.distillation import Backward, Cut, Ends, QuantizedDistillation
from lowbits.train import checkpoints, train
from tests.train.tiny import tiny_run, tokens

METHODS = {
    "levels": QuantizedDistillation(bits=3, size=32, ends=Ends.KEPT, backward=Backward.TRUNCATED),
    "points": DifferentiableQuantization(bits=2, cut=Cut.GROUP, size=8),
    "shared out": DifferentiableQuantization(bits=2, size=32, share_out="here"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens(tmp_path_factory.mktemp("tiny")).folder


@pytest.mark.parametrize("name", METHODS)
def test_the_file_is_what_the_report_says_and_the_run_evaluated(
    name: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method: Method = METHODS[name]
    if name == "shared out":
        method = replace(method, share_out=str(data))
    run = tiny_run(data, recipe="bf16", method=method, steps=3)
    run = replace(run, watching=replace(run.watching, errors_every=0))
    result = train(run, tmp_path / "run")
    rows = {row[0]: dict(zip(("packed", "huffman"), row[1:], strict=True)) for row in result["tables"][0]["rows"]}
    for coding in Coding:
        out = tmp_path / f"{coding.value}.safetensors"
        assert main(["export", str(tmp_path / "run"), "--out", str(out), "--coding", coding.value]) == 0
        assert out.stat().st_size == rows["file"][coding.value]
        assert f"{out.stat().st_size:,} bytes" in capsys.readouterr().out
    small = models.build(str(checkpoints(tmp_path / "run" / "checkpoints")[-1]), 0, 16, 0).eval()
    small.load_state_dict(load_coded(out).state_dict())
    assert evaluated(small, data, run) == pytest.approx(result["val_loss_on"], abs=1e-4)


def evaluated(model: torch.nn.Module, data: Path, run) -> float:
    from lowbits.data import TokenData

    losses, count = 0.0, 0
    with torch.no_grad():
        for ids in TokenData.open(data).val_batches(
            run.batch_size, run.block, run.watching.eval_batches * run.batch_size
        ):
            losses, count = losses + model(input_ids=ids, labels=ids).loss.item() * len(ids), count + len(ids)
    return losses / count


def test_what_cannot_be_exported_is_named(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint(folder: Path) -> str:
        assert main(["export", str(folder)]) == 2
        return capsys.readouterr().err

    assert "is no folder of `lowbits train`" in complaint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"method": {"name": "none"}}), encoding="utf-8")
    assert "its weights are on no levels" in complaint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"method": {"name": "distillation"}}), encoding="utf-8")
    assert "holds no checkpoint" in complaint(tmp_path)
