# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: PLR0913  the symbols of a paper are the arguments
"""The optimizers as their papers state them, in float64; `s` is the state, which starts empty, and t counts from 1.

Every function is `(p, g, s, t, **hyper) -> new p`, numpy arrays, and writes into s.
"""

from __future__ import annotations

import math

import numpy as np


def zero(s, name, p):
    return s.setdefault(name, np.zeros_like(p))


def adam_moments(p, g, s, b1, b2):
    s["m"] = b1 * zero(s, "m", p) + (1 - b1) * g
    s["v"] = b2 * zero(s, "v", p) + (1 - b2) * g**2


def adamw(p, g, s, t, lr, betas, eps, weight_decay):
    """arXiv:1711.05101, algorithm 2, lines 6 to 12, with the schedule multiplier lr in both terms."""
    adam_moments(p, g, s, *betas)
    m_hat, v_hat = s["m"] / (1 - betas[0] ** t), s["v"] / (1 - betas[1] ** t)
    return p - lr * (m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p)


def adam(p, g, s, t, lr, betas, eps, weight_decay):
    """arXiv:1412.6980, algorithm 1, on the loss with weight_decay / 2 ||p||^2."""
    return adamw(p, g + weight_decay * p, s, t, lr, betas, eps, 0.0)


def sgd(p, g, s, t, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """The pseudo-code of torch.optim.SGD."""
    g = (-g if maximize else g) + weight_decay * p
    if momentum:
        s["b"] = momentum * s["b"] + (1 - dampening) * g if t > 1 else g
        g = g + momentum * s["b"] if nesterov else s["b"]
    return p - lr * g


def rmsprop(p, g, s, t, lr, alpha, eps, weight_decay):
    """Tieleman and Hinton 2012, lecture 6.5."""
    g = g + weight_decay * p
    s["v"] = alpha * zero(s, "v", p) + (1 - alpha) * g**2
    return p - lr * g / (np.sqrt(s["v"]) + eps)


def adagrad(p, g, s, t, lr, lr_decay, weight_decay, initial_accumulator_value, eps):
    """Duchi et al. 2011; the learning rate falls as 1 / t if asked to."""
    g = g + weight_decay * p
    s["sum"] = s.get("sum", initial_accumulator_value) + g**2
    return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(s["sum"]) + eps)


def lion(p, g, s, t, lr, betas, weight_decay):
    """arXiv:2302.06675, algorithm 2."""
    c = betas[0] * zero(s, "m", p) + (1 - betas[0]) * g
    s["m"] = betas[1] * s["m"] + (1 - betas[1]) * g
    return p - lr * (np.sign(c) + weight_decay * p)


def ademamix(p, g, s, t, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay):
    """arXiv:2409.03137, algorithm 1, with the schedules of section 3.1."""
    b1, b2, b3 = betas
    if t_beta3:  # the half-life log(1/2) / log(beta) grows linearly
        half = [math.log(0.5) / math.log(b) for b in (b1, b3)]
        b3 = 0.5 ** (1 / (half[0] + min(t / t_beta3, 1) * (half[1] - half[0])))
    weight = alpha * min(t / t_alpha, 1) if t_alpha else alpha
    adam_moments(p, g, s, b1, b2)
    s["slow"] = b3 * zero(s, "slow", p) + (1 - b3) * g
    m_hat, v_hat = s["m"] / (1 - b1**t), s["v"] / (1 - b2**t)
    return p - lr * ((m_hat + weight * s["slow"]) / (np.sqrt(v_hat) + eps) + weight_decay * p)


def lamb(p, g, s, t, lr, betas, eps, weight_decay):
    """arXiv:1904.00962, algorithm 2, phi the identity."""
    adam_moments(p, g, s, *betas)
    m_hat, v_hat = s["m"] / (1 - betas[0] ** t), s["v"] / (1 - betas[1] ** t)
    u = m_hat / (np.sqrt(v_hat) + eps) + weight_decay * p
    weight, step = np.linalg.norm(p), np.linalg.norm(u)
    return p - lr * (weight / step if weight and step else 1.0) * u


def lars(p, g, s, t, lr, momentum, weight_decay, trust_coefficient):
    """arXiv:1708.03888, algorithm 1, with the local rate of eq. 6."""
    weight, divisor = np.linalg.norm(p), np.linalg.norm(g) + weight_decay * np.linalg.norm(p)
    rate = trust_coefficient * weight / divisor if weight and divisor else 1.0
    s["v"] = momentum * zero(s, "v", p) + lr * rate * (g + weight_decay * p)
    return p - s["v"]


def adafactor(p, g, s, t, lr, beta2_decay, eps, d, weight_decay, beta1=0.0):
    """arXiv:1804.04235, algorithms 4 and 5, on row and column sums; the bounds of torch.optim.Adafactor."""
    rms = lambda x: math.sqrt(np.mean(x**2))  # noqa: E731
    b2 = 1 - t**beta2_decay
    if p.ndim < 2:
        s["v"] = v = b2 * zero(s, "v", p) + (1 - b2) * g**2
    else:
        s["r"] = b2 * s.get("r", 0.0) + (1 - b2) * (g**2).sum(-1)
        s["c"] = b2 * s.get("c", 0.0) + (1 - b2) * (g**2).sum(-2)
        v = s["r"][..., :, None] * s["c"][..., None, :] / s["r"].sum(-1)[..., None, None]
    u = g / np.maximum(np.sqrt(v), eps[0])
    u = u / max(1.0, rms(u) / d)
    if beta1:
        s["m"] = u = beta1 * zero(s, "m", p) + (1 - beta1) * u
    return p - lr * weight_decay * p - max(eps[1], rms(p)) * min(lr, t**-0.5) * u
