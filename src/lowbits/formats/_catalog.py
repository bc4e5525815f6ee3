# SPDX-License-Identifier: Apache-2.0
"""Name the formats that recipes use, one line each."""

from __future__ import annotations

from lowbits.formats._dynamic import DYNAMIC8, UDYNAMIC8
from lowbits.formats._format import Codebook, FloatFormat, Format, IntFormat

INT8 = IntFormat("int8", 8)
INT7 = IntFormat("int7", 7)
INT6 = IntFormat("int6", 6)
INT5 = IntFormat("int5", 5)
INT4 = IntFormat("int4", 4)
INT3 = IntFormat("int3", 3)
INT2 = IntFormat("int2", 2)
UINT8 = IntFormat("uint8", 8, signed=False)
UINT4 = IntFormat("uint4", 4, signed=False)
UINT2 = IntFormat("uint2", 2, signed=False)
UINT1 = IntFormat("uint1", 1, signed=False)
# Codes 1..255: for second moments, where a code 0 under a square root in a denominator is a step without bound.
UINT8_NO_ZERO = IntFormat("uint8_no_zero", 8, signed=False, lowest=False)
TERNARY = IntFormat("ternary", 2, lowest=False)
BINARY = Codebook("binary", (-1.0, 1.0))

# OCP 8-bit Floating Point Specification 1.0, tables 1 and 2; OCP Microscaling Formats 1.0, tables 1 to 7.
E4M3 = FloatFormat("e4m3", 4, 3, bias=7, top_codes_lost=1)
# For second moments, where a 0 under a square root in a denominator is a step without bound.
E4M3_NO_UNDERFLOW = FloatFormat("e4m3_no_underflow", 4, 3, bias=7, top_codes_lost=1, only_zero_is_zero=True)
E5M2 = FloatFormat("e5m2", 5, 2, bias=15, top_codes_lost=4)
E3M2 = FloatFormat("e3m2", 3, 2, bias=3)
E2M3 = FloatFormat("e2m3", 2, 3, bias=1)
E2M1 = FloatFormat("e2m1", 2, 1, bias=1)
E8M0 = FloatFormat("e8m0", 8, 0, bias=127, top_codes_lost=1, signed=False, subnormals=False)
BF16 = FloatFormat("bf16", 8, 7, bias=127, top_codes_lost=128)

# Dettmers et al. 2023, arXiv:2305.14314, appendix E: quantiles of N(0, 1), normalised to [-1, 1].
NF4 = Codebook(
    "nf4",
    (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
     -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
     0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # fmt: skip

# 4-bit optimizer states: the dynamic construction of three decades; sixteenths without 0 (Li et al. 2023,
# arXiv:2309.01507, sec. 4.1: a second moment of 0 is a step without bound).
DYNAMIC4 = Codebook(
    "dynamic4",
    (-0.8875, -0.6625, -0.4375, -0.2125, -0.0775, -0.0325, -0.0055, 0.0,
     0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 0.8875, 1.0),
)  # fmt: skip
ULINEAR4 = Codebook("ulinear4", tuple(k / 16 for k in range(1, 17)))

ALL: tuple[Format, ...] = (
    INT8, INT7, INT6, INT5, INT4, INT3, INT2, UINT8, UINT4, UINT2, UINT1, UINT8_NO_ZERO, TERNARY, BINARY,
    E4M3, E4M3_NO_UNDERFLOW, E5M2, E3M2, E2M3, E2M1, E8M0, BF16, NF4, DYNAMIC8, UDYNAMIC8, DYNAMIC4,
    ULINEAR4,
)  # fmt: skip
"""Every named format, in the order of the tables."""
