# SPDX-License-Identifier: Apache-2.0
"""Recipes refuse contradictions, and say which GEMMs hardware could run (U13)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lowbits.errors import NativeError, SpecError, UnknownNameError
from lowbits.formats import INT8
from lowbits.nn import Execution, Gemm, Recipe, Save
from lowbits.quantizers import PerRow, QuantSpec
from lowbits.recipes import FAMILIES, NAMED, named

# Spec 2.5: what an integer GEMM can absorb. True: legal.
LEGALITY = {
    "w8a8": {"fprop": True}, "w8a8g8": {"fprop": True, "wgrad": False}, "a8_column": {"fprop": False},
    "int8_rowwise": {"fprop": True, "dgrad": True, "wgrad": True}, "g8_token": {"wgrad": False},
    "fp8_tensorwise": {"fprop": True, "dgrad": True, "wgrad": True},
}  # fmt: skip


@pytest.mark.parametrize("name", LEGALITY)
def test_legality_follows_the_contraction(name):
    for gemm, legal in LEGALITY[name].items():
        assert (NAMED[name].illegal(gemm) is None) == legal


@pytest.mark.parametrize("name", [n for n, r in NAMED.items() if not r.plain and r.execution is Execution.SIMULATED])
def test_native_is_given_exactly_where_every_quantized_gemm_is_legal(name):
    recipe = NAMED[name]
    legal = all(recipe.illegal(g) is None for g, gemm in recipe.gemms.items() if any(gemm))
    if legal:
        assert replace(recipe, execution=Execution.NATIVE).execution is Execution.NATIVE
    else:
        with pytest.raises(NativeError, match="(fprop|dgrad|wgrad) cannot run natively"):
            replace(recipe, execution=Execution.NATIVE)


def test_contradictions_are_refused():
    row = QuantSpec(INT8, PerRow())
    with pytest.raises(SpecError, match="both its operands"):
        Recipe(fprop=Gemm(row, None), save=Save.QUANTIZED)
    with pytest.raises(SpecError, match="at least 1"):
        Recipe(grad_parts=0)
    with pytest.raises(SpecError, match="forward is none of fprop, dgrad, wgrad"):
        Recipe(fast_accumulation=("forward",))
    with pytest.raises(NativeError, match="quantizes no GEMM"):
        Recipe(execution=Execution.NATIVE)
    with pytest.raises(NativeError, match="split into 3"):
        replace(named("int8_rowwise"), grad_parts=3, execution=Execution.NATIVE)


def test_the_study_s_grid_is_complete():
    grid = FAMILIES["linear quantization"]
    published = [
        "w8_tensor", "w8_channel", "w4_tensor", "w4_channel", "a8_tensor", "a8_token", "a4_tensor",
        "a4_token", "a4_column", "a8_column", "a4_token_asym", "a8_token_asym", "g8_tensor", "g8_token",
        "g4_tensor", "g4_token", "g8_token_dgrad", "m8_tensor", "m8_channel", "m4_tensor", "m4_channel",
        "v8_channel", "v8_tensor", "w8a8", "w8a8g8",
    ]  # fmt: skip
    assert set(published) <= set(grid)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="did you mean 'w8a8'"):
        named("w8aa8")


def test_recipes_describe_themselves():
    assert str(Recipe()) == "high precision"
    assert str(named("w8a8g8")) == "fprop int8 row x int8 row; wgrad int8 column x -; simulated"
    assert str(named("m8_channel")) == "moments int8 row, float32"
    assert named("w8a8").to_dict()["fprop"] == {"lhs": "int8 row", "rhs": "int8 row"}
