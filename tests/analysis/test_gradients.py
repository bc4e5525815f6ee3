# SPDX-License-Identifier: Apache-2.0
"""Gradient statistics against numbers by hand and closed-form gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbits.analysis import gradient_sparsity, magnitude_histogram, output_gradients
from lowbits.formats import INT8
from lowbits.nn import Recipe, convert_
from lowbits.quantizers import PerRow, PerTensor, QuantSpec, quantize


def test_histogram_by_hand() -> None:
    x = torch.tensor([0.0, 0.5, -0.05, 0.02, 1.0, -9.0, 1e-30, 20.0])
    shares = {k: v * 8 for k, v in magnitude_histogram(x).items()}
    assert shares == {-999: 1.0, -20: 1.0, -2: 2.0, -1: 1.0, 0: 2.0, 1: 1.0}


def test_sparsity_against_brute_force() -> None:
    # Tokens of very different gradient size, as in training: one scale for all flushes the small ones.
    g = torch.randn(64, 32) * torch.logspace(-5, 0, 64)[:, None]
    x = torch.randn(64, 24)
    tensor, token = (gradient_sparsity(g, x, QuantSpec(INT8, kind)) for kind in (PerTensor(), PerRow()))
    for kind, got in ((PerTensor(), tensor), (PerRow(), token)):
        g_hat = quantize(g, QuantSpec(INT8, kind)).dequantize().double()
        exact, rough = (m.t() @ x.double() for m in (g.double(), g_hat))
        cosine = nn.functional.cosine_similarity(exact.flatten(), rough.flatten(), dim=0).item()
        assert got.weight_gradient_cosine == pytest.approx(cosine, rel=1e-9)
        assert got.zero == (g_hat == 0).double().mean().item()
        assert got.relative_error == pytest.approx(((g.double() - g_hat).norm() / g.double().norm()).item(), rel=1e-4)
    assert tensor.zero > 0.4 > 0.02 > token.zero
    assert token.weight_gradient_cosine > tensor.weight_gradient_cosine


@pytest.mark.parametrize("quantizers", [False, True])
def test_output_gradients_of_a_network(quantizers: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3, bias=False))
    if quantizers:
        convert_(model, lambda name, module: Recipe(), verbose=False)
    x = torch.randn(2, 4, 6)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).square().sum() / 2

    found = output_gradients(model, loss, x)
    y = model(x).detach().flatten(0, 1)  # the gradient of sum y^2 / 2
    assert list(found) == ["0", "1"]
    torch.testing.assert_close(found["1"][0], y)
    torch.testing.assert_close(found["0"][0], y @ model[1].weight.detach())
    torch.testing.assert_close(found["0"][1], x.flatten(0, 1))
    assert all(p.grad is None for p in model.parameters())
    assert not model[0]._forward_hooks
