# SPDX-License-Identifier: Apache-2.0
"""`lowbits probe` on a run of a second: what it writes, that its proposal can be trained, and bad input."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lowbits.cli.probe import main
from lowbits.errors import CheckpointError, DataError, RunError, UnknownNameError
from lowbits.train import Watching, train
from tests.train.tiny import tiny_run, tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tokens and a trained bf16 run of 4 steps."""
    here = tmp_path_factory.mktemp("probe")
    data = tokens(here).folder
    train(tiny_run(data, recipe="bf16", steps=4, watching=Watching(eval_batches=2, errors_every=0)), here / "run")
    return here


def test_a_run_is_probed_under_nvfp4_and_the_proposal_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder / "run"), "--batches", "2", "--batch-size", "2"]) == 0
    said = capsys.readouterr().out
    found = json.loads((folder / "run/analysis/probe-step-00000004.json").read_text())
    assert found["recipe"] == "nvfp4" and found["provenance"]["versions"]
    assert list(found["layers"]) == [
        f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert all(0 < layer[gemm] < 1 for layer in found["layers"].values() for gemm in ("fprop", "dgrad", "wgrad"))
    assert sum(layer["flops_share"] for layer in found["layers"].values()) == pytest.approx(1)
    kept = found["keep"]
    assert 0 < kept["flops_share"] <= 0.15 and kept["names"] and set(kept["layers"]) <= set(found["layers"])
    whole = found["whole_model"]
    assert list(whole) == [
        "high precision", "nothing kept", "the proposal kept", "the last 15 % of the blocks kept",
    ]  # fmt: skip
    assert whole["high precision"]["gradient_error"] == 0 < whole["nothing kept"]["gradient_error"]
    assert "\\u003cb\\u003e" in (folder / "run/analysis/probe-step-00000004.html").read_text()
    (command,) = [line for line in said.splitlines() if "lowbits train --recipe nvfp4 --keep.names" in line]
    assert shlex.split(command)[5:] == kept["names"]

    from lowbits.cli.train import main as train_main

    words = [*shlex.split(command)[2:], "--model", "gpt2-pico", "--data", str(folder / "tokens"), "--steps", "1"]
    small = ["--batch-size", "2", "--block", "32", "--device", "cpu", "--eval-batches", "1"]
    # The names are those of GPT-2, so they fit gpt2-pico as well.
    assert train_main([*words, *small, "--out", str(folder / "kept")]) == 0
    result = json.loads((folder / "kept/result.json").read_text())
    assert result["converted_layers"] < 16


def test_a_size_is_probed_with_fresh_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "probe.json"
    words = ["gpt2-pico", "--data", str(folder / "tokens"), "--recipe", "mxfp4", "--batches", "1", "--batch-size", "2"]
    assert main([*words, "--length", "32", "--share", "0.5", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["recipe"] == "mxfp4" and len(found["layers"]) == 16 and 0.3 < found["keep"]["flops_share"] <= 0.5
    assert found["layers"]["transformer.h.0.attn.c_attn"]["wgrad_deviation"] is None  # a single batch
    assert out.with_suffix(".html").exists() and "weights are fresh" in capsys.readouterr().out


def test_bad_input_is_said(folder: Path, tmp_path: Path) -> None:
    run = str(folder / "run")
    for words, error, text in (
        (["gpt2-nano"], DataError, "--data FOLDER"),
        (["gpt2-nano", "--data", str(tmp_path)], DataError, "index.json|prepare"),
        ([str(tmp_path / "nothing")], CheckpointError, "does not exist"),
        ([run, "--recipe", "bf16"], RunError, "quantizes no GEMM"),
        ([run, "--recipe", "nvfp5"], UnknownNameError, "nvfp4"),
        ([run, "--share", "2"], RunError, "between 0 and 1"),
        ([run, "--length", "1"], RunError, "at least 2"),
        ([run, "--batches", "0"], RunError, "at least 1"),
    ):
        with pytest.raises(error, match=text):
            main(words)
    assert not (tmp_path / "nothing").exists()
