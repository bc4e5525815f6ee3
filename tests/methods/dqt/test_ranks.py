# SPDX-License-Identifier: Apache-2.0
"""U9: codes on two ranks, replicated and sharded, are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.methods.dqt import ranks
from tests.optim.ranks import run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    run(_write, 2, folder)
    return torch.load(folder / "found.pt")


def _write(folder: Path) -> None:
    ranks.write(folder)


@pytest.mark.parametrize("kind", ["sharded", "replicated", "in backward"])
def test_two_ranks_come_to_the_codes_of_one(kind: str, found: dict[str, dict[str, torch.Tensor]]) -> None:
    alone = {"sharded": ranks.sharded, "replicated": ranks.replicated, "in backward": ranks.in_backward}[kind]()
    again = {name.replace(" reloaded", ""): codes for name, codes in found[kind].items() if "reloaded" in name}
    together = {name: codes for name, codes in found[kind].items() if "reloaded" not in name}
    assert together.keys() == alone.keys()
    different = [name for name, codes in together.items() if not torch.equal(codes, alone[name])]
    assert not different
    assert all(torch.equal(codes, alone[name]) for name, codes in again.items())
    assert again or kind != "sharded"
