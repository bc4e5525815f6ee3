# SPDX-License-Identifier: Apache-2.0
"""LAMB, LARS and Adafactor of sharded parameters: norms, rows and columns are those of the whole."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.optim import ranks, shards


def test_rules_of_whole_tensors_see_them_through_shards(tmp_path: Path) -> None:
    ranks.run(shards.write, 3, tmp_path / "found")
    found, whole = torch.load(tmp_path / "found"), shards.train()
    assert found.keys() == whole.keys() and len(found) == 15
    for name, expected in whole.items():  # up to the order in which a few sums are taken
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")
