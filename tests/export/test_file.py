# SPDX-License-Identifier: Apache-2.0
"""Files of coded weights: bit-exact, counted to the byte, and never read when damaged."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lowbits.errors import CheckpointError, FormatError, RunError
from lowbits.export import (
    CodedModel,
    Coding,
    PointTensor,
    coded_sizes,
    load_coded,
    published_bytes,
    published_ratio,
    save_coded,
)
from lowbits.methods.distillation import Levels, encode
from lowbits.quantizers import PerBlock, PerGroup, PerRow, PerTensor
from tests.oracles.distillation import entropy, huffman_bits


def model(count: int = 4) -> CodedModel:
    torch.manual_seed(0)
    shapes = {"a": (30, 41), "b": (5, 3, 3, 3), "c": (1,), "d.weight": (600,)}
    buckets = dict(zip(shapes, (PerBlock(256), PerGroup(8), PerTensor(), PerRow()), strict=True))
    coded = {name: encode(torch.randn(shape), Levels(count, buckets[name])) for name, shape in shapes.items()}
    w = encode(torch.randn(9, 5).bfloat16(), Levels(3, PerGroup(4)))
    coded["e"] = PointTensor(w.codes, torch.tensor([0.0, 0.4, 1.0]), w.low, w.high, w.buckets, w.dtype, True, True)
    plain = {"bias": torch.randn(7), "steps": torch.tensor(3), "half": torch.randn(2, 3).half()}
    return CodedModel(coded, plain, {"tied": "a"})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@pytest.mark.parametrize("coding", Coding)
@pytest.mark.parametrize("count", [2, 3, 16, 200, 300])
def test_what_is_read_is_what_was_written(tmp_path: Path, coding: Coding, count: int) -> None:
    path, original = tmp_path / "model.safetensors", model(count)
    sizes = save_coded(path, original, coding)
    found = load_coded(path)
    assert same(found.state_dict(), original.state_dict()) and found.ties == original.ties
    assert sizes.file == path.stat().st_size and coded_sizes(original, coding) == sizes
    assert torch.equal(found.state_dict()["tied"], found.state_dict()["a"])
    again = tmp_path / "again.safetensors"
    save_coded(again, found, coding)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("coding", Coding)
def test_sizes_by_an_independent_count_over_the_file(tmp_path: Path, coding: Coding) -> None:
    """The exact formula of the specification, from nothing but the model's shapes, codes, and the bytes on disk."""
    path, original = tmp_path / "model.safetensors", model(4)
    sizes = save_coded(path, original, coding)
    levels = {"a": 4, "b": 4, "c": 4, "d.weight": 4, "e": 3}
    elements = {"a": 1230, "b": 135, "c": 1, "d.weight": 600, "e": 45}
    ranges = {"a": math.ceil(1230 / 256), "b": 5 * math.ceil(27 / 8), "c": 1, "d.weight": 1, "e": 9 * 2}
    histogram = np.zeros(4, int)
    payload = 0
    for name, coded in original.coded.items():
        counts = np.bincount(coded.codes.numpy().reshape(-1), minlength=4)
        histogram += counts
        payload += math.ceil(elements[name] * math.ceil(math.log2(levels[name])) / 8)
    if coding is Coding.HUFFMAN:
        with safe_open(path, framework="np") as file:
            lengths = file.get_tensor("lengths")
            begins = sum(file.get_tensor(key).nbytes for key in file.keys() if key.startswith("begins/"))  # noqa: SIM118
        assert int(histogram @ lengths) == huffman_bits(histogram.tolist())
        bits = [int(np.bincount(c.codes.numpy().reshape(-1), minlength=4) @ lengths) for c in original.coded.values()]
        payload = sum(math.ceil(b / 8) for b in bits)
        assert (sizes.lengths, sizes.begins) == (4, begins) and begins == 5 * 8
        assert sizes.mean_length == pytest.approx(sum(bits) / 2011)
    plain = 7 * 4 + 8 + 6 * 2
    assert sizes.codes == payload and sizes.ranges == 8 * sum(ranges.values()) and sizes.points == 3 * 4
    assert sizes.plain == plain and sizes.elements == 2011 and sizes.dense == 4 * (2011 - 45) + 2 * 45 + plain
    assert sizes.entropy == pytest.approx(entropy(histogram.tolist()))
    with path.open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert sizes.header == header and sizes.file == header + sizes.codes + sizes.begins + sizes.ranges + (
        sizes.points + sizes.lengths + sizes.plain
    )
    assert f"{sizes.ratio:.2f} times smaller" in str(sizes)


def test_weights_in_float64_keep_every_bit(tmp_path: Path) -> None:
    coded = encode(torch.randn(7, 9, dtype=torch.float64), Levels(5, PerBlock(16)))
    save_coded(tmp_path / "model.safetensors", CodedModel({"w": coded}, {}))
    found = load_coded(tmp_path / "model.safetensors").state_dict()["w"]
    assert found.dtype == torch.float64 and torch.equal(found, coded.dequantize())


def test_published_formulas() -> None:
    assert [round(published_ratio(b, 256), 2) for b in (2, 4, 8)] == [14.22, 7.53, 3.88]
    assert published_bytes(0, 1_000_000, 4, 256) == pytest.approx(0.53e6, rel=0.01)  # the paper's student: 0.53 MB


def test_every_damage_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_coded(path, model())
    data = path.read_bytes()
    for at in [0, 3, 60, len(data) // 3, len(data) // 2, len(data) - 1, *range(100, len(data), 997)]:
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load_coded(path)
    for length in (0, 7, 100, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="torn"):
            load_coded(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_coded(tmp_path / "none")
    save_file({"a": torch.ones(3)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="not written by"):
        load_coded(tmp_path / "plain.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "odd.safetensors", {"lowbits": json.dumps(["?"])})
    with pytest.raises(CheckpointError, match="manifest"):
        load_coded(tmp_path / "odd.safetensors")
    with pytest.raises(FormatError, match="no weight is on few points"):
        save_coded(tmp_path / "x", CodedModel({}, {"a": torch.ones(2)}))
    with pytest.raises(FormatError, match="a is both"):
        save_coded(tmp_path / "x", CodedModel(model().coded, {"a": torch.ones(2)}))


def test_an_old_file_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_coded(path, model(4))
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(RunError, match="No space left on device"):
        save_coded(path, model(16))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match="cannot be written"):
        save_coded(tmp_path / "no" / "folder", model(4))
