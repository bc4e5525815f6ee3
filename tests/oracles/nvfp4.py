# SPDX-License-Identifier: Apache-2.0
"""NVFP4 from the papers' and the reference codes' words, in numpy (arXiv:2509.25149, section 4 and appendix C).

Every operation that the references do in float32 is one numpy operation on float32 arrays, which rounds once. What
decides a rounding (midpoints, fractions) is float64, where it is exact: no format here has more than 24 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.oracles.number_formats import float_grid

E2M1 = np.array([float(v) for v in float_grid(2, 1, 1, 6)])
E4M3 = np.array([float(v) for v in float_grid(4, 3, 7, 448)])
LARGEST = np.finfo(np.float32).max
TE_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


def f32(x: object) -> np.ndarray:
    return np.asarray(x).astype(np.float32)


def bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, ties to even, as float32."""
    bits = f32(x).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return np.where(np.isnan(x), np.float32(np.nan), rounded.astype(np.uint32).view(np.float32))


def nearest_code(y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the grid point nearest to |y|: the number of midpoints below, and the even index on a midpoint."""
    midpoints = (grid[1:] + grid[:-1]) / 2
    with np.errstate(invalid="ignore"):  # of signalling NaNs
        magnitude = np.abs(y.astype(np.float64))
    below = np.searchsorted(midpoints, magnitude, side="left")
    return below + ((below % 2 == 1) & np.isin(magnitude, midpoints))


def code_above(y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Index of the smallest grid point that is not below y >= 0; the last one where there is none."""
    return np.minimum(np.searchsorted(grid, y.astype(np.float64), side="left"), len(grid) - 1)


@dataclass
class Encoded:
    """values: E2M1 numbers in x's shape; scales: E4M3 numbers, one a block; outer: one float32."""

    values: np.ndarray
    scales: np.ndarray
    outer: np.float32
    block: tuple[int, int]

    def scale_bytes(self) -> np.ndarray:
        return np.where(np.isnan(self.scales), 0x7F, nearest_code(self.scales, E4M3)).astype(np.uint8)

    def of_elements(self) -> np.ndarray:
        """The block scale of every element."""
        rows, columns = self.block
        spread = self.scales.repeat(rows, 0).repeat(columns, 1)
        return spread[: self.values.shape[0], : self.values.shape[1]]

    def decoded(self) -> np.ndarray:
        """value * scale is exact in float32, so this rounds once."""
        return f32(self.values) * self.of_elements() * self.outer


def global_scales(x: np.ndarray, power_of_two: bool = False) -> tuple[np.float32, np.float32]:
    """The encode scale 2688 / amax, with its limits, and the decode scale."""
    with np.errstate(divide="ignore", over="ignore"):
        encode = np.minimum(np.float32(2688) / np.abs(x).max(), LARGEST)
    if encode == 0 or np.abs(x).max() == 0:
        encode = np.float32(1)
    if power_of_two and np.isfinite(encode):
        encode = np.float32(2.0 ** (np.frexp(encode)[1] - 1))
    return encode, np.float32(1) / encode


def block_amax(x: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """The largest magnitude of every block; what is missing in the last ones is zero."""
    rows, columns = block
    full = np.pad(np.abs(x), ((0, -x.shape[0] % rows), (0, -x.shape[1] % columns)))
    return np.array(
        [
            [full[r : r + rows, c : c + columns].max() for c in range(0, full.shape[1], columns)]
            for r in range(0, full.shape[0], rows)
        ],
        dtype=np.float32,
    )


def quantize(
    x: np.ndarray,
    block: tuple[int, int] = (1, 16),
    order: str = "te",
    power_of_two: bool = False,
    up: bool = False,
    rounded=None,
) -> Encoded:
    """Quantize a matrix.

    `order`: "te" (TransformerEngine's kernels), "paper" (the text of arXiv:2509.25149), "ao_inference" (torchao's
    `nvfp4_quantize`). `up`: block scales are rounded up. `rounded`: y in [-6, 6] to E2M1, nearest when None.
    """
    x = f32(x)
    amax = block_amax(x, block)
    with np.errstate(all="ignore"):
        if order == "ao_inference":
            outer = np.abs(x).max() / np.float32(2688)
            target = np.clip((amax / np.float32(6)) / outer, np.float32(2.0**-6), np.float32(448))
            scales = _e4m3(target, up)
            factor = (np.float32(1) / outer) / scales
        else:
            encode, outer = global_scales(x, power_of_two)
            sixth = np.float32(1) / np.float32(6)
            target = amax * (encode * sixth) if order == "te" else (amax / np.float32(6)) * encode
            scales = _e4m3(np.minimum(target, np.float32(448)), up)
            factor = np.minimum(np.float32(1) / (scales * outer), LARGEST)
        result = Encoded(x, scales, outer, block)
        y = np.clip(x * Encoded(x, factor, outer, block).of_elements(), np.float32(-6), np.float32(6))
    result.values = to_e2m1(y) if rounded is None else rounded(y)
    return result


def _e4m3(x: np.ndarray, up: bool) -> np.ndarray:
    code = code_above(x, E4M3) if up else nearest_code(x, E4M3)
    return np.where(np.isnan(x), np.float32(np.nan), f32(E4M3[np.minimum(code, len(E4M3) - 1)]))


def to_e2m1(y: np.ndarray) -> np.ndarray:
    """The nearest E2M1 number with y's sign; NaN stays."""
    return np.where(np.isnan(y), np.nan, np.copysign(E2M1[nearest_code(y, E2M1)], np.nan_to_num(y)))


def stochastic(y: np.ndarray, noise: np.ndarray, grid: np.ndarray = E2M1) -> np.ndarray:
    """floor(fraction + noise), section 2.1's form: the upper neighbour if the noise reaches 1 - fraction."""
    magnitude = np.minimum(np.abs(y.astype(np.float64)), grid[-1])
    lower = np.minimum(np.searchsorted(grid, magnitude, side="right") - 1, len(grid) - 2)
    fraction = (magnitude - grid[lower]) / (grid[lower + 1] - grid[lower])
    return np.copysign(grid[lower + (fraction + noise >= 1)], y)


def pack(values: np.ndarray) -> np.ndarray:
    """Two codes a byte, the even column in the low nibble; no zero has a sign."""
    code = nearest_code(values, E2M1) + 8 * (values < 0)
    return (code[:, ::2] + 16 * code[:, 1::2]).astype(np.uint8)


def without_signed_zero(packed: np.ndarray) -> np.ndarray:
    """The same bytes with code 8 (minus zero) read as code 0."""
    low, high = packed & 15, packed >> 4
    low, high = np.where(low == 8, 0, low), np.where(high == 8, 0, high)
    return (low + 16 * high).astype(np.uint8)


def hadamard(size: int, signs: tuple[int, ...] | None = None) -> np.ndarray:
    """diag(signs) times Sylvester's matrix, over sqrt(size); float64."""
    row, column = np.arange(size)[:, None], np.arange(size)[None]
    odd = np.array([[bin(v).count("1") % 2 for v in line] for line in (row & column)])
    matrix = (1.0 - 2.0 * odd) / np.sqrt(size)
    return matrix if signs is None else np.array(signs, dtype=np.float64)[:, None] * matrix


def rotate(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Rotate every `size` consecutive elements of the rows; exact in float64 up to its own rounding."""
    size = len(matrix)
    full = np.pad(x.astype(np.float64), ((0, 0), (0, -x.shape[1] % size)))
    return (full.reshape(len(x), -1, size) @ matrix).reshape(len(x), -1)


def rotate_as_te(x: np.ndarray) -> np.ndarray:
    """TransformerEngine's transform of a transposed operand: sums in float32, the result rounded to bfloat16."""
    return bf16(f32(rotate(x, hadamard(16, TE_SIGNS))))


def blockwise_product(a: Encoded, b: Encoded) -> np.ndarray:
    """a b^T as tensor cores with block scales define it: sums within a block, its scales, and sums over the blocks.

    float64; the sums within a block are exact, a block being 16 or 32 numbers of few bits.
    """
    scale_a, scale_b = a.of_elements().astype(np.float64), b.of_elements().astype(np.float64)
    size = a.block[1]
    total = np.zeros((len(a.values), len(b.values)))
    for start in range(0, a.values.shape[1], size):
        part = slice(start, start + size)
        sums = a.values[:, part].astype(np.float64) @ b.values[:, part].astype(np.float64).T
        total += sums * np.outer(scale_a[:, start], scale_b[:, start])
    return total * float(a.outer) * float(b.outer)
