# SPDX-License-Identifier: Apache-2.0
"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule, Scalars


def lion_update(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), in float32.

        p <- p (1 - lr wd) - lr sign(m + (1 - b1)(g - m));   m <- m + (1 - b2)(g - m)

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (m,), same shape.
        h: `lr`, `rest1` = 1 - b1, `rest2` = 1 - b2, `decay` = wd.
    Returns:
        New p and (m,). The sign of 0 and of NaN is 0.
    """
    (m,) = moments
    difference = g - m
    direction = (m + h["rest1"] * difference).sign()
    return p * (1 - h["lr"] * h["decay"]) - h["lr"] * direction, (m + h["rest2"] * difference,)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    b1, b2 = group["betas"]
    return {"rest1": 1 - b1, "rest2": 1 - b2, "decay": group["weight_decay"]}


class Lion(CodecOptimizer):
    """Lion whose momentum is stored by a codec.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate, a third to a tenth of AdamW's; a float, or a float32 scalar tensor that may change on the
            device.
        betas: of the interpolation whose sign is taken, and of the momentum; in [0, 1).
        weight_decay: decoupled from the gradient.
        first: how the momentum is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule("lion", {"first": True}, lion_update, _constants)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        first: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        check_betas(type(self).__name__, betas)
        check_not_negative(type(self).__name__, lr=lr, weight_decay=weight_decay)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, {"first": first}, **options)
