# SPDX-License-Identifier: Apache-2.0
"""RMSprop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule, Scalars, root


def rmsprop_update(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of RMSprop (Tieleman and Hinton 2012, lecture 6.5), as `torch.optim.RMSprop` defines it, in float32.

        g <- g + wd p;   v <- a v + (1 - a) g^2;   p <- p - lr g / (sqrt(v) + eps)

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (v,), same shape, v >= 0.
        h: `lr`, `alpha` = a, `rest` = 1 - a, `eps`, `decay` = wd.
    Returns:
        New p and (v,).
    """
    g = g + h["decay"] * p
    v = h["alpha"] * moments[0] + (h["rest"] * g) * g
    return p - h["lr"] * (g * (1 / (root(v) + h["eps"]))), (v,)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    alpha = group["alpha"]
    return {"alpha": alpha, "rest": 1 - alpha, "eps": group["eps"], "decay": group["weight_decay"]}


class RMSprop(CodecOptimizer):
    """RMSprop whose moment is stored by a codec; with a float32 one it is `torch.optim.RMSprop` up to rounding.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate; a float, or a float32 scalar tensor that may change on the device.
        alpha: decay rate of the moment, in [0, 1).
        eps: added to the denominator.
        weight_decay: times the parameter, added to the gradient.
        second: how the mean square of the gradient is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule("rmsprop", {"second": False}, rmsprop_update, _constants)

    def __init__(  # noqa: PLR0913  torch's own signature, and the codec
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        second: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        check_betas(type(self).__name__, (alpha,))
        check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        hyper = {"lr": lr, "alpha": alpha, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyper, {"second": second}, **options)
