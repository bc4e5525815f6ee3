# SPDX-License-Identifier: Apache-2.0
"""A teacher on disk: what is read is what was written, a writer goes on, and damage is named and loses nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lowbits.errors import DataError, RunError, ShapeError
from lowbits.methods.distillation import (
    CacheSettings,
    Mixing,
    Stored,
    TeacherCache,
    TopK,
    content_keys,
    distillation_loss,
)


def logits(examples: int, *shape: int) -> Tensor:
    return 3 * torch.randn(examples, *shape, generator=torch.Generator().manual_seed(examples))


def filled(folder: Path, k: int = 5, classes: int = 12, stored: Stored = Stored.FLOAT32) -> tuple[TeacherCache, Tensor]:
    cache = TeacherCache.create(folder, CacheSettings("toy", classes, k, 2.0, stored))
    z = logits(9, 4, classes)
    for i in range(0, 9, 3):
        cache.append(list(range(i, i + 3)), z[i : i + 3])
    return cache, z


@pytest.mark.parametrize("classes", [12, 300, 70_000])
def test_reading_gives_what_was_written(tmp_path: Path, classes: int) -> None:
    cache, z = filled(tmp_path / "cache", classes=classes)
    keys = [7, 0, 0, 4]
    expected = TopK.of_logits(z[keys], 5, 2.0)
    for found in (cache.read(keys), TeacherCache(tmp_path / "cache").read(keys)):
        for a, b in [
            (found.log_probs, expected.log_probs),
            (found.classes, expected.classes),
            (found.rest, expected.rest),
        ]:
            assert torch.equal(a, b)
    assert len(cache) == 9 and 8 in cache and 9 not in cache and cache.verify() == []


def test_a_full_cache_gives_the_teachers_own_loss(tmp_path: Path) -> None:
    cache, z = filled(tmp_path / "cache", k=12)
    student, labels = torch.randn(9, 4, 12), torch.randint(0, 12, (9, 4))
    found = distillation_loss(student, cache.read(list(range(9))), labels, Mixing())
    assert found.item() == pytest.approx(distillation_loss(student, z, labels, Mixing()).item(), rel=1e-6)


def test_half_precision_is_half_the_bytes_and_near(tmp_path: Path) -> None:
    cache, z = filled(tmp_path / "half", stored=Stored.FLOAT16)
    found, expected = cache.read([1, 2]), TopK.of_logits(z[1:3], 5, 2.0)
    assert (found.log_probs - expected.log_probs).abs().max() <= 2**-11 * expected.log_probs.abs().max()


def test_a_writer_goes_on_and_writes_nothing_twice(tmp_path: Path) -> None:
    cache, z = filled(tmp_path / "cache")
    again = TeacherCache.create(tmp_path / "cache", cache.settings)
    shards = sorted(tmp_path.glob("cache/shard-*"))
    again.append([0, 1, 2], z[:3])
    assert sorted(tmp_path.glob("cache/shard-*")) == shards
    assert again.missing([8, 9, 10, 9]) == [1, 2, 3]
    again.append([8, 9, 10, 9], torch.cat([z[8:], logits(3, 4, 12)]))
    assert len(again) == 11 and len(TeacherCache(tmp_path / "cache")) == 11
    assert torch.equal(again.read([9]).log_probs, TopK.of_logits(logits(3, 4, 12)[:1], 5, 2.0).log_probs)


def test_a_writer_that_died_between_shard_and_index_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, z = filled(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("lowbits.methods._teacher_cache._add_line", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            cache.append([20], logits(1, 4, 12))
    opened = TeacherCache(tmp_path / "cache")
    assert len(opened) == 9 and opened.verify() == []
    opened.append([20], logits(1, 4, 12))
    assert TeacherCache(tmp_path / "cache").read([20]).classes.shape == (1, 4, 5)


def test_an_empty_cache_and_missing_examples_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no teacher's cache"):
        TeacherCache(tmp_path)
    empty = TeacherCache.create(tmp_path / "empty", CacheSettings("toy", 12, 5))
    with pytest.raises(DataError, match="empty is empty; fill it"):
        empty.read([0])
    cache, _ = filled(tmp_path / "cache")
    with pytest.raises(DataError, match=r"lacks 1 of 2 examples \(first key 99\)"):
        cache.read([0, 99])


def test_a_damaged_shard_is_named_and_only_it_is_lost(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache, z = filled(folder)
    shard = folder / "shard-00001.safetensors"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    opened = TeacherCache(folder)
    assert opened.read([0, 8]).classes.shape == (2, 4, 5)
    with pytest.raises(DataError, match=r"shard-00001.* was altered.*TeacherCache\.repair"):
        opened.read([0, 4])
    assert len(opened.verify()) == 1 and "shard-00001" in opened.verify()[0]
    assert TeacherCache.repair(folder) == 3
    mended = TeacherCache.create(folder, cache.settings)
    assert mended.missing(list(range(9))) == [3, 4, 5] and len(list(folder.glob(".shard-00001*.damaged"))) == 1
    mended.append([3, 4, 5], z[3:6])
    assert torch.equal(mended.read([4]).classes, TopK.of_logits(z[4:5], 5, 2.0).classes)
    assert TeacherCache.repair(folder) == 0


@pytest.mark.parametrize("cut", [0, 20, -10, None])
def test_a_torn_or_missing_shard_is_named(tmp_path: Path, cut: int | None) -> None:
    folder = tmp_path / "cache"
    filled(folder)
    shard = folder / "shard-00002.safetensors"
    if cut is None:
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"shard-00002.*(cut off|missing).*repair"):
        TeacherCache(folder).read([8])
    assert TeacherCache.repair(folder) == 3 and len(TeacherCache(folder)) == 6


def test_a_damaged_index_is_named_and_shards_are_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    filled(folder)
    index = folder / "index.jsonl"
    data = index.read_bytes()
    for broken in (
        b"",
        data[:40],
        data.replace(b"toy", b"joy"),
        b"[]\n" + data,
        data.replace(b"shard-00001", b"shard-00007"),
    ):
        index.write_bytes(broken)
        with pytest.raises(DataError, match="index.jsonl is damaged"):
            TeacherCache(folder)
    assert len(list(folder.glob("shard-*"))) == 3


def test_a_line_that_a_crash_tore_off_costs_its_shard_alone(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    cache, z = filled(folder)
    index = folder / "index.jsonl"
    index.write_bytes(index.read_bytes()[:-7])
    again = TeacherCache.create(folder, cache.settings)
    assert again.missing(list(range(9))) == [6, 7, 8]
    again.append([6, 7, 8], z[6:])
    opened = TeacherCache(folder)
    assert len(opened) == 9 and opened.verify() == []
    assert torch.equal(opened.read([7]).classes, TopK.of_logits(z[7:8], 5, 2.0).classes)


def test_other_settings_vocabularies_and_folders_are_refused(tmp_path: Path) -> None:
    cache, _ = filled(tmp_path / "cache")
    with pytest.raises(DataError, match="holds a cache of"):
        TeacherCache.create(tmp_path / "cache", CacheSettings("toy", 13, 5, 2.0))
    with pytest.raises(ShapeError, match="keeps 12 classes"):
        cache.append([50], logits(1, 4, 13))
    with pytest.raises(ShapeError, match="for 2 keys"):
        cache.append([50, 51], logits(1, 4, 12))
    with pytest.raises(ShapeError, match="1 to 12"):
        CacheSettings("toy", 12, 13)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(DataError, match="other files"):
        TeacherCache.create(tmp_path / "mine", cache.settings)


def test_a_full_disk_leaves_all_earlier_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, _ = filled(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(RunError, match="No space left"):
            cache.append([50], logits(1, 4, 12))
    assert len(TeacherCache(tmp_path / "cache")) == 9 and cache.read([8]).classes.shape == (1, 4, 5)


def test_keys_depend_on_content_alone() -> None:
    ids = torch.randint(0, 100, (5, 7))
    keys = content_keys(ids)
    assert content_keys(ids.int().flip(0)) == keys[::-1] and len(set(keys)) == 5 and max(keys) < 1 << 63
