# SPDX-License-Identifier: Apache-2.0
"""FSDP2 and DDP: the same bits on any number of ranks, also after a checkpoint went from one number to another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowbits.optim import AdamW, GlobalNorm
from tests.optim import ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What trainings on 2, 3 and 1 ranks wrote; each went on from the checkpoint of the one before."""
    folder = tmp_path_factory.mktemp("ranks")
    for name in ("2", "3", "1", "2 again"):
        (folder / name).mkdir()
    ranks.run(ranks.train_and_save, 2, folder / "2")
    ranks.run(ranks.train_and_resume, 3, folder / "3", folder / "2")
    ranks.run(ranks.train_and_resume, 1, folder / "1", folder / "3")
    ranks.run(ranks.resume, 2, folder / "2 again", folder / "1")
    return folder


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if one[name].dtype != other[name].dtype or not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("case", ranks.CASES)
def test_any_number_of_ranks_comes_to_the_same_bits(folder: Path, case: str) -> None:
    one = torch.load(folder / "1" / case)
    assert [key for key in one if key.endswith("first.codes")] == [
        f"{name}:first.codes" for name in ("even", "odd", "few", "wide", "deep")
    ]
    assert [differing(torch.load(folder / world / case), one) for world in ("2", "3")] == [[], []]


@pytest.mark.parametrize("case", ranks.CASES)
def test_shards_are_stored_as_a_plain_tensor_is(folder: Path, case: str) -> None:
    codecs, dtype = ranks.CASES[case]
    model, optimizer = ranks.build(codecs=codecs, dtype=dtype)
    for group in optimizer.param_groups:
        group["min_8bit_size"] = 149  # the vector and the short rows: no block fits into a row, so float32 on ranks
    ranks.steps(model, optimizer, range(4))
    plain, one = ranks.everything(model, optimizer), torch.load(folder / "1" / case)
    assert {name.split(":")[0] for name in differing(plain, one)} == {"wide"}  # its rows are no whole blocks of 256
    assert one["wide:first.scale"].shape == (5, 2)  # but of 160, the largest block that divides them


@pytest.mark.parametrize("names", ranks.NAMES)
@pytest.mark.parametrize("ranks_after", ["3", "1", "2 again"])
def test_a_checkpoint_goes_on_on_other_ranks(folder: Path, names: str, ranks_after: str) -> None:
    expected = torch.load(folder / "2" / "8 bits")
    assert differing(torch.load(folder / ranks_after / f"resumed {names}"), expected) == []
    assert differing(torch.load(folder / "2" / "half"), expected)


def test_fully_shard_trains_as_one_process(folder: Path) -> None:
    model, optimizer = ranks.network()
    ranks.learn(model, optimizer)
    plain = ranks.everything(model, optimizer)
    assert "0.weight:second.codes" in plain
    assert differing(torch.load(folder / "2" / "backward"), plain) == []


def test_replicas_train_as_one_process(folder: Path) -> None:
    model, optimizer = ranks.network()
    ranks.learn(model, optimizer)
    plain = ranks.everything(model, optimizer)
    assert [differing(torch.load(folder / "2" / f"replica.{rank}"), plain) for rank in (0, 1)] == [[], []]


def test_other_placements_train_as_one_process(folder: Path) -> None:
    whole, reasons = torch.load(folder / "2" / "tensor parallel")
    columns, norm = parameters = [nn.Parameter(t.clone()) for t in ranks.matrices()]
    optimizer = AdamW([norm], lr=1e-2, clip=GlobalNorm(0.5), **ranks.BITS8)
    optimizer.add_param_group({"params": [columns], "min_8bit_size": 4096})
    for number in range(3):
        gradients = ranks.random_like({"columns": (4, 512), "norm": (2, 256)}, number)
        columns.grad, norm.grad = gradients.values()
        optimizer.step()
    assert all(map(torch.equal, parameters, whole))
    assert reasons == {"", "sharded along another dimension than the first"}


def test_one_file_of_everything_goes_back_into_shards(folder: Path) -> None:
    found, states = torch.load(folder / "2" / "gathered")
    expected = torch.load(folder / "2" / "half")
    assert differing(found, {name: t for name, t in expected.items() if ":" in name}) == []
    assert {key.rpartition(":")[2] for key in found} >= set(states["even"])


def test_fsdp1_is_refused(folder: Path) -> None:
    assert "Use torch.distributed.fsdp.fully_shard" in (folder / "2" / "fsdp1").read_text()
