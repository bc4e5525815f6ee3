# SPDX-License-Identifier: Apache-2.0
"""Errors of layers over a run: read from its log, thinned out, and the worst named."""

from __future__ import annotations

import plotly.graph_objects as go

from lowbits.study._layer_errors import history, history_map, layers_of, worst_layers


def line(step: int, **layers: dict[str, dict[str, float | None]]) -> dict[str, object]:
    return {"kind": "errors", "step": step, "layers": layers}


def numbers(decibels: float | None, **more: float | None) -> dict[str, float | None]:
    return {"sqnr_db": decibels, "zero": 0.0, "clipped": 0.0, "relative_error": 0.1, "nonfinite": 0.0} | more


def test_the_worst_layer_of_a_role_and_its_gemm_are_named() -> None:
    gradient = {"dgrad.lhs": numbers(20.0), "wgrad.lhs": numbers(12.0)}
    layers = layers_of(
        line(
            100,
            a={"weight": numbers(20.0), "input": {}, "grad": numbers(30.0)},
            b={"weight": numbers(18.0), "input": {}, "grad": gradient["wgrad.lhs"], **gradient},
            c={"weight": numbers(22.0), "input": {}, "grad": numbers(25.0)},
        )
    )
    weight, grad = worst_layers(layers)
    assert (weight.role, weight.layer, weight.gemm, weight.sqnr_db, weight.median_db) == ("weight", "b", "", 18.0, 20.0)
    assert (grad.role, grad.layer, grad.gemm, grad.sqnr_db, grad.median_db) == ("grad", "b", "wgrad", 12.0, 25.0)
    assert not grad.nonfinite


def test_not_finite_is_worse_than_any_error_and_exact_is_better() -> None:
    broken = numbers(None, relative_error=None, nonfinite=0.5)
    exact = numbers(None, relative_error=0.0)  # an infinite ratio is null in the log
    (worst,) = worst_layers(layers_of(line(1, a={"input": exact}, b={"input": numbers(1.0)}, c={"input": broken})))
    assert (worst.layer, worst.nonfinite, worst.sqnr_db, worst.median_db) == ("c", True, None, 1.0)
    (worst,) = worst_layers(layers_of(line(1, a={"input": exact}, b={"input": numbers(1.0)})))
    assert (worst.layer, worst.nonfinite) == ("b", False)
    assert worst_layers(layers_of(line(1, a={"input": {}}))) == ()


def test_a_history_is_thinned_evenly_and_keeps_both_ends() -> None:
    lines = [line(step, a={"grad": numbers(float(step))}) for step in range(10, 1010, 10)]
    found = history(lines)
    assert len(found.steps) == 24 and (found.steps[0], found.steps[-1]) == (10, 1000)
    assert found.values["grad"]["sqnr_db"] == [[float(step) for step in found.steps]]
    assert {b - a for a, b in zip(found.steps, found.steps[1:], strict=False)} == {40, 50}


def test_a_layer_that_is_not_always_quantized_has_gaps() -> None:
    found = history([line(1, a={"input": numbers(9.0)}, b={"input": {}}), line(2, a={"input": {}}, b={"input": {}})])
    assert found.values == {"input": {"sqnr_db": [[9.0, None], [None, None]], "zero": [[0.0, None], [None, None]],
                                      "clipped": [[0.0, None], [None, None]]}}  # fmt: skip
    assert history([]).values == {}


def test_a_map_shows_one_recipe_and_one_metric_at_first() -> None:
    some = history([line(1, a={"input": numbers(9.0)}), line(2, a={"input": numbers(8.0)})])
    both = {"input": numbers(9.0), "weight": numbers(5.0)}
    more = history([line(1, **{"h.0": both, "h.1": both}), line(2, **{"h.0": both, "h.1": both})])
    drawn = history_map({"some": some, "more": more}, "input")
    shown = [trace for trace in drawn["data"] if trace["visible"]]
    assert [(trace["type"], trace["meta"]) for trace in shown] == [
        ("heatmap", "more|sqnr_db"), ("scatter", "more|sqnr_db"),
    ]  # fmt: skip
    assert shown[0]["y"] == ["0", "1"] and (shown[0]["zmin"], shown[0]["zmax"]) == (5.0, 9.0)
    go.Figure({"data": drawn["data"]})  # raises on any property that plotly does not know
