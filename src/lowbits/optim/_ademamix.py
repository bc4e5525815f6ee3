# SPDX-License-Identifier: Apache-2.0
"""AdEMAMix: AdamW with a second, slow momentum."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.errors import SpecError
from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule, Scalars, root


def ademamix_update(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of AdEMAMix (Pagliardini et al. 2024, arXiv:2409.03137, algorithm 1), in float32.

        p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m);  s <- s + (1 - b3)(g - s);  v <- b2 v + (1 - b2) g^2
        p <- p - lr (m / (1 - b1^t) + alpha s) / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (m, s, v), same shape, v >= 0.
        h: `lr`, `beta1`, `rest1` = 1 - b1, `beta2`, `rest2`, `rest3`, `alpha`, `eps`, `decay` = wd, `c_beta1`,
            `c_beta2`; `rest3` and `alpha` as scheduled for this step.
    Returns:
        New p and (m, s, v).
    """
    m, slow, v = moments
    m = m + h["rest1"] * (g - m)
    slow = slow + h["rest3"] * (g - slow)
    v = h["beta2"] * v + (h["rest2"] * g) * g
    denominator = root(v) * (1 / root(h["c_beta2"])) + h["eps"]
    mixed = m * (1 / h["c_beta1"]) + h["alpha"] * slow
    return p * (1 - h["lr"] * h["decay"]) - h["lr"] * (mixed * (1 / denominator)), (m, slow, v)


def slow_beta(t: int, beta1: float, beta3: float, t_beta3: int | None) -> float:
    """Return the decay rate of the slow momentum at step t (arXiv:2409.03137, eq. 5 of sec. 3.1).

    Its half-life grows linearly, from that of `beta1` to that of `beta3` after `t_beta3` steps.

    >>> round(slow_beta(500, 0.9, 0.9999, 1000), 4)
    0.9998
    """
    if t_beta3 is None or t >= t_beta3:
        return beta3
    s, ln1, ln3 = t / t_beta3, math.log(beta1), math.log(beta3)
    return min(math.exp(ln1 * ln3 / ((1 - s) * ln3 + s * ln1)), beta3)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    b1, b2, b3 = group["betas"]
    alpha, t_alpha = group["alpha"], group["t_alpha"]
    return {
        "beta1": b1, "rest1": 1 - b1, "beta2": b2, "rest2": 1 - b2,
        "rest3": 1 - slow_beta(t, b1, b3, group["t_beta3"]),
        "alpha": alpha if t_alpha is None else min(t * alpha / t_alpha, alpha),
        "eps": group["eps"], "decay": group["weight_decay"],
    }  # fmt: skip


class AdEMAMix(CodecOptimizer):
    """AdEMAMix whose moments are stored by codecs.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate; a float, or a float32 scalar tensor that may change on the device.
        betas: decay rates of the fast momentum, the second moment and the slow momentum, in [0, 1).
        alpha: weight of the slow momentum.
        t_alpha: steps over which alpha grows from 0; None begins with all of it.
        t_beta3: steps over which the third beta grows from the first; None begins with it.
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        first: how the fast momentum is stored.
        slow: how the slow momentum is stored.
        second: how the second moment is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule(
        "ademamix", {"first": True, "slow": True, "second": False}, ademamix_update, _constants, ("beta1", "beta2")
    )

    def __init__(  # noqa: PLR0913  the reference's signature, and the codecs
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int | None = None,
        t_beta3: int | None = None,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        first: StateCodec = FLOAT32,
        slow: StateCodec = FLOAT32,
        second: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        name = type(self).__name__
        check_betas(name, betas)
        check_not_negative(name, lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay)
        if (t_alpha is not None and t_alpha < 1) or (t_beta3 is not None and (t_beta3 < 1 or not betas[0] * betas[2])):
            raise SpecError(
                f"{name}: t_alpha and t_beta3 are at least 1 or None, and t_beta3 needs positive betas; "
                f"got {t_alpha}, {t_beta3} and {betas}."
            )
        hyper = {
            "lr": lr, "betas": betas, "alpha": alpha, "t_alpha": t_alpha, "t_beta3": t_beta3, "eps": eps,
            "weight_decay": weight_decay,
        }  # fmt: skip
        super().__init__(params, hyper, {"first": first, "slow": slow, "second": second}, **options)
