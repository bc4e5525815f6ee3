# SPDX-License-Identifier: Apache-2.0
"""Outlier channels that were planted, and moments of known distributions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lowbits.analysis import describe_channels, input_channels, jaccard, overlaps
from lowbits.nn import Recipe, convert_


def test_planted_channels_are_found() -> None:
    x = torch.rand(200, 64) + 1.0  # channel maxima within [1, 2]
    x[17, 3], x[5, 40] = -50.0, 20.0
    found = describe_channels(x.view(2, 100, 64))
    assert found.outliers == (3, 40)
    assert found.ratio == pytest.approx(50.0 / found.amax.median().item())
    assert (found.tokens, found.amax[40].item()) == (200, 20.0)


def test_kurtosis_of_known_distributions() -> None:
    assert describe_channels(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).kurtosis == pytest.approx(1.0)
    # four standard errors of the kurtosis of n Gaussian draws, sqrt(24 / n)
    assert describe_channels(torch.randn(1000, 100) * 3 + 7).kurtosis == pytest.approx(3.0, abs=4 * (24 / 1e5) ** 0.5)


def test_jaccard_and_overlaps() -> None:
    assert (jaccard([1, 2, 3], [2, 3, 4]), jaccard([], []), jaccard([1], [])) == (0.5, 1.0, 0.0)
    wide = torch.ones(10, 8)
    first, second, narrow = wide.clone(), wide.clone(), torch.ones(10, 4)
    first[0, [1, 2]], second[0, [2]], narrow[0, 0] = 9.0, 9.0, 9.0
    layers = {name: describe_channels(x) for name, x in (("a", first), ("b", second), ("c", narrow), ("d", wide))}
    assert overlaps(layers, layers) == {("a", "b"): 0.5}
    later = {"a": layers["b"], "b": layers["b"]}
    assert overlaps(layers, later) == {("a", "a"): 0.5, ("a", "b"): 0.5, ("b", "a"): 1.0, ("b", "b"): 1.0}


@pytest.mark.parametrize("converted", [False, True])
def test_every_linear_input_of_a_model_is_seen_over_all_batches(converted: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 4), Conv1D(3, 4)).train()
    if converted:
        convert_(model, lambda name, module: Recipe(), verbose=False)
    batches = [torch.randn(2, 5, 6), torch.randn(3, 5, 6)]
    found = input_channels(model, lambda m, x: m(x), batches)
    rows = torch.cat([b.flatten(0, 1) for b in batches])
    hidden = model[0](rows).detach()
    for name, x in (("0", rows), ("1", hidden)):
        torch.testing.assert_close(found[name].amax, x.abs().amax(0))
        assert found[name].kurtosis == pytest.approx(describe_channels(x).kurtosis, rel=1e-6)
        assert found[name].tokens == 25
    assert model.training and not model[0]._forward_pre_hooks
