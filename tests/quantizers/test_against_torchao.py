# SPDX-License-Identifier: Apache-2.0
"""Codes and scales against torchao itself, where it is installed (`pip install lowbits[peers]`); 0.17 and later.

`tests/golden/torchao.npz` holds a little of this for everyone. torchao 0.17 differs from its later versions, and from
these rules, in three places that are left out here and named in the golden tests: its round-up rule for MX takes a
logarithm in float32, blocks whose scale is E8M0's lowest are encoded with another scale than they are decoded with,
and an infinity in a block gets a finite scale.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from lowbits.formats import E2M1, E2M3, E3M2, E4M3, E5M2
from lowbits.quantizers import (
    NVFP4_SIGNS,
    Hadamard,
    Microscaling,
    Order,
    PerGroup,
    PerRow,
    PerTensor,
    PowerOfTwo,
    QuantSpec,
    ReciprocalAmax,
    SharedExponent,
    TwoLevel,
    quantize,
)  # fmt: skip

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    pytest.importorskip("torchao", minversion="0.17")
    theirs = pytest.importorskip("tests.golden.make_torchao", exc_type=ImportError)

FORMATS = {"e2m1": E2M1, "e2m3": E2M3, "e3m2": E3M2, "e4m3": E4M3, "e5m2": E5M2}
DATA = ["gauss", "heavy", "columns", "tiny", "large", "ties", "zero_blocks"]


def data(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 256, generator=generator)
    tail, column = torch.randn(x.shape, generator=generator), torch.randn(256, generator=generator)
    kinds = {
        "gauss": x, "heavy": x * torch.exp(2 * tail), "columns": x * torch.exp(3 * column), "tiny": 1e-30 * x,
        "large": 1e30 * x, "ties": (4 * x).round() / 4, "zero_blocks": x.masked_fill(torch.arange(256) % 64 < 32, 0),
    }  # fmt: skip
    return kinds[name].to(dtype)


EVERYTHING = pytest.mark.parametrize("name", DATA)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])


def same_codes(ours: Tensor, codes: Tensor, zero: int) -> bool:
    """Modulo the sign of zero."""
    return torch.equal(ours.view_as(codes) * (ours.view_as(codes) != zero), codes * (codes != zero))


@EVERYTHING
@DTYPES
def test_nvfp4(name, dtype):
    x = data(name, dtype)
    q = quantize(x, QuantSpec(E2M1, PerGroup(16), TwoLevel(Order.TORCHAO_INFERENCE)))
    codes, scales = theirs.nvfp4(x)
    assert same_codes(E2M1.encode(q.values), codes, 8)
    assert torch.equal(q.pack().scale.view_as(scales), scales)
    assert q.outer is not None and torch.equal(q.outer.view(()), x.float().abs().max() / 2688)


@EVERYTHING
@DTYPES
@pytest.mark.parametrize("element", list(FORMATS))
@pytest.mark.parametrize("rule", [rule.value for rule in SharedExponent])
def test_mx(name, dtype, element, rule):
    x = data(name, dtype)
    q = quantize(x, QuantSpec(FORMATS[element], PerGroup(32), Microscaling(SharedExponent(rule))))
    codes, scales = theirs.mx(x, element, rule)
    assert torch.equal(q.pack().scale.squeeze(-1), scales)
    assert torch.equal(FORMATS[element].encode(q.values), codes.view_as(q.values))


@EVERYTHING
@DTYPES
@pytest.mark.parametrize("element", ["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", ["tensor", "row"])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_fp8(name, dtype, element, kind, power_of_two):
    x = data(name, dtype)
    if name == "tiny" and power_of_two:
        pytest.skip("PowerOfTwo() has no floor of 1e-12")
    rule = PowerOfTwo() if power_of_two else ReciprocalAmax()
    q = quantize(x, QuantSpec(FORMATS[element], PerRow() if kind == "row" else PerTensor(), rule))
    codes, encode = theirs.fp8(x, element, kind, power_of_two)
    assert torch.equal(FORMATS[element].encode(q.values), codes)
    assert torch.equal(q.scale, 1 / encode.view_as(q.scale))


def test_all_bf16_patterns():
    y = theirs.every_bf16()
    finite = ~y.isnan()  # it makes code 2, 3 or 4 of a NaN
    codes = theirs.f32_to_f4_unpacked(y)
    assert torch.equal(E2M1.encode(E2M1.project(y))[finite], codes[finite])


def test_the_hadamard_transform():
    hadamard = pytest.importorskip("torchao.prototype.moe_training.nvfp4_training.hadamard_utils")  # after 0.17
    matrix = hadamard.get_rht_matrix(NVFP4_SIGNS, "cpu", torch.bfloat16, 16)
    assert torch.equal(Hadamard(16, signs=NVFP4_SIGNS).forward(torch.eye(16)), matrix.float())
