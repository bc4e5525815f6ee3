# SPDX-License-Identifier: Apache-2.0
"""Hold the kernels of rows and of their products to the definition, bit for bit; a program, since Triton's interpreter
is chosen before Triton is loaded:

    TRITON_INTERPRET=1 python -m tests.kernels.rows
    python -m tests.kernels.rows            # on CUDA
    python -m tests.kernels.rows 0 4        # the first of four parts
"""

from __future__ import annotations

import itertools
import sys
import warnings
from dataclasses import replace
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lowbits.kernels.blocks
import lowbits.kernels.gemm
import lowbits.kernels.rows  # noqa: F401  the interpreter's kernels are used where they are loaded
from lowbits.formats import E4M3, E5M2, INT4, INT8, TERNARY, UINT4
from lowbits.kernels import (
    Coded,
    _each,
    _row_operands,
    _rows,
    decode_operand,
    pack_operand,
    quantize_both,
    quantize_each,
    quantize_operand,
    scaled_mm,
    unpack_operand,
)
from lowbits.nn import Gemm, Grid, Recipe, Save, StepInit, convert_, quantize_parameter
from lowbits.quantizers import (
    Amax,
    PerColumn,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QuantSpec,
    ReciprocalAmax,
    quantize,
)
from lowbits.recipes import named

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = DEVICE == "cuda"  # where nothing is interpreted
RULES = (Amax(), Amax(1e-5), PowerOfTwo(), ReciprocalAmax())
SPECS = [
    QuantSpec(fmt, granularity, rule)
    for fmt, granularity, rule in itertools.product((INT8, E4M3, E5M2, INT4, TERNARY), (PerRow(), PerTensor()), RULES)
]
SPECS.append(QuantSpec(UINT4, PerRow()))  # which kernels leave to the definition
SPECS += [
    QuantSpec(fmt, granularity, rule)
    for fmt, granularity, rule in itertools.product((E4M3, E5M2), (PerGroup(128), PerTile(128, 128)), RULES)
]
SHAPES = [(70, 112, False), (40, 17, True), (140, 272, False)]
SHAPES += [(1000, 4096, True), (4096, 1008, False), (1, 1, False), (129, 257, False)] if FULL else []
VALUES = (None, 0.0, torch.inf, torch.nan, 1e-40, 3e38, 1e-12)


def matrix(rows: int, columns: int, transposed: bool, dtype: torch.dtype, value: float | None) -> Tensor:
    """Many magnitudes, ties, a row and a column of zeros; `value` in some places, alone in a row and a column."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(rows, columns, generator=generator)
    if rows > 8 and columns > 16:
        x[3], x[:, 5], x[7, :5] = 0.0, 0.0, torch.tensor([127.0, 0.5, 1.5, -2.5, -1e-12])
        if value is not None:
            x[4, 8:20], x[6], x[:, 9] = value, value, value
    x = x.to(dtype).to(DEVICE)
    return x.t().contiguous().t() if transposed else x


def differing(x: Tensor, along_k: QuantSpec | None, along_r: QuantSpec | None) -> dict[str, int]:
    """Count the bytes of codes and the scales that are not the definition's."""
    found: dict[str, int] = {}
    made = quantize_both(x, along_k, along_r, None, None)
    for name, coded, spec, of in zip("kr", made, (along_k, along_r), (x, x.t()), strict=True):
        if spec is None or coded is None:
            assert spec is None and coded is None
            continue
        right = Coded.of(quantize(of, spec))
        assert coded.codes.shape == right.codes.shape and coded.codes.dtype == right.codes.dtype
        assert coded.scale.shape == right.scale.shape and coded.length == right.length
        fine = spread(right.scale.isfinite(), right.codes)  # codes under a NaN scale decode to NaN whatever they are
        codes = (coded.codes.view(torch.uint8) != right.codes.view(torch.uint8)) & fine
        scales = coded.scale.nan_to_num(7.0) != right.scale.nan_to_num(7.0)
        wrong = {f"{name}.codes": int(codes.sum()), f"{name}.scale": int(scales.sum())}
        found |= {what: count for what, count in wrong.items() if count}
    return found


def spread(of_scales: Tensor, codes: Tensor) -> Tensor:
    """What is known of scales, for every code."""
    if of_scales.shape[1] == 1 and of_scales.shape[0] in (1, codes.shape[0]):
        return of_scales.expand(codes.shape)
    rows = 1 if of_scales.shape[0] == codes.shape[0] else 128
    return of_scales.repeat_interleave(128, 1).repeat_interleave(rows, 0)[: codes.shape[0], : codes.shape[1]]


def operands() -> None:
    """What simulated GEMMs multiply, the bytes that wait for backward, and what is decoded of them: bit for bit."""
    sharing = (PerRow(), PerTensor(), PerColumn(), PerGroup(16))
    specs = [QuantSpec(*parts) for parts in itertools.product((INT8, E4M3, E5M2, INT4), sharing, RULES)]
    noise = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for number, spec in enumerate(specs):
        for rows, columns, transposed in SHAPES if FULL else SHAPES[number % 3 :: 3]:
            for value in VALUES if FULL else VALUES[number % len(VALUES) :: len(VALUES)]:
                dtype = torch.float32 if number % 5 < 2 or value == 1e-40 else torch.bfloat16
                x = matrix(rows, columns, transposed, dtype, value)
                made = quantize_operand(x, spec, noise, 1, dtype, codes=spec.format.bits == 8)
                if made is None:  # no whole groups, or those that `lowbits.kernels.blocks` knows
                    known = isinstance(spec.scale, PowerOfTwo) and spec.format in (E4M3, E5M2)
                    assert isinstance(spec.granularity, PerGroup) and (columns % 16 or known), str(spec)
                    continue
                q = quantize(x, spec)
                inner, outer = q.factors()
                pairs = {"inner": (made.inner, inner.to(dtype)), "outer": (made.outer, outer)}
                if made.packed is not None:
                    stored = q.pack()
                    pairs |= {"codes": (made.packed.codes, stored.codes), "scale": (made.packed.scale, stored.scale)}
                    alone = pack_operand(x, spec, noise, 1)
                    assert alone is not None
                    pairs |= {"codes alone": (alone.codes, stored.codes), "their scale": (alone.scale, stored.scale)}
                    again = unpack_operand(stored, dtype)
                    numbers = decode_operand(stored, torch.float32, whole=True)
                    assert again is not None and numbers is not None and numbers.outer is None
                    # Codes have no -0 where formats have none; adding 0 makes it 0.
                    pairs["unpacked"] = again.inner + 0.0, stored.unpack().factors()[0].to(dtype) + 0.0
                    pairs["numbers"] = numbers.inner + 0.0, stored.unpack().dequantize() + 0.0
                wrong = [name for name, (a, b) in pairs.items() if not same_bits(a, b)]
                if wrong or (not isinstance(spec.granularity, PerGroup) and made.inner.stride() != inner.stride()):
                    print(f"operand, {spec}; {tuple(x.shape)} {dtype} with {value}: differ {wrong}")


def rows_that_no_grid_holds() -> None:
    """A grid's second axis has 65535 places; what is longer is left to the definition, whichever way it lies."""
    most, other = _row_operands._MOST_ROWS, 16
    for granularity in (PerRow(), PerTensor(), PerColumn(), PerGroup(other)):
        for rows, known in ((most, True), (most + 1, False)):
            shape = (other, rows) if isinstance(granularity, PerColumn) else (rows, other)
            plan = _row_operands._plan_for(QuantSpec(INT8, granularity), shape, torch.device(DEVICE))
            if (plan is not None) != known:
                print(f"{granularity}, {shape}: {'left out' if known else 'taken'}: differ")


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """NaN is NaN whatever its bits; -0 is not 0."""
    if a is None or b is None:
        return a is b
    if a.is_floating_point():
        same = (a.nan_to_num(7.0) == b.nan_to_num(7.0)) & ((a.signbit() == b.signbit()) | a.isnan())
        return a.shape == b.shape and a.dtype == b.dtype and bool(same.all() and torch.equal(a.isnan(), b.isnan()))
    return a.dtype == b.dtype and torch.equal(a, b)


def products() -> None:
    """Integer codes through the kernel, and in 64 bits."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(40, 33, 48), (70, 130, 176), (1, 1, 16)] + ([(1000, 3000, 4096), (4096, 4096, 2048)] if FULL else [])
    for (m, n, k), (row, column) in itertools.product(shapes, itertools.product((True, False), repeat=2)):
        a, b = (torch.randint(-127, 128, (r, k), generator=generator).to(torch.int8) for r in (m, n))
        scale_a, scale_b = (torch.rand(r if each else 1, 1, generator=generator) for r, each in ((m, row), (n, column)))
        # float64 holds every one of these sums; on a GPU integers of 64 bits have no GEMM.
        sums = (a.to(DEVICE).double() @ b.to(DEVICE).double().t()).float()
        parts = [t.to(DEVICE) for t in (a, b, scale_a, scale_b)]
        left, right = (Coded(parts[i], parts[i + 2], SPECS[0], k) for i in (0, 1))
        got = scaled_mm(left, right, torch.float32)
        if not torch.equal(got, sums * parts[2] * parts[3].t()):
            print(f"product {m}x{n}x{k}, scales of rows {row} and columns {column}: differ")


def products_of_blocks() -> None:
    """FP8 codes with a scale for 128 elements of the contraction, beside float64."""
    recipe = named("fp8_block")
    for m, n, k in [(40, 48, 256), (130, 160, 272)] + (
        [(1000, 3000, 4096), (512, 512, 16384), (256, 4096, 1024)] if FULL else []
    ):
        x, w = matrix(m, k, False, torch.bfloat16, None), matrix(n, k, True, torch.bfloat16, None)
        for lhs, rhs in (recipe.fprop, recipe.wgrad):
            (a, _), (b, _) = quantize_both(x, lhs, None, None, None), quantize_both(w, rhs, None, None, None)
            assert a is not None and b is not None and lhs is not None and rhs is not None
            for made, right in ((a, Coded.of(quantize(x, lhs))), (b, Coded.of(quantize(w, rhs)))):
                if not torch.equal(made.codes.view(torch.uint8), right.codes.view(torch.uint8)):
                    print(f"codes of blocks {m}x{n}x{k}: differ")
                if not torch.equal(made.scale, right.scale) or not torch.equal(made.dequantize(), right.dequantize()):
                    print(f"scales of blocks {m}x{n}x{k}: differ")
            numbers = [q.dequantize().double() for q in (a, b)]
            exact, magnitude = numbers[0] @ numbers[1].t(), numbers[0].abs() @ numbers[1].abs().t()
            # Units of Hopper sum 128 products with 14 bits or more, float32 sums the blocks.
            bound = (128 * 2.0**-13 if FULL else 128 * 2.0**-24) + (k // 128 + 3) * 2.0**-24
            rounding = 2.0**-8 if FULL else 2.0**-7  # the interpreter cuts off
            for dtype, last in ((torch.float32, 0.0), (torch.bfloat16, rounding)):  # on a GPU cuBLAS's, too
                if ((scaled_mm(a, b, dtype) - exact).abs() > bound * magnitude + last * exact.abs()).any():
                    print(f"product of blocks {m}x{n}x{k}, {dtype}: differ")


def many() -> None:
    """All weights in one launch, and one after the other."""
    shapes = [(64, 48), (16, 16), (144, 272), (128, 128)] + ([(4096, 1024), (1024, 4096)] if FULL else [])
    generator = torch.Generator().manual_seed(4)
    for along_k, along_r in ((SPECS[0], SPECS[0]), (SPECS[4], SPECS[1]), (SPECS[11], SPECS[8]), (SPECS[-2], SPECS[-6])):
        for dtype in (torch.bfloat16, torch.float32):
            xs = [torch.randn(shape, generator=generator).to(dtype).to(DEVICE) for shape in shapes]
            with patch.object(_each, "quantize_both", side_effect=AssertionError("not at once")):
                found = quantize_each(xs, along_k, along_r)
            for x, made in zip(xs, found, strict=True):
                for a, b in zip(made, quantize_both(x, along_k, along_r, None, None), strict=True):
                    assert a is not None and b is not None and a.codes.dtype == b.codes.dtype
                    fine = torch.equal(a.codes.view(torch.uint8), b.codes.view(torch.uint8))
                    fine = fine and torch.equal(a.scale, b.scale) and a.scale.stride() == b.scale.stride()
                    if not fine or a.scale.data_ptr() % 16:  # as cuBLAS wants them
                        print(f"many, {along_k}; {along_r}; {tuple(x.shape)} {dtype}: differ")


def many_of_which_one_does_not_fit() -> None:
    """Sides that are no multiples of 16, another dtype: quantized alone, in their place."""
    xs = [torch.randn(*shape, device=DEVICE) for shape in ((32, 48), (50, 64), (64, 32))] + [torch.randn(16, 16).half()]
    xs[3] = xs[3].to(DEVICE)
    with patch.object(_each, "quantize_both", wraps=quantize_both) as alone:
        found = quantize_each(xs, SPECS[0], SPECS[0])
    for x, made in zip(xs, found, strict=True):
        for a, b in zip(made, quantize_both(x, SPECS[0], SPECS[0], None, None), strict=True):
            if a is None or b is None or not torch.equal(a.codes, b.codes) or not torch.equal(a.scale, b.scale):
                print(f"many, of which one does not fit, {tuple(x.shape)}: differ")
    if alone.call_count != 2 or quantize_each([], SPECS[0], SPECS[0]):
        print(f"{alone.call_count} of four alone: differ")


def layers() -> None:
    """A layer that runs the kernels, and one that makes its codes by the definition: output and gradients."""
    for name in ("int8_rowwise", "fp8_rowwise", "fp8_tensorwise", "fp8_block") if FULL else ("int8_rowwise",):
        results = []
        for fast in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(48, 80)).to(DEVICE)
            convert_(model, named(name), verbose=False)
            x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()
            with (
                torch.autocast(DEVICE, torch.bfloat16, enabled=FULL),
                patch.object(_rows, "launches", return_value=fast),
            ):
                y = model(x)
                y.backward(torch.randn(64, 80, generator=torch.Generator().manual_seed(3)).to(DEVICE).to(y.dtype))
            results.append((y.detach(), x.grad, model[0].weight.grad))
        fine = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        print(f"layer, {name}: {'equal' if fine else 'differ'}")


def simulated() -> None:
    """Layers that decode their operands, by kernels and by the definition: output, gradients, what waits for them."""
    names = "w8a8_faithful", "w8a8g8_faithful", "w8a8g8", "a8_column", "w4a4", "bitnet_b158"
    recipes = {name: named(name) for name in names}
    row, scaled_sums = Gemm(SPECS[0], SPECS[0]), QuantSpec(E4M3, PerRow(), ReciprocalAmax())
    recipes["codes quantized anew"] = replace(recipes["w8a8_faithful"], dgrad=row, wgrad=row)
    recipes["codes for wgrad"] = Recipe(fprop=row, wgrad=Gemm(None, SPECS[0]), save=Save.OPERANDS)
    four = QuantSpec(INT4, PerRow())  # which no kernel stores
    recipes["codes of 4 bits for wgrad"] = Recipe(fprop=row, wgrad=Gemm(None, four), save=Save.OPERANDS)
    recipes["scales of sums"] = Recipe(fprop=Gemm(scaled_sums, scaled_sums), save=Save.QUANTIZED)
    recipes["scales of wgrad's sums"] = Recipe(wgrad=Gemm(scaled_sums, scaled_sums), save=Save.OPERANDS)
    for name, recipe in recipes.items():
        results, saved = [], ([], [])
        for fast in (True, False):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(48, 80)).to(DEVICE)
            convert_(model, recipe, verbose=False)
            x = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).to(DEVICE).requires_grad_()

            def keep(t: Tensor, kept: list[Tensor] = saved[fast]) -> Tensor:
                kept.append(t)
                return t

            with (
                patch.object(_row_operands, "launches", return_value=fast),
                patch.object(_row_operands, "launch", wraps=_row_operands.launch) as launch,
                torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
                torch.autocast(DEVICE, torch.bfloat16),
            ):
                y = model(x)
                y.backward(torch.randn(64, 80, generator=torch.Generator().manual_seed(3)).to(DEVICE).to(y.dtype))
                assert bool(launch.call_count) == fast
            results.append((y.detach(), x.grad, model[0].weight.grad))
        pairs = [*zip(*results, strict=True), *zip(*saved, strict=True)]
        print(f"simulated layer, {name}: {'equal' if all(torch.equal(a, b) for a, b in pairs) else 'differ'}")
    stored = quantize_parameter(torch.randn(64, 48, device=DEVICE), Grid.of(8), StepInit())
    if quantize_operand(stored, SPECS[0], torch.zeros(3), 1, torch.bfloat16) is not None:
        print("a parameter of codes, read as if it were numbers: differ")


def operators() -> None:
    """What torch demands of operators, and that layers which share an input share its codes in a compiled graph."""
    x = torch.randn(40, 48, device=DEVICE)
    text = _rows._text(SPECS[0], SPECS[0])
    torch.library.opcheck(torch.ops.lowbits.quantize_rows.default, (x, text))
    codes = torch.ones(32, 48, dtype=torch.int8, device=DEVICE)
    scale = torch.ones(32, 1, device=DEVICE)
    torch.library.opcheck(torch.ops.lowbits.matmul_codes.default, (codes, codes, scale, scale, torch.bfloat16))
    model = nn.ModuleList([nn.Linear(48, 32) for _ in range(3)]).to(DEVICE)
    convert_(model, named("int8_rowwise"), verbose=False)
    compiled = torch.compile(lambda x: sum(layer(x) for layer in model), backend="aot_eager_decomp_partition")
    with patch.object(_rows, "_launch", wraps=_rows._launch) as launch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            y = compiled(x.requires_grad_())
        y.sum().backward()
    # X and G once for all three, and three weights.
    print(f"{launch.call_count} launches for three layers: {'equal' if launch.call_count == 5 else 'differ'}")


def main(part: int = 0, parts: int = 1) -> None:
    cases, asked = 0, enumerate(itertools.product(SPECS, SHAPES))
    # Parts by the spec along k, since kernels are compiled for specs.
    for number, (along_k, (rows, columns, transposed)) in asked:
        if number // len(SHAPES) % parts != part:
            continue
        along_r = SPECS[(7 * number + 3) % len(SPECS)]
        for dtype in (torch.bfloat16, torch.float32) if FULL else ((torch.bfloat16, torch.float32)[number % 2],):
            for value in VALUES if FULL else VALUES[number % 2 :: 2][number % 3 :: 3]:
                if value == 1e-40 and not FULL:
                    dtype = torch.float32  # noqa: PLW2901, the interpreter reads bfloat16's subnormals as 0
                x, cases = matrix(rows, columns, transposed, dtype, value), cases + 1
                found = differing(x, along_k, along_r)
                if found:
                    print(f"{along_k}; {along_r}; {tuple(x.shape)} {dtype} with {value}: differ {found}")
                if cases % 50 == 0:  # what a run that is cut off has shown
                    print(f"{cases} cases so far", flush=True)
    if part == 0:
        rest()
    print(f"{cases} cases")
    if not cases:
        sys.exit("no case was covered")


def rest() -> None:
    """One copy alone, and what is made of codes."""
    x = matrix(70, 112, False, torch.bfloat16, None)
    for pair in ((SPECS[0], None), (None, SPECS[1])):
        if found := differing(x, *pair):
            print(f"{pair}: differ {found}")
    products()
    products_of_blocks()
    many()
    many_of_which_one_does_not_fit()
    operands()
    rows_that_no_grid_holds()
    layers()
    simulated()
    operators()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
