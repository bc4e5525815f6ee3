# SPDX-License-Identifier: Apache-2.0
"""The update rules of `lowbits.optim` once more, as Triton sees them; the eager rules are the definition.

A rule is `(p, g, a, b, c, h) -> (p, a, b, c)` on float32 tiles: parameter, gradient, up to three moments (those that a
rule does not have are passed through), and a pointer to its scalars, `lr` first, then its constants, then its
corrections, as `lowbits.optim.Rule` orders them. Multiplication and addition stay apart (the kernels are compiled
without contraction); reciprocal and root are those of IEEE 754. So the bits are those of the eager rule.
"""

# Triton reads this file's source: annotations would be evaluated as its own types.

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def reciprocal(d):
    """1 / d, correctly rounded for normal d and 1 / d: the processor's estimate and a step of Newton's.

    Triton's own division branches for the other cases, element by element.
    """
    if INTERPRETED:
        return tl.div_rn(1.0, d)
    r = tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1)
    return tl.fma(r, tl.fma(-d, r, 1.0), r)


@triton.jit
def root(v):
    """The square root of v >= 0, correctly rounded for 0 and for 2^-100 and more."""
    if INTERPRETED:
        return tl.sqrt_rn(v)
    y = tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [tl.maximum(v, 2.0**-126)], dtype=tl.float32, is_pure=True, pack=1
    )
    s = v * y
    return tl.fma(tl.fma(-s, s, v), 0.5 * y, s)


@triton.jit
def _adam_step(p, g, m, v, h):
    lr, rest1, beta2, rest2, eps = tl.load(h), tl.load(h + 2), tl.load(h + 3), tl.load(h + 4), tl.load(h + 5)
    m = m + rest1 * (g - m)
    v = beta2 * v + (rest2 * g) * g
    denominator = root(v) * tl.div_rn(1.0, tl.sqrt_rn(tl.load(h + 8))) + eps
    return p - tl.div_rn(lr, tl.load(h + 7)) * (m * reciprocal(denominator)), m, v


@triton.jit
def adamw(p, g, a, b, c, h):
    p, a, b = _adam_step(p * (1 - tl.load(h) * tl.load(h + 6)), g, a, b, h)
    return p, a, b, c


@triton.jit
def adam(p, g, a, b, c, h):
    p, a, b = _adam_step(p, g + tl.load(h + 6) * p, a, b, h)
    return p, a, b, c


@triton.jit
def ademamix(p, g, a, b, c, h):
    lr, rest1, beta2, rest2 = tl.load(h), tl.load(h + 2), tl.load(h + 3), tl.load(h + 4)
    a = a + rest1 * (g - a)
    b = b + tl.load(h + 5) * (g - b)
    c = beta2 * c + (rest2 * g) * g
    denominator = root(c) * tl.div_rn(1.0, tl.sqrt_rn(tl.load(h + 10))) + tl.load(h + 7)
    mixed = a * tl.div_rn(1.0, tl.load(h + 9)) + tl.load(h + 6) * b
    return p * (1 - lr * tl.load(h + 8)) - lr * (mixed * reciprocal(denominator)), a, b, c


@triton.jit
def lion(p, g, a, b, c, h):
    lr, difference = tl.load(h), g - a
    direction = a + tl.load(h + 1) * difference
    sign = tl.where(direction > 0, 1.0, tl.where(direction < 0, -1.0, 0.0))
    return p * (1 - lr * tl.load(h + 3)) - lr * sign, a + tl.load(h + 2) * difference, b, c


@triton.jit
def sgd(p, g, a, b, c, h):
    return p - tl.load(h) * (tl.load(h + 1) * g + tl.load(h + 2) * p), a, b, c


@triton.jit
def momentum(p, g, a, b, c, h):
    a = tl.load(h + 3) * a + tl.load(h + 4) * (tl.load(h + 1) * g + tl.load(h + 2) * p)
    return p - tl.load(h) * a, a, b, c


@triton.jit
def nesterov(p, g, a, b, c, h):
    g = tl.load(h + 1) * g + tl.load(h + 2) * p
    a = tl.load(h + 3) * a + tl.load(h + 4) * g
    return p - tl.load(h) * (g + tl.load(h + 3) * a), a, b, c


@triton.jit
def rmsprop(p, g, a, b, c, h):
    g = g + tl.load(h + 4) * p
    a = tl.load(h + 1) * a + (tl.load(h + 2) * g) * g
    return p - tl.load(h) * (g * reciprocal(root(a) + tl.load(h + 3))), a, b, c


@triton.jit
def adagrad(p, g, a, b, c, h):
    g = g + tl.load(h + 4) * p
    a = (a + tl.load(h + 2)) + g * g
    return p - tl.div_rn(tl.load(h), tl.load(h + 1)) * (g * reciprocal(root(a) + tl.load(h + 3))), a, b, c
