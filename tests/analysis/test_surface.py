# SPDX-License-Identifier: Apache-2.0
"""The loss surface of a quadratic, and the norms of filter-normalised directions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowbits.analysis import filter_normalised_direction, heat_map, loss_surface
from lowbits.errors import SpecError


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(4, 3), Conv1D(5, 3), nn.LayerNorm(5)


def loss(model: Model, target: Tensor) -> Tensor:
    return sum(((p - target) ** 2).sum() for p in model.parameters())  # type: ignore[return-value]


def test_rows_of_the_direction_have_the_norms_of_the_rows() -> None:
    model = Model()
    d = filter_normalised_direction(model, seed=1)
    torch.testing.assert_close(d["a.weight"].norm(dim=1), model.a.weight.detach().norm(dim=1))
    torch.testing.assert_close(d["b.weight"].norm(dim=0), model.b.weight.detach().norm(dim=0))  # [in, out]
    assert all(not d[name].any() for name in ("a.bias", "b.bias", "norm.weight", "norm.bias"))
    again, other = filter_normalised_direction(model, seed=1), filter_normalised_direction(model, seed=2)
    assert torch.equal(again["a.weight"], d["a.weight"]) and not torch.equal(other["a.weight"], d["a.weight"])


def test_surface_has_the_closed_form_of_a_quadratic() -> None:
    model = Model()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    directions = (filter_normalised_direction(model, 0), filter_normalised_direction(model, 1))
    targets = [torch.tensor(0.1), torch.tensor(-0.3)]
    surface = loss_surface(model, loss, targets, directions, span=0.5, points=5)
    assert surface.coordinates == (-0.5, -0.25, 0.0, 0.25, 0.5)
    theta, d1, d2 = (
        torch.cat([v[n].double().flatten() for n, _ in model.named_parameters()]) for v in (before, *directions)
    )
    for i, a in enumerate(surface.coordinates):
        for j, b in enumerate(surface.coordinates):
            want = sum(((theta + a * d1 + b * d2 - t.double()) ** 2).sum().item() for t in targets) / 2
            assert surface.losses[i][j] == pytest.approx(want, rel=1e-5)
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert heat_map(surface, "w4").data[0].z[1][3] == surface.losses[1][3]


def test_bad_arguments() -> None:
    directions = ({}, {})
    for batches, points in (([], 5), ([torch.zeros(())], 4), ([torch.zeros(())], 1)):
        with pytest.raises(SpecError, match="odd number of points"):
            loss_surface(Model(), loss, batches, directions, points=points)
