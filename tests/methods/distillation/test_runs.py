# SPDX-License-Identifier: Apache-2.0
"""Both methods in `lowbits train`: teachers, caches, what is trained, and what the report says of sizes."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbits import models
from lowbits.data import TokenData
from lowbits.errors import DataError, RunError, ShapeError
from lowbits.export import Coding, load_coded, save_coded
from lowbits.methods.differentiable_quantization import DifferentiableQuantization, point_parameters
from lowbits.methods.distillation import Backward, Cut, Ends, QuantizedDistillation, TeacherCache, viewed
from lowbits.nn import Recipe, convert_
from lowbits.train import Run, checkpoints, train
from tests.train.tiny import log_lines, model, state_bytes, tiny_run, tokens


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tokens(tmp_path_factory.mktemp("tiny")).folder


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of an ordinary run."""
    out = tmp_path_factory.mktemp("teacher")
    train(short(data, steps=6), out / "run")
    return checkpoints(out / "run" / "checkpoints")[-1]


def short(data: Path, **changes) -> Run:
    run = tiny_run(data, recipe="bf16", steps=changes.pop("steps", 3))
    return replace(run, watching=replace(run.watching, errors_every=0), **changes)


def network(seed: int = 0):
    torch.manual_seed(seed)
    student = model(300, 32, dropout=0.0)
    student.config._name_or_path = "a folder"  # as if its weights were trained
    convert_(student, Recipe(), verbose=False)
    return student


def test_a_run_from_the_cache_has_the_bits_of_a_run_with_the_teacher(data: Path, teacher: Path, tmp_path: Path) -> None:
    """With every class kept, the second run reads what the first one wrote, and needs no teacher."""
    method = QuantizedDistillation(teacher=str(teacher), cache=str(tmp_path / "cache"), classes=10_000, size=32)
    train(short(data, method=method), tmp_path / "one")
    assert len(TeacherCache(tmp_path / "cache")) == 3 * 4  # sequences of three steps
    train(short(data, method=replace(method, teacher="cached")), tmp_path / "two")
    assert [line for line in log_lines(tmp_path / "one") if line["kind"] == "step"] == [
        line for line in log_lines(tmp_path / "two") if line["kind"] == "step"
    ]
    direct = train(short(data, method=replace(method, cache="")), tmp_path / "three")
    one = json.loads((tmp_path / "one" / "result.json").read_text())
    assert direct["val_loss_on"] == pytest.approx(one["val_loss_on"], abs=1e-4)


def test_points_alone_are_trained(data: Path, teacher: Path, tmp_path: Path) -> None:
    run = short(data, model=str(teacher), method=DifferentiableQuantization(bits=2, size=32), steps=4)
    train(run, tmp_path / "run")
    from safetensors.torch import load_file

    after = load_file(checkpoints(tmp_path / "run" / "checkpoints")[-1] / "model.safetensors")
    before = load_file(teacher / "model.safetensors")
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    points = [name for name in after if name not in before]
    assert points and all(name.endswith(".weight_view.points") for name in points)
    told = [line["method"] for line in log_lines(tmp_path / "run") if line["kind"] == "step"]
    assert len({line["relative error of weights"] for line in told}) > 1


FEW = {
    "levels": QuantizedDistillation(teacher="none", bits=3, size=32, ends=Ends.KEPT, backward=Backward.TRUNCATED),
    "points": DifferentiableQuantization(teacher="none", bits=2, cut=Cut.GROUP, size=8),
}


@pytest.mark.parametrize("name", FEW)
def test_a_run_leaves_a_file_that_computes_what_it_evaluated(name: str, data: Path, tmp_path: Path) -> None:
    """Its size is the report's, and so is that of a packed one."""
    run = short(data, method=FEW[name])
    result = train(run, tmp_path / "run")
    (table,) = result["tables"]
    assert table["columns"] == ("part", "packed", "huffman")
    rows = {row[0]: row[1:] for row in table["rows"]}
    coded = load_coded(tmp_path / "run" / "coded.safetensors")
    assert (tmp_path / "run" / "coded.safetensors").stat().st_size == rows["file"][1]
    assert save_coded(tmp_path / "packed", coded, Coding.PACKED).file == rows["file"][0]
    plain = models.build(str(checkpoints(tmp_path / "run" / "checkpoints")[-1]), 300, 32, 0).eval()
    plain.load_state_dict(load_coded(tmp_path / "packed").state_dict())
    batches = TokenData.open(data).val_batches(run.batch_size, run.block, run.watching.eval_batches * run.batch_size)
    with torch.no_grad():
        losses = [(plain(input_ids=ids, labels=ids).loss.item(), len(ids)) for ids in batches]
    found = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert found == pytest.approx(result["val_loss_on"], abs=1e-4) != pytest.approx(result["val_loss_off"], abs=1e-4)


def test_the_report_compares_with_the_teacher(data: Path, teacher: Path, tmp_path: Path) -> None:
    result = train(short(data, method=QuantizedDistillation(teacher=str(teacher), size=32)), tmp_path / "run")
    rows = {row[0]: row[1:] for row in result["tables"][0]["rows"]}
    parameters = sum(p.numel() for p in models.build(str(teacher), 300, 32, 0).parameters())
    expected = [round(4 * parameters / size, 3) for size in rows["file"]]
    assert list(rows["times smaller than the teacher in float32"]) == expected


def test_points_are_shared_out_by_gradient(data: Path, teacher: Path, tmp_path: Path) -> None:
    """By the gradients of the mixed loss; a run that is resumed shares them out again as before."""
    method = DifferentiableQuantization(bits=2, size=32, share_out=str(data), teacher=str(teacher))
    run = short(data, model=str(teacher), method=method, steps=4)
    run = replace(run, saving=replace(run.saving, save_every=2, keep=2))
    train(run, tmp_path / "run")
    saved = checkpoints(tmp_path / "run" / "checkpoints")
    from safetensors.torch import load_file

    state = load_file(saved[-1] / "model.safetensors")
    counts = [len(tensor) for name, tensor in state.items() if name.endswith(".points")]
    assert sum(counts) == 4 * len(counts) and min(counts) >= 2 and max(counts) > 4
    before = state_bytes(tmp_path / "run")
    shutil.rmtree(saved[-1])
    (tmp_path / "run" / "result.json").unlink()
    train(run, tmp_path / "run", resume=True)
    assert state_bytes(tmp_path / "run") == before


def test_two_runs_have_the_same_file(data: Path, tmp_path: Path) -> None:
    run = short(data, method=QuantizedDistillation(teacher="none", bits=2, size=32))
    for name in "ab":
        train(run, tmp_path / name)
    assert state_bytes(tmp_path / "a") == state_bytes(tmp_path / "b")


def test_switching_off_shows_the_master_weights(data: Path, tmp_path: Path) -> None:
    result = train(short(data, method=QuantizedDistillation(teacher="none", bits=1, size=32)), tmp_path / "run")
    assert result["val_loss_on"] != result["val_loss_off"]


def test_ends_may_be_kept() -> None:
    student = network()
    QuantizedDistillation(ends=Ends.KEPT).prepare_(student, 0)
    names = [place.name for place, _ in viewed(student)]
    assert len(names) == 8 and not any("wte" in name or "wpe" in name for name in names)
    DifferentiableQuantization().prepare_(student, 0)
    assert len(point_parameters(student)) == 10


def test_the_models_own_weights_teach_in_high_precision() -> None:
    student, ids = network(), torch.arange(32)[None]
    with torch.no_grad():
        expected = student(ids).logits
    QuantizedDistillation(teacher="self", bits=1).prepare_(student, 0)
    teacher = student._distillation_source.teacher
    assert torch.equal(teacher(ids), expected)
    with torch.no_grad():
        student.transformer.wte._parameters["weight"].zero_()
    assert torch.equal(teacher(ids), expected)
    assert not any("teacher" in name for name, _ in student.named_modules())


def test_a_bf16_model_teaches_its_own_nvfp4_form(data: Path, teacher: Path, tmp_path: Path) -> None:
    """Distillation alone, of a student whose few bits are its recipe's."""
    method = QuantizedDistillation(bits=32, weight=1.0)
    run = short(data, model=str(teacher), method=method, steps=8)
    result = train(replace(run, recipe="nvfp4", optimizer=replace(run.optimizer, lr=1e-3)), tmp_path / "run")
    assert result["recipe"] == "nvfp4" and result["tables"] == []
    lines = [line for line in log_lines(tmp_path / "run") if line["kind"] == "step"]
    divergences = [line["loss"] for line in lines]
    assert all("method" not in line for line in lines)
    assert all(0 < divergence < 0.01 for divergence in divergences)  # the teacher knows little after six steps


def test_a_cache_that_cannot_serve_is_named_before_training(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    method = QuantizedDistillation(teacher=str(teacher), cache=str(folder))
    with pytest.raises(DataError, match="no teacher's cache"):
        replace(method, teacher="cached").prepare_(network(), 0)
    method.prepare_(network(), 0)
    with pytest.raises(DataError, match="is empty; fill it with a run that has the teacher"):
        replace(method, teacher="cached").prepare_(network(), 0)
    with pytest.raises(DataError, match="holds a cache of"):  # the student itself, not the teacher that began it
        replace(method, teacher="self").prepare_(network(), 0)
    ids = torch.arange(32)[None]
    student = network()
    method.prepare_(student, 0)
    method.loss(student, ids)
    shard = folder / "shard-00000.safetensors"
    assert shard.exists() and len(TeacherCache(folder)) == 1
    cached = replace(method, teacher="cached")
    with pytest.raises(DataError, match=r"written at temperature 1\.0, the run wants 2\.0"):
        replace(cached, temperature=2.0).prepare_(network(), 0)
    with pytest.raises(ShapeError, match="300 classes, the student 999"):
        cached.prepare_(model(999, 32), 0)
    shard.write_bytes(shard.read_bytes()[:-9] + b"elsewhere")
    student = network()
    cached.prepare_(student, 0)
    with pytest.raises(DataError, match=r"was altered.*TeacherCache\.repair"):
        cached.loss(student, ids)
    assert shard.exists()


def test_bad_teachers_are_named_before_training(teacher: Path, tmp_path: Path) -> None:
    student = model(999, 32)
    with pytest.raises(ShapeError, match="teacher's vocabulary has 300 entries, the student's 999"):
        QuantizedDistillation(teacher=str(teacher)).prepare_(student, 0)
    with pytest.raises(RunError, match="fresh weights, which know nothing"):
        QuantizedDistillation().prepare_(model(300, 32), 0)
    with pytest.raises(RunError, match="needs cache=FOLDER"):
        QuantizedDistillation(teacher="cached").prepare_(network(), 0)
    with pytest.raises(RunError, match="there is none"):
        QuantizedDistillation(teacher="none", cache=str(tmp_path)).prepare_(network(), 0)
