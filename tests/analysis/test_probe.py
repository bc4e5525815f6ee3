# SPDX-License-Identifier: Apache-2.0
"""The probe against float64 products of the same operands, and the list that it proposes."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lowbits.analysis import LayerProbe, as_patterns, probe_layers, probe_model, propose_keep
from lowbits.errors import SpecError
from lowbits.formats import INT4, INT8
from lowbits.nn import Gemm, Keep, Recipe, convert_, quantized_layers
from lowbits.quantizers import PerRow, QuantSpec, quantize
from lowbits.recipes import named

X_SPEC, G_SPEC = QuantSpec(INT4, PerRow()), QuantSpec(INT8, PerRow())
RECIPE = Recipe(fprop=Gemm(X_SPEC, X_SPEC), dgrad=Gemm(G_SPEC, X_SPEC), wgrad=Gemm(G_SPEC, X_SPEC))
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Its gradient with respect to the output is the second tensor."""
    return (model(batch[0]) * batch[1]).sum()


def stack() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 16))


def batches(number: int) -> list[Batch]:
    return [(torch.randn(24, 32), torch.randn(24, 16)) for _ in range(number)]


def relative(rounded: Tensor, exact: Tensor) -> float:
    return ((rounded - exact).norm() / exact.norm()).item()


def rounded(x: Tensor, spec: QuantSpec) -> Tensor:
    return quantize(x, spec).dequantize().double()


def test_errors_are_those_of_float64_products() -> None:
    model = nn.Sequential(nn.Linear(32, 16))
    convert_(model, RECIPE, verbose=False)
    made = batches(3)
    found = probe_layers(model, loss, made)["0"]
    w = model[0].weight.detach()
    expected: dict[str, list[float]] = {"fprop": [], "dgrad": [], "wgrad": []}
    for x, g in made:
        y = rounded(x, X_SPEC) @ rounded(w, X_SPEC).t()
        expected["fprop"].append(relative(y, x.double() @ w.double().t()))
        dx = rounded(g, G_SPEC) @ rounded(w.t(), X_SPEC).t()
        expected["dgrad"].append(relative(dx, g.double() @ w.double()))
        dw = rounded(g.t(), G_SPEC) @ rounded(x.t(), X_SPEC).t()
        expected["wgrad"].append(relative(dw, g.double().t() @ x.double()))
    # The layer adds up in float32: 2^-24 a sum, beside errors of 0.1.
    for gemm, values in expected.items():
        assert getattr(found, gemm) == pytest.approx(sum(values) / 3, rel=1e-4)
    assert found.wgrad_deviation == pytest.approx(torch.tensor(expected["wgrad"]).std().item(), rel=1e-3)
    assert found.flops_share == 1.0


def test_inputs_are_those_of_high_precision() -> None:
    """The second layer sees what the first one returns unrounded, so probing it alone is the same."""
    model, made = stack(), batches(2)
    convert_(model, RECIPE, verbose=False)
    both = probe_layers(model, loss, made)
    quantized_layers(model)["0"].recipe = Recipe()
    alone = probe_layers(model, loss, made)
    assert alone["2"] == both["2"] and both["0"].fprop > 0
    assert (alone["0"].fprop, alone["0"].dgrad, alone["0"].wgrad) == (0.0, 0.0, 0.0)
    assert both["0"].flops_share == pytest.approx(32 * 48 / (32 * 48 + 48 * 16))


def test_the_model_is_left_as_it_was() -> None:
    model, made, calls = stack().train(), batches(2), []
    convert_(model, named("nvfp4"), verbose=False)
    first = probe_layers(model, loss, made, lambda: calls.append(1))
    assert len(calls) == 2 * 2
    probe_model(model, loss, made, {"some": ["0"]}, lambda: calls.append(1))
    assert len(calls) == 2 * 2 + 2 * 2 and model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(layer.recipe == named("nvfp4") for layer in quantized_layers(model).values())
    assert probe_layers(model, loss, made) == first  # stochastic rounding included


def test_what_is_not_finite_is_worst() -> None:
    model = stack()
    convert_(model, RECIPE, verbose=False)
    made = [(torch.full((24, 32), math.inf), torch.randn(24, 16)), *batches(1)]
    found = probe_layers(model, loss, made)
    assert found["0"].fprop == math.inf and math.isnan(found["0"].wgrad_deviation)


def test_keeping_everything_leaves_no_error() -> None:
    model, made = stack(), batches(2)
    convert_(model, RECIPE, verbose=False)
    found = probe_model(model, loss, made, {"none": [], "first": ["0"], "all": ["0", "2"]})
    assert list(found) == ["high precision", "none", "first", "all"]
    assert found["all"] == found["high precision"] and found["all"].gradient_error == 0
    assert 0 < found["first"].gradient_error < found["none"].gradient_error
    assert found["none"].loss != found["high precision"].loss


def test_nothing_to_probe_is_an_error() -> None:
    with pytest.raises(SpecError, match="converted layer"):
        probe_layers(stack(), loss, batches(1))


def probes(errors: dict[str, float], **more: float) -> dict[str, LayerProbe]:
    return {name: LayerProbe(more.get("fprop", 0.1), 0.0, error, 0.0, 0.1) for name, error in errors.items()}


def test_the_worst_that_fit_are_proposed() -> None:
    found = probes({"a": 0.3, "b": 0.1, "c": math.inf, "d": 0.2})
    assert propose_keep(found, 0.25) == ["a", "c"] and propose_keep(found, 0.05) == []
    assert propose_keep(found, 0.3) == ["a", "c", "d"]
    big = found | {"e": LayerProbe(0.1, 0.1, 0.9, 0.0, 0.5)}
    assert propose_keep(big, 0.15) == ["c"]  # e is too large, the next one still fits
    assert propose_keep(probes({"a": 0.0, "b": 0.0}), 0.1) == ["a"]  # forward only: Y decides
    assert propose_keep(probes({"a": 0.0}, fprop=0.0), 1.0) == []


NAMES = [f"transformer.h.{i}.{part}" for i in range(12) for part in ("attn.proj", "mlp.fc", "mlp.proj")] + ["lm_head"]


@given(st.sets(st.sampled_from(NAMES)))
def test_patterns_match_the_chosen_and_no_others(chosen: set[str]) -> None:
    patterns = as_patterns(chosen, NAMES)
    assert {name for name in NAMES if any(fnmatchcase(name, p) for p in patterns)} == chosen
    assert len(patterns) <= len(chosen)


def test_patterns_are_short_and_what_keep_takes() -> None:
    block = [name for name in NAMES if name.startswith("transformer.h.1.")]
    assert as_patterns(block, NAMES) == ["transformer.h.1.*"]
    column = [name for name in NAMES if name.endswith("mlp.fc")]
    assert as_patterns([*column, "lm_head"], NAMES) == ["transformer.h.*.mlp.fc", "lm_head"]
    model = stack()
    assert set(Keep(names=tuple(as_patterns(["2"], ["0", "2"]))).layers(model)) == {"2"}
