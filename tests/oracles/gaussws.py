# SPDX-License-Identifier: Apache-2.0
"""Gaussian weight sampling, one element at a time, in Python integers and float64 (arXiv:2505.11170)."""

from __future__ import annotations

import math

import numpy as np

# numerator and digits of P(|R| >= 1) and of P(|R| = 2 | |R| >= 1)
CIRCUITS = {"lite": ((5, 4), (1, 7)), "default": ((81, 8), (1, 7)), "fine": ((325, 10), (9, 10))}
LOW = 0xFFFFFFFF


def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 (Salmon et al. 2011)."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & LOW, (a >> 32) ^ c[3] ^ k1, a & LOW]
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c


def bernoulli_bit(bits: list[int], numerator: int) -> int:
    """A bit that is 1 with probability numerator / 2^k from k bits, the lowest digit of the numerator first."""
    acc = 0
    for place, bit in enumerate(bits):
        acc = acc | bit if numerator >> place & 1 else acc & bit
    return acc


def rounded_normal(
    element: int, row: int, column: int, draw: int, key: tuple[int, int], circuit: str = "default"
) -> int:
    """R of one element of one block: its bit of the words of its group of 32."""
    (n1, k1), (n2, k2) = CIRCUITS[circuit]
    calls = -(-(k1 + k2 + 1) // 4)
    group, lane = divmod(element, 32)
    words = [w for i in range(calls) for w in philox((group * calls + i, row, column, draw), key)]
    bits = [w >> lane & 1 for w in words]
    one = bernoulli_bit(bits[:k1], n1)
    two = one & bernoulli_bit(bits[k1 : k1 + k2], n2)
    return (one + two) * (-1 if bits[k1 + k2] else 1)


def half(element: int, row: int, column: int, draw: int, key: tuple[int, int]) -> int:
    """16 random bits of one element; a call serves eight."""
    call, place = divmod(element, 8)
    word = philox((call, row, column, draw), key)[place // 2]
    return word >> 16 if place % 2 else word & 0xFFFF


def noise(
    shape: tuple[int, int], block: tuple[int, int], draw: int, key: tuple[int, int], kind: str = "default"
) -> np.ndarray:
    """R of a whole weight; kind is a circuit, or `uniform`."""
    r = np.zeros(shape)
    for i in range(shape[0]):
        for j in range(shape[1]):
            row, column = i // block[0], j // block[1]
            element = (i % block[0]) * block[1] + j % block[1]
            if kind == "uniform":
                r[i, j] = (half(element, row, column, draw, key) + 0.5) / 65536 - 0.5
            else:
                r[i, j] = rounded_normal(element, row, column, draw, key, kind)
    return r


def step(amax: float, b_i: float, b_init: float, b_target: float, most: float) -> float:
    """D = M 2^(1 - b), b between 2 and `most`."""
    return amax * 2 ** (1 - min(max(b_target + b_i * (b_init - b_target), 2), most))


def forward(
    w: np.ndarray, b_i: np.ndarray, r: np.ndarray, block: tuple[int, int], b_init: float, b_target: float, most: float
) -> np.ndarray:
    """W + R D, before any cast."""
    out = np.zeros(w.shape)
    for i, j in np.ndindex(*b_i.shape):
        part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        out[part] = w[part] + r[part] * step(np.abs(w[part]).max(), b_i[i, j], b_init, b_target, most)
    return out


def bit_gradient(
    g: np.ndarray, w: np.ndarray, b_i: np.ndarray, r: np.ndarray, block: tuple[int, int], b_init: float, b_target: float
) -> np.ndarray:
    """dL/db_i = -ln 2 (b_init - b_target) D sum_B(G R), no block at a bound."""
    out = np.zeros(b_i.shape)
    for i, j in np.ndindex(*b_i.shape):
        part = np.s_[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
        delta = step(np.abs(w[part]).max(), b_i[i, j], b_init, b_target, math.inf)
        out[i, j] = -math.log(2) * (b_init - b_target) * delta * math.fsum((g[part] * r[part]).ravel())
    return out


def ideal_probabilities() -> tuple[float, float, float]:
    """P(|round(Z / 2)| = 0, 1, >= 2) of a standard normal Z."""
    inside = [math.erf(z / math.sqrt(2)) for z in (1, 3)]
    return inside[0], inside[1] - inside[0], 1 - inside[1]
