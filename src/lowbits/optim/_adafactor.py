# SPDX-License-Identifier: Apache-2.0
"""Adafactor: a factored second moment, a bounded step, as long as the tensor that takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from torch import Tensor

from lowbits.errors import SpecError
from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._factored import Factored
from lowbits.optim._optimizer import CodecOptimizer, Options, Target
from lowbits.optim._rule import Rule, Scalars, root
from lowbits.optim._tensorwise import Whole

Moments = tuple[Tensor, ...]
_SMALLEST = 2.0**-126  # a normal number: 0 / sqrt(it) is 0


def adafactor_update(
    p: Tensor, g: Tensor, moments: Moments, h: Scalars, whole: Whole | None = None
) -> tuple[Tensor, Moments]:
    """One step of Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5), in float32.

        v <- v + t^decay (g^2 - v);   v_ij <- R_i C_j / mean(C), for matrices with row means R and column means C
        u = g / sqrt(max(v, eps1^2));   u <- u / max(1, rms(u) / d)
        p <- p (1 - lr wd) - max(eps2, rms(p)) min(lr, 1 / sqrt(t)) u

    With a first moment, m <- m + (1 - b1)(u - m) takes the place of u in the last line.

    Args:
        p: the whole parameter, or a shard of it.
        g: its gradient, same shape.
        moments: (v,) or (m, v), same shape, v >= 0.
        h: `lr`, `rest1` = 1 - b1, `rest2` = t^decay, `floor` = eps1^2, `smallest` = eps2, `bound` = 1 / sqrt(t),
            `clip` = d, `decay` = wd.
        whole: what p is a shard of; None: all of it.
    Returns:
        New p and moments.
    """
    *first, v = moments
    whole = whole or Whole.of(p)
    v = v + h["rest2"] * (g * g - v)
    if len(whole.shape) > 1:
        v = whole.rank_one(v)
    u = g / root(torch.maximum(v, h["floor"]))
    u = u * (1 / (whole.rms(u) / h["clip"]).clamp_min(1.0))
    if first:
        first = [first[0] + h["rest1"] * (u - first[0])]
        (u,) = first
    rate = torch.maximum(h["smallest"], whole.rms(p)) * torch.minimum(h["lr"], h["bound"])
    return p * (1 - h["lr"] * h["decay"]) - rate * u, (*first, v)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(torch.float32).eps if eps1 is None else eps1
    return {
        "rest1": 1 - group["beta1"], "rest2": float(t) ** group["beta2_decay"], "floor": max(eps1 * eps1, _SMALLEST),
        "smallest": eps2, "bound": t**-0.5, "clip": group["d"], "decay": group["weight_decay"],
    }  # fmt: skip


WITHOUT_MOMENTUM = Rule("adafactor", {"second": False}, adafactor_update, _constants)
WITH_MOMENTUM = Rule("adafactor_momentum", {"first": True, "second": False}, adafactor_update, _constants)


class Adafactor(CodecOptimizer):
    """Adafactor; without momentum it is `torch.optim.Adafactor`, which keeps mean(R) above eps[0], up to rounding.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate, relative to the root mean square of the parameter and at most 1 / sqrt(t); a float, or a
            float32 scalar tensor that may change on the device.
        beta2_decay: exponent; the second moment decays at 1 - t^beta2_decay. Negative.
        eps: bounds from below of the root of the second moment (None: that of float32) and of the parameter's root
            mean square.
        d: bound of the root mean square of an update.
        weight_decay: decoupled from the gradient.
        beta1: decay rate of the momentum, in [0, 1); groups with 0 store none.
        first: how the momentum is stored.
        second: how the second moment is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = WITH_MOMENTUM

    def __init__(  # noqa: PLR0913  torch's own signature, and the codecs
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        beta1: float = 0.0,
        first: StateCodec = FLOAT32,
        second: StateCodec = Factored(),  # noqa: B008  frozen
        **options: Unpack[Options],
    ) -> None:
        name = type(self).__name__
        check_betas(name, (beta1,))
        check_not_negative(name, lr=lr, weight_decay=weight_decay, eps1=eps[0] or 0.0, eps2=eps[1])
        if not beta2_decay <= 0 or not d > 0:
            raise SpecError(f"{name}: beta2_decay is at most 0 and d above 0, got {beta2_decay} and {d}.")
        hyper = {
            "lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay, "beta1": beta1,
        }  # fmt: skip
        super().__init__(params, hyper, {"first": first, "second": second}, **options)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """See `CodecOptimizer.rule_of`."""
        return WITH_MOMENTUM if group["beta1"] else WITHOUT_MOMENTUM

    def _new(self, target: Target, p: Tensor, g: Tensor, moments: Moments, h: Scalars) -> tuple[Tensor, Moments]:
        return adafactor_update(p, g, moments, h, Whole.of(target.parameter))
