# SPDX-License-Identifier: Apache-2.0
"""Compiled C quantizes to int8 along both axes with the definition's bytes."""

from __future__ import annotations

import itertools
import math
import shutil

import pytest
import torch
from torch import Tensor, nn

from lowbits.formats import INT4, INT8, TERNARY
from lowbits.kernels import Coded, _rows_on_cpu, quantize_both
from lowbits.nn import convert_
from lowbits.quantizers import Amax, PerRow, PerTensor, PowerOfTwo, QuantSpec, ReciprocalAmax, quantize
from lowbits.recipes import named

RULES = (Amax(), Amax(1e-5), PowerOfTwo(), ReciprocalAmax())
SPECS = [QuantSpec(*of) for of in itertools.product((INT8, INT4, TERNARY), (PerRow(), PerTensor()), RULES)]
LAYOUTS = {
    "rows": lambda x: x,
    "columns": lambda x: x.t().contiguous().t(),
    "neither": lambda x: x.repeat(1, 2)[:, ::2],
}


@pytest.fixture(autouse=True)
def _by_c(monkeypatch: pytest.MonkeyPatch) -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    monkeypatch.setattr(_rows_on_cpu, "SMALLEST", 0)


def matrix(rows: int, columns: int, dtype: torch.dtype, value: float) -> Tensor:
    """Many magnitudes and a tie; `value` in some places, alone in a row and a column."""
    x = torch.randn(rows, columns) * 10 ** torch.randn(rows, columns)
    if rows > 8:
        x[7, :4], x[4, 8:20], x[6], x[:, 9] = torch.tensor([127.0, 0.5, 1.5, -2.5]), value, value, value
    return x.to(dtype)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_definitions_bytes(spec):
    shapes, values = ((70, 112), (130, 600), (1, 1)), (1.0, 0.0, math.inf, math.nan, 1e-40, 3e38)
    cases = itertools.product(shapes, LAYOUTS, (torch.bfloat16, torch.float32))
    for number, (shape, layout, dtype) in enumerate(cases):
        x = LAYOUTS[layout](matrix(*shape, dtype, values[number % len(values)]))
        for along_k, along_r in ((spec, spec), (spec, None), (None, spec)):
            made = quantize_both(x, along_k, along_r, None, None)
            for coded, of, asked in zip(made, (x, x.t()), (along_k, along_r), strict=True):
                assert (coded is None) == (asked is None)
                if coded is not None:
                    right = Coded.of(quantize(of, spec))
                    assert torch.equal(coded.codes, right.codes) and coded.length == right.length
                    assert torch.equal(coded.scale.nan_to_num(7.0), right.scale.nan_to_num(7.0))
                    assert coded.scale.shape == right.scale.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("row", "column"), [(True, True), (True, False), (False, True), (False, False)])
def test_sums_under_their_scales(row, column, dtype):
    sums = torch.randint(-(2**31), 2**31 - 1, (37, 80)).to(torch.int32)[:, :70]
    a, b = (10 ** torch.randn(n if each else 1, 1) for n, each in ((37, row), (70, column)))
    a.view(-1)[0], b.view(-1)[-1] = math.nan if row else 3e38, 1e30
    expected = (sums.float() * a * b.t()).to(dtype)
    got = _rows_on_cpu.scaled(sums, a, b, dtype)
    assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0)) and got.dtype == dtype


def test_it_is_c_that_ran_and_the_definition_where_there_is_no_compiler(monkeypatch):
    ran = []
    inner = _rows_on_cpu.quantize_rows
    monkeypatch.setattr(_rows_on_cpu, "quantize_rows", lambda *a: ran.append(1) or inner(*a))
    x, spec = torch.randn(40, 50), QuantSpec(INT8, PerRow())
    by_c = quantize_both(x, spec, spec, None, None)
    assert ran
    monkeypatch.setattr(_rows_on_cpu, "_functions", lambda: None)
    ran.clear()
    for a, b in zip(by_c, quantize_both(x, spec, spec, None, None), strict=True):
        assert torch.equal(a.codes, b.codes) and torch.equal(a.scale, b.scale)
    assert not ran


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, while it traces autograd functions
@pytest.mark.parametrize("threads", [1, 2])
def test_a_compiled_layer_gives_the_same_bits(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(48, 80))
        convert_(model, named("int8_rowwise"), verbose=False)
        x, g = torch.randn(70, 48, requires_grad=True), torch.randn(70, 80)
        results = []
        for run in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
            x.grad = model[0].weight.grad = None
            y = run(x)
            y.backward(g)
            results.append((y.detach(), x.grad, model[0].weight.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    finally:
        torch.set_num_threads(before)
