# SPDX-License-Identifier: Apache-2.0
"""FSDP2 and DDP: the same bits on any number of ranks, also after a checkpoint went from one number to another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from lowbits.optim import Blockwise
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
def test_shards_are_stored_as_a_plain_tensor_of_whole_rows_is(folder: Path, case: str) -> None:
    codecs, dtype = ranks.CASES[case]
    model, optimizer = ranks.build(codecs=codecs, dtype=dtype)
    for p, group in ((p, group) for group in optimizer.param_groups for p in group["params"]):
        group["min_8bit_size"] = 149  # the vector and the short rows: no block fits into a row, so float32 on ranks
    wide = {name: Blockwise(codec.format, 160) for name, codec in codecs.items()}  # the largest that divides its rows
    ranks.steps(model, optimizer, range(4))
    plain, one = ranks.everything(model, optimizer), torch.load(folder / "1" / case)
    assert {name.split(":")[0] for name in differing(plain, one)} == {"wide"}


@pytest.mark.parametrize("names", ranks.NAMES)
@pytest.mark.parametrize("ranks_after", ["3", "1", "2 again"])
def test_a_checkpoint_goes_on_on_other_ranks(folder: Path, names: str, ranks_after: str) -> None:
    expected = torch.load(folder / "2" / "8 bits")
    assert differing(torch.load(folder / ranks_after / f"resumed {names}"), expected) == []
    assert differing(torch.load(folder / "2" / "half"), expected)
