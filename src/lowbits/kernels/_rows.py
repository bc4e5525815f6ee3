# SPDX-License-Identifier: Apache-2.0
"""Quantize a matrix for both GEMMs that contract it: one read for the scales, one for both copies.

A tensor enters two of a layer's three GEMMs, each of which contracts another of its axes, and units want the
contracted axis to lie together in memory. So X [tokens, in] becomes codes [tokens, in] for fprop and codes
[in, tokens] for wgrad, each with the scales of its rows. `lowbits.kernels.rows` does this for the rules that it knows,
and `rows.c` on a CPU to int8; the rest takes the definition, which gives the same bytes.
"""

from __future__ import annotations

import ast
import math
import struct
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbits.formats import E4M3, E5M2, FloatFormat, IntFormat
from lowbits.kernels import _rows_on_cpu
from lowbits.kernels._coded import ALIGNED, BLOCK, FLOAT8, Coded, why_not_coded
from lowbits.kernels._launch import launch
from lowbits.kernels._operators import operator, remembered
from lowbits.kernels._units import kernels, launches
from lowbits.quantizers import (
    Amax,
    Granularity,
    PerGroup,
    PerRow,
    PerTensor,
    PerTile,
    PowerOfTwo,
    QuantSpec,
    ReciprocalAmax,
    Rounding,
    ScaleRule,
    quantize,
)

# Rows and columns that a program works on, and its warps.
_TILE, _BLOCKS, _BLOCKED = ((64, 64), 4), ((BLOCK, BLOCK), 4), ("GROUP", "TILE")
_AMAX = (64, 128), 8, 4  # and how many tiles it walks down, before the warps
_NAMED = {"AMAX": Amax, "POWER_OF_TWO": PowerOfTwo, "RECIPROCAL": ReciprocalAmax}
_RULES: dict[type[ScaleRule], str] = {kind: name for name, kind in _NAMED.items()}


class _Axis(NamedTuple):
    """How to quantize along an axis, in literals: a compiler takes those for constants, and an operator's text can
    hold them."""

    of: str
    rule: str
    floor: str
    format: tuple[str, int, bool, bool] | str  # the arguments of an `IntFormat`, or the name of an FP8


class Made(NamedTuple):
    """What the kernels are compiled for, along one of the axes.

    Args:
        spec: how it is quantized, None for not at all.
        of: what shares a scale: ROW, TENSOR, GROUP, TILE; NONE for no copy.
        dtype: of the codes.
        constants: by name, see `lowbits.kernels.rows`.
    """

    spec: QuantSpec | None
    of: str
    dtype: torch.dtype
    constants: dict[str, Any]


@remembered
def _text(along_k: QuantSpec | None, along_r: QuantSpec | None) -> str | None:
    """Both axes; None where the kernels do not know one of them."""
    first, second = _axis(along_k), _axis(along_r)
    unknown = (first is None and along_k is not None) or (second is None and along_r is not None)
    # Tuples without names, since their literals are read again.
    return None if unknown else repr((first and tuple(first), second and tuple(second)))


def _axis(spec: QuantSpec | None) -> _Axis | None:
    if spec is None or type(spec.scale) not in _RULES:
        return None
    of = _shared_by(spec.granularity)
    if of is None or spec.rounding is not Rounding.NEAREST or spec.transform is not None:
        return None
    assert isinstance(spec.scale, Amax | PowerOfTwo | ReciprocalAmax)
    fmt, kind = spec.format, (of, _RULES[type(spec.scale)], spec.floor_told)
    if isinstance(fmt, IntFormat):
        return _Axis(*kind, (fmt.name, fmt.bits, fmt.signed, fmt.lowest))
    return _Axis(*kind, fmt.name) if fmt in (E4M3, E5M2) else None


_GRANULARITIES = {"ROW": PerRow(), "TENSOR": PerTensor(), "GROUP": PerGroup(BLOCK), "TILE": PerTile(BLOCK, BLOCK)}


def _shared_by(granularity: Granularity) -> str | None:
    return next((name for name, known in _GRANULARITIES.items() if granularity == known), None)


@torch.compiler.assume_constant_result
def _runs(text: str, device: torch.device) -> bool:
    """Whether a device has kernels for it."""
    made = _from_text(text)
    if made is None:
        return False
    specs = [axis.spec for axis in made]
    return launches("rows", device) or (device.type == "cpu" and _rows_on_cpu.covered(*specs))


def made_of(along_k: QuantSpec | None, along_r: QuantSpec | None) -> tuple[Made, Made] | None:
    """Return what the kernels are compiled for; None where they do not know one of the two.

    Args:
        along_k: as in `quantize_both`.
        along_r: likewise.
    """
    text = _text(along_k, along_r)
    return None if text is None else _from_text(text)


@cache
def _from_text(text: str) -> tuple[Made, Made] | None:
    first, second = (_made(name, axis) for name, axis in zip("KR", ast.literal_eval(text), strict=True))
    return None if first is None or second is None else (first, second)


def _made(name: str, found: tuple[Any, ...] | None) -> Made | None:
    """None where the kernels do not quantize so."""
    if found is None:
        return Made(None, "NONE", torch.uint8, _named(name, 0.0, 0, 0, 0.0, 0.0, "AMAX"))
    axis, floor, top = _Axis(*found), _float32(float(found[2])), 0.0
    rule = _NAMED[axis.rule](float(axis.floor))
    fmt = IntFormat(*axis.format) if isinstance(axis.format, tuple) else {"e4m3": E4M3, "e5m2": E5M2}[axis.format]
    spec = QuantSpec(fmt, _GRANULARITIES[axis.of], rule)
    # Nothing but the sign of an unsigned grid leaves it: the scale is that of the largest magnitude.
    if not fmt.signed or not fmt.has_zero or why_not_coded(spec) is not None:
        return None
    if isinstance(rule, ReciprocalAmax):
        if not rule.floor > 0:
            return None
        # The definition compares in float64: the first float32 that is not below.
        floor = floor if floor >= rule.floor else _next_float32(floor)
        top = _float32(fmt.max / rule.floor)
    mantissa, lowest = (fmt.mantissa_bits, fmt.min_normal_exponent) if isinstance(fmt, FloatFormat) else (0, 0)
    dtype = torch.int8 if isinstance(fmt, IntFormat) else FLOAT8[fmt]
    return Made(spec, axis.of, dtype, _named(name, fmt.max, mantissa, lowest, floor, top, axis.rule))


def _named(name: str, *values: float | str) -> dict[str, Any]:
    return {f"{key}_{name}": value for key, value in zip(_CONSTANTS, values, strict=True)}


_CONSTANTS = "HIGH", "M", "LOWEST", "FLOOR", "TOP", "RULE"


def _float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def _next_float32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("I", struct.unpack("I", struct.pack("f", x))[0] + 1))[0])


def quantize_both(
    x: Tensor, along_k: QuantSpec | None, along_r: QuantSpec | None, noise_k: Tensor | None, noise_r: Tensor | None
) -> tuple[Coded | None, Coded | None]:
    """Quantize a matrix along its columns, and its transpose along its rows.

    Args:
        x: [R, K], floating point, any strides.
        along_k: how a GEMM that contracts K wants x [R, K]; None for not at all.
        along_r: how one that contracts R wants x.T [K, R]; None for not at all.
        noise_k: for stochastic rounding, see `quantize`.
        noise_r: likewise, of the transpose.
    Returns:
        codes [R, K] and codes [K, R], or None where nothing was asked for.
    """
    compiles = torch.compiler.is_compiling()
    text = _text(along_k, along_r)
    few = x.device.type == "cpu" and x.numel() < _rows_on_cpu.SMALLEST and not launches("rows", x.device)
    readable = x.numel() > 0 and x.dtype in (torch.bfloat16, torch.float32) and not few
    if text is None or not readable or not _runs(text, x.device):
        first = None if along_k is None else Coded.of(quantize(x, along_k, noise_k))
        return first, None if along_r is None else Coded.of(quantize(x.t(), along_r, noise_r))
    # Through torch's dispatcher where a compiler has to see an operator; it costs as much as the launches.
    codes_k, scale_k, codes_r, scale_r = (_quantize_rows_op if compiles else _quantize_rows)(x, text)
    first = None if along_k is None else Coded(codes_k, scale_k, along_k, x.shape[1])
    return first, None if along_r is None else Coded(codes_r, scale_r, along_r, x.shape[0])


def _results(x: Tensor, made: tuple[Made, Made]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found: list[Tensor] = []
    for axis, (rows, length) in zip(made, (x.shape, x.shape[::-1]), strict=True):
        used = axis.spec is not None
        padded = math.ceil(length / ALIGNED) * ALIGNED
        found.append(x.new_empty((rows, padded) if used else (0,), dtype=axis.dtype))
        found.append(_scale(x, axis.of, rows, length))
    return found[0], found[1], found[2], found[3]


def _scale(x: Tensor, of: str, rows: int, length: int) -> Tensor:
    shape = scale_shape(of, rows, length)
    if of == "GROUP":  # those of one block lie together
        return x.new_empty(shape[::-1], dtype=torch.float32).t()
    return x.new_empty(shape, dtype=torch.float32)


def scale_shape(of: str, rows: int, length: int) -> tuple[int, int]:
    """Return the shape of a copy's scales.

    Args:
        of: what shares one, see `Made`.
        rows: of the copy.
        length: of its rows.
    """
    blocks = -(-length // BLOCK)
    shapes = {"GROUP": (rows, blocks), "TILE": (-(-rows // BLOCK), blocks), "NONE": (0, 1)}
    return shapes.get(of) or (magnitudes(of, rows), 1)


def magnitudes(of: str, rows: int) -> int:
    """Return how many largest magnitudes a launch of its own finds.

    Args:
        of: what shares one, see `Made`.
        rows: of the copy.
    """
    return {"ROW": rows, "TENSOR": 1}.get(of, 0)


def _quantize_rows(x: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _from_text(text)
    assert made is not None
    results = _results(x, made)
    if launches("rows", x.device):
        _launch(x, text, made, results)
    else:
        _rows_on_cpu.quantize_rows(x, made[0].spec, made[1].spec, results)
    return results


def _launch(x: Tensor, text: str, made: tuple[Made, Made], results: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    k, (of_k, of_r) = kernels("rows"), (axis.of for axis in made)
    assert k is not None
    (rows, columns), (stride_r, stride_k) = x.shape, x.stride()
    largest = launch_amax(x, of_k, of_r)
    largest = results[1] if largest is None else largest  # nothing reads it
    # Each copy is filled up with zeros along what a GEMM contracts.
    padded_k = columns if made[0].spec is None else results[0].shape[1]
    padded_r = rows if made[1].spec is None else results[2].shape[1]
    (height, width), warps = tile_for(of_k, of_r)
    launch(
        k.quantize, (-(-padded_k // width), -(-padded_r // height), 1),
        (x, largest, *results, rows, columns, padded_k, padded_r, stride_r, stride_k),
        lambda: {"OF_K": of_k, "OF_R": of_r, **made[0].constants, **made[1].constants, "BR": height, "BK": width,
                 "num_warps": warps, "enable_fp_fusion": False}, text, x.device,
    )  # fmt: skip


def launch_amax(x: Tensor, of_k: str, of_r: str) -> Tensor | None:
    """Return the bits of the largest magnitudes of a matrix, those of rows first; None where blocks have their own.

    Args:
        x: [R, K], any strides.
        of_k: what shares a scale along k, see `Made`.
        of_r: likewise along r.
    """
    k, (rows, columns) = kernels("rows"), x.shape
    count = magnitudes(of_k, rows) + magnitudes(of_r, columns)
    if not count:
        return None
    assert k is not None
    largest = torch.zeros(count, dtype=torch.int32, device=x.device)
    (br, bk), steps, warps = _AMAX
    launch(
        k.amax, (-(-columns // bk), -(-rows // (br * steps)), 1), (x, largest, rows, columns, *x.stride()),
        lambda: {"OF_K": of_k, "OF_R": of_r, "BR": br, "BK": bk, "STEPS": steps, "num_warps": warps},
        (of_k, of_r), x.device,
    )  # fmt: skip
    return largest


def tile_for(of_k: str, of_r: str) -> tuple[tuple[int, int], int]:
    """Return rows and columns that a program works on, and its warps.

    Args:
        of_k: what shares a scale along k, see `Made`.
        of_r: likewise along r.
    """
    return _BLOCKS if of_k in _BLOCKED or of_r in _BLOCKED else _TILE


# An operator takes no tuples: what was compiled for a plan is found by its text.
def _shapes(x: Tensor, text: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = _from_text(text)
    assert made is not None
    return _results(x, made)


_quantize_rows_op = operator(_quantize_rows, _shapes)
