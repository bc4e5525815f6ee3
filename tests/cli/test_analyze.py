# SPDX-License-Identifier: Apache-2.0
"""`lowbits analyze`: every analysis on a run of a second, its JSON against the run's own numbers, and bad input."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbits.cli._subject import open_subject
from lowbits.cli.analyze import ANALYSES, main
from lowbits.errors import CheckpointError, DataError, LowbitsError, RunError, SpecError, UnknownNameError
from lowbits.nn import Keep, Phase, quantized_layers
from lowbits.recipes import named
from lowbits.train import Device, Watching, train
from tests.train.tiny import STOCHASTIC, tiny_run, tokens

LAYERS = [
    f"transformer.h.{i}.{name}" for i in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with tokens and a trained w4_tensor run of 12 steps."""
    here = tmp_path_factory.mktemp("analyze")
    data = tokens(here).folder
    train(tiny_run(data, recipe="w4_tensor", watching=Watching(eval_batches=2, errors_every=0)), here / "run")
    return here


def analyze(folder: Path, what: str, *words: str) -> dict:
    """Run an analysis and return the JSON that it wrote beside the run."""
    assert main([what, str(folder / "run"), "--batches", "2", "--batch-size", "4", *words]) == 0
    found = json.loads((folder / "run" / "analysis" / f"{what}-step-00000012.json").read_text())
    assert found["recipe"] == "w4_tensor" and found["provenance"]["versions"]["torch"] == torch.__version__
    return found


def test_ptq_starts_from_the_losses_of_the_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = json.loads((folder / "run" / "result.json").read_text())
    found = analyze(folder, "ptq", "--to", "w4_tensor", "a4_token")
    assert found["loss_as_trained"] == pytest.approx(result["val_loss_on"], rel=1e-5)
    assert found["loss"]["w4_tensor"] == pytest.approx(result["val_loss_on"], rel=1e-5)
    assert found["loss"]["high_precision"] == pytest.approx(result["val_loss_off"], rel=1e-5)
    assert found["loss"]["a4_token"] != found["loss"]["high_precision"]
    assert "a4_token" in capsys.readouterr().out


def test_sharpness_sees_rounded_and_master_weights(folder: Path) -> None:
    result = json.loads((folder / "run" / "result.json").read_text())
    rows = analyze(folder, "sharpness", "--steps", "1", "3")["results"]
    assert [(r["weights"], r["quantizers"], r["steps"]) for r in rows] == [
        ("rounded", "off", 1), ("master", "on", 1), ("rounded", "off", 3), ("master", "on", 3),
    ]  # fmt: skip
    for row in rows:  # at the weights themselves both are the model that was trained
        assert row["loss"] == pytest.approx(result["val_loss_on"], rel=1e-4)
        assert row["value"] > 0 and len(row["per_batch"]) == 2


def test_surface_draws_a_page(folder: Path) -> None:
    found = analyze(folder, "surface", "--points", "3", "--span", "0.5")
    losses = found["losses"]
    assert found["coordinates"] == [-0.5, 0.0, 0.5] and all(math.isfinite(x) for row in losses for x in row)
    page = (folder / "run" / "analysis" / "surface-step-00000012.html").read_text()
    assert "w4_tensor, step-00000012" in page


def test_outliers_and_gradients_name_every_layer(folder: Path) -> None:
    earlier = folder / "run" / "checkpoints" / "step-00000008"
    found = analyze(folder, "outliers", "--against", str(earlier))
    assert list(found["layers"]) == [*LAYERS, "lm_head"]
    assert found["against"] == str(earlier) and isinstance(found["overlap_with_earlier"], list)
    layers = analyze(folder, "gradients")["layers"]
    assert list(layers) == [*LAYERS, "lm_head"]
    for layer in layers.values():
        assert layer["int8 token"]["zero"] <= layer["int8 tensor"]["zero"] <= layer["int4 tensor"]["zero"]
        assert sum(layer["share_by_decade"].values()) == pytest.approx(1.0)


def test_perplexity_scores_files_on_and_off(folder: Path) -> None:
    text = next((folder / "text").glob("string*.txt"))
    found = analyze(folder, "perplexity", "--files", str(text))
    on, off = found["quantizers_on"], found["quantizers_off"]
    assert on["bytes"] == len(text.read_bytes()) and on["tokens"] == off["tokens"] and on["loss"] != off["loss"]
    assert on["bits_per_byte"] == pytest.approx(on["loss"] * on["tokens"] / math.log(2) / on["bytes"])


def test_memory_of_a_run_and_of_a_size_that_need_not_exist(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((folder / "run" / "result.json").read_text())
    ledger = analyze(folder, "memory", "--micro-batches", "2", "--float32")["ledgers"][0]
    for category in ("weights", "gradients", "optimizer"):
        assert ledger["measured"][category] == result["memory"]["measured"][category]
    out = tmp_path / "new" / "plan.json"
    assert main(["memory", "llama-7b", "--recipe", "w8a8", "--micro-batches", "1", "--out", str(out)]) == 0
    weights = json.loads(out.read_text())["ledgers"][0]["measured"]["weights"]
    assert 4 * 6.7e9 < weights < 4 * 7.1e9
    assert "bf16 autocast" in capsys.readouterr().out


def test_a_checkpoint_and_a_bare_model_folder(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "run" / "checkpoints" / "step-00000012"
    data = ("--data", str(folder / "tokens"), "--batches", "2", "--batch-size", "4", "--to", "a8_token")
    assert main(["ptq", str(checkpoint), *data, "--out", str(tmp_path / "a.json")]) == 0
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(checkpoint / name, bare / name)
    assert main(["ptq", str(bare), *data]) == 0
    first, second = (json.loads(p.read_text()) for p in (tmp_path / "a.json", bare / "analysis" / "ptq-bare.json"))
    assert first["loss"] == second["loss"]
    assert second["recipe"] is None and second["loss_as_trained"] == pytest.approx(first["loss"]["high_precision"])


def test_help_explains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2 and main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in ANALYSES)
    with pytest.raises(SystemExit, match="0"):
        main(["sharpness", "--help"])
    shown = capsys.readouterr().out
    assert "flat place" in shown and "radius of the ball" in shown and "RUN_OR_CHECKPOINT" in shown


def test_bad_input_is_named(folder: Path, tmp_path: Path) -> None:
    run, checkpoint = folder / "run", folder / "run" / "checkpoints" / "step-00000012"
    torn, bare, empty = tmp_path / "torn", tmp_path / "bare", tmp_path / "empty"
    shutil.copytree(checkpoint, torn)
    (torn / "model.safetensors").write_bytes(b"short")
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("trainer.json", "tokenizer*", "MANIFEST.json"))
    empty.mkdir()
    (empty / "checkpoints").mkdir()
    (tmp_path / "file").write_text("")
    cases: list[tuple[type[LowbitsError], str, list[str]]] = [
        (UnknownNameError, "did you mean 'sharpness'", ["sharpnes", str(run)]),
        (UnknownNameError, "no recipe is called 'w8a9'", ["ptq", str(run), "--to", "w8a9"]),
        (CheckpointError, "does not exist", ["ptq", str(tmp_path / "nothing")]),
        (CheckpointError, "has no checkpoint yet", ["ptq", str(empty)]),
        (CheckpointError, "model.safetensors is truncated", ["ptq", str(torn)]),
        (CheckpointError, "no run, checkpoint or model folder", ["ptq", str(folder / "text")]),
        (DataError, "--data FOLDER", ["ptq", str(bare)]),
        (DataError, "no tokenizer", ["perplexity", str(bare), "--files", "x"]),
        (DataError, "absent.txt", ["perplexity", str(run), "--files", str(tmp_path / "absent.txt")]),
        (RunError, "cannot be written", ["memory", str(run), "--out", str(tmp_path / "file" / "x.json")]),
        (RunError, "cannot be written", ["surface", str(run), "--points", "3", "--batches", "1", "--batch-size", "1",
                                         "--out", str(tmp_path / "file" / "x.json")]),
        (RunError, "batches and batch-size", ["ptq", str(run), "--batches", "0"]),
        (SpecError, "odd number of points", ["surface", str(run), "--points", "4"]),
    ]  # fmt: skip
    if not torch.cuda.is_available():
        cases.append((RunError, "no CUDA device", ["ptq", str(run), "--device", "cuda"]))
    for error, message, words in cases:
        with pytest.raises(error, match=message):
            main(words)


def test_a_recipe_without_a_name_asks_for_one(folder: Path, tmp_path: Path) -> None:
    quick = tiny_run(folder / "tokens", recipe=STOCHASTIC, steps=1, watching=Watching(eval_batches=1, errors_every=0))
    train(replace(quick, dropout=0.1), tmp_path / "custom")
    with pytest.raises(RunError, match="name one with --recipe"):
        main(["memory", str(tmp_path / "custom")])
    with pytest.raises(SpecError, match="dropout"):
        main(["memory", str(tmp_path / "custom"), "--recipe", "w8a8"])


def test_a_run_with_kept_layers_and_phases_is_analyzed_as_trained(folder: Path, tmp_path: Path) -> None:
    """The forward quantizers are off at the end, on at step 8, and kept layers are never under the recipe."""
    keep, phases = Keep(last=1), (Phase(0.75, forward=False),)
    run = tiny_run(folder / "tokens", recipe="w4_tensor", keep=keep, phases=phases)
    result = train(run, tmp_path / "run")
    words = ["ptq", "--batches", "2", "--batch-size", "4", "--to", "w4_tensor"]
    assert main([*words[:1], str(tmp_path / "run"), *words[1:]]) == 0
    found = json.loads((tmp_path / "run/analysis/ptq-step-00000012.json").read_text())
    high_precision = found["loss"]["high_precision"]
    assert found["loss_as_trained"] == high_precision == pytest.approx(result["val_loss_on"], rel=1e-5)
    assert found["loss"]["w4_tensor"] != high_precision
    subject = open_subject(tmp_path / "run/checkpoints/step-00000008", None, Device.CPU)
    layers = quantized_layers(subject.model)
    assert list(layers) == LAYERS[:4] and all(layer.active == named("w4_tensor") for layer in layers.values())
    assert all(layer.passes == (True, True) for layer in layers.values())
