# SPDX-License-Identifier: Apache-2.0
"""FP8 by tensors, rows and blocks bit for bit: torchao's casts, the oracle in any shape, special values, errors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lowbits.formats import E4M3, E5M2
from lowbits.quantizers import (
    Amax,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QTensor,
    QuantSpec,
    ReciprocalAmax,
    quantize,
)  # fmt: skip
from tests.oracles import float8 as oracle
from tests.oracles.microscaling import GRIDS

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "torchao.npz"
FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
KINDS = {"tensor": PerTensor(), "row": PerRow(), "1x128": PerGroup(128), "128x128": PerTile(128, 128)}
ELEMENTS = pytest.mark.parametrize("element", list(FORMATS))


def encoded(x: np.ndarray, element: str, kind: str, rule) -> QTensor:
    return quantize(torch.from_numpy(x), QuantSpec(FORMATS[element], KINDS[kind], rule))


def blocks(scale: torch.Tensor, kind: str) -> np.ndarray:
    """One scale a block, as a matrix."""
    return (
        scale.squeeze(-1).squeeze(-2) if kind == "128x128" else scale.squeeze(-1) if kind == "1x128" else scale
    ).numpy()


@pytest.fixture(scope="module")
def torchao():
    return np.load(GOLDEN)


@ELEMENTS
@pytest.mark.parametrize("kind", ["tensor", "row"])
@pytest.mark.parametrize("who", ["oracle", "library"])
@pytest.mark.parametrize("name", ["heavy", "zero_blocks", "columns32"])
def test_c3_every_byte_of_torchaos_casts(torchao, name, kind, element, who):
    x, place = torchao[f"x.{name}"], (["e4m3", "e5m2"].index(element), ["tensor", "row"].index(kind), 0)
    if who == "oracle":
        values, encode = oracle.by_reciprocal(x, element, kind, 1e-12, power_of_two=False)
    else:
        q = encoded(x, element, kind, ReciprocalAmax())
        values, encode = q.values.numpy(), None
        assert np.array_equal(
            q.scale.numpy().ravel(), 1 / torchao[f"fp8.{name}.scales"][place].ravel()[: q.scale.numel()]
        )
    codes = np.searchsorted(GRIDS[element], np.abs(values)) + 128 * np.signbit(values)
    assert np.array_equal(codes, torchao[f"fp8.{name}.codes"][place])
    if encode is not None:
        assert np.array_equal(encode.ravel(), torchao[f"fp8.{name}.scales"][place].ravel()[: encode.size])


@ELEMENTS
@pytest.mark.parametrize("kind", ["tensor", "row"])
@pytest.mark.parametrize("name", ["heavy", "zero_blocks", "columns32"])
def test_c3_every_byte_of_torchaos_casts_with_powers_of_two(torchao, name, kind, element):
    x, place = torchao[f"x.{name}"], (["e4m3", "e5m2"].index(element), ["tensor", "row"].index(kind), 1)
    encode = torchao[f"fp8.{name}.scales"][place]
    assert np.array_equal(oracle.by_reciprocal(x, element, kind, 1e-12, power_of_two=True)[1].ravel(),
                          encode.ravel()[: 1 if kind == "tensor" else 8])  # fmt: skip
    q = encoded(x, element, kind, PowerOfTwo())  # x / 2^n is x 2^-n: the rule by quotients has the same bits
    assert np.array_equal(q.pack().codes.numpy(), torchao[f"fp8.{name}.codes"][place].ravel())
    assert np.array_equal(q.scale.numpy().ravel(), 1 / encode.ravel()[: q.scale.numel()])


def test_torchaos_logarithm_saturates_where_the_rule_does_not(torchao):
    # Powers of two come from log2 in float32: a scale just below 2^n counts as 2^n beyond n = -1 .. 2, and rows whose
    # amax is one unit above 448 * 2^n saturate.
    x, theirs = torchao["edges.fp8.x"], torchao["edges.fp8.scales"].ravel()
    scale = encoded(x, "e4m3", "row", PowerOfTwo()).scale.numpy().ravel()
    assert np.array_equal(scale, np.exp2(np.arange(-11.0, 14)))
    amax = np.abs(x).max(1)
    assert (amax <= 448 * scale).all() and (amax * theirs > 448).sum() == 21


@settings(max_examples=100)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 300)), st.integers(0, 2**32 - 1), st.sampled_from(list(FORMATS)),
    st.sampled_from(list(KINDS)), st.sampled_from(["reciprocal", "quotient", "power"]), st.integers(-40, 40),
)  # fmt: skip
def test_any_shape_equals_the_oracle_bit_for_bit(shape, seed, element, kind, rule, exponent):  # noqa: PLR0913
    random = np.random.default_rng(seed)
    x = (random.standard_normal(shape) * (random.random(shape) < 0.7) * 2.0**exponent).astype(np.float32)
    if rule == "reciprocal":
        q = encoded(x, element, kind, ReciprocalAmax())
        values, encode = oracle.by_reciprocal(x, element, kind, 1e-12, power_of_two=False)
        assert np.array_equal(blocks(q.scale, kind), np.float32(1) / encode)
    else:
        q = encoded(x, element, kind, PowerOfTwo() if rule == "power" else Amax())
        values, scale = oracle.by_quotient(x, element, kind, power_of_two=rule == "power")
        assert np.array_equal(blocks(q.scale, kind), scale)
    assert np.array_equal(q.values.numpy(), values)
    assert torch.equal(q.pack().unpack().dequantize(), q.dequantize())


@given(st.tuples(st.integers(1, 200), st.integers(1, 200)), st.integers(0, 2**32 - 1))
def test_square_tiles_of_a_transpose_are_the_transposed_tiles(shape, seed):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    spec = QuantSpec(E4M3, PerTile(128, 128), PowerOfTwo())
    assert torch.equal(quantize(w, spec).dequantize().t(), quantize(w.t(), spec).dequantize())
    full = quantize(torch.nn.functional.pad(w, (0, -shape[1] % 128, 0, -shape[0] % 128)), spec)
    assert torch.equal(quantize(w, spec).values, full.values[: shape[0], : shape[1]])


@ELEMENTS
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("rule", [ReciprocalAmax(), Amax(), PowerOfTwo()], ids=str)
def test_special_values(element, kind, rule):
    assert not encoded(np.zeros((3, 5), np.float32), element, kind, rule).dequantize().any()
    for bad in (math.nan, math.inf, -math.inf):
        x = np.ones((2, 256), np.float32)
        x[0, 200] = bad
        x_hat = encoded(x, element, kind, rule).pack().unpack().dequantize()
        hurt = {"tensor": x_hat, "row": x_hat[:1], "1x128": x_hat[:1, 128:], "128x128": x_hat[:, 128:]}[kind]
        assert hurt.isnan().all() and x_hat.isnan().sum() == hurt.numel()
    tiny = np.full((2, 8), 1e-38, np.float32)
    assert encoded(tiny, element, kind, rule).dequantize().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_float32_whatever_the_input(dtype):
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rule in (ReciprocalAmax(), PowerOfTwo()):
        spec = QuantSpec(E4M3, PerRow(), rule)
        one, other = quantize(x, spec), quantize(x.float(), spec)
        assert torch.equal(one.values, other.values) and torch.equal(one.scale, other.scale)


# C9, section 2.12; the specification measured 2048 x 2048 numbers, of which these are a quarter.
@pytest.mark.parametrize(
    ("element", "kind", "published"),
    [("e4m3", "tensor", 0.0265), ("e4m3", "1x128", 0.0257), ("e5m2", "tensor", 0.0527)],
)
def test_c9_error_on_gaussians(element, kind, published):
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    error = (encoded(x.numpy(), element, kind, ReciprocalAmax()).dequantize() - x).norm() / x.norm()
    assert error.item() == pytest.approx(published, rel=0.02)


def test_c9_error_of_bf16():
    x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    assert ((x.bfloat16() - x).norm() / x.norm()).item() == pytest.approx(0.00166, rel=0.02)
