# SPDX-License-Identifier: Apache-2.0
"""Adagrad."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.optim._checks import check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule, Scalars, root


def adagrad_update(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of Adagrad (Duchi et al. 2011, JMLR 12, fig. 1, diagonal), as `torch.optim.Adagrad`, in float32.

        g <- g + wd p;   v <- v + g^2;   p <- p - lr / (1 + (t - 1) lr_decay) g / (sqrt(v) + eps)

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (v,), same shape, v >= 0.
        h: `lr`, `slowing` = 1 + (t - 1) lr_decay, `start`, what v begins with, 0 after t = 1, `eps`, `decay` = wd.
    Returns:
        New p and (v,).
    """
    g = g + h["decay"] * p
    v = (moments[0] + h["start"]) + g * g
    return p - (h["lr"] / h["slowing"]) * (g * (1 / (root(v) + h["eps"]))), (v,)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    return {
        "slowing": 1 + (t - 1) * group["lr_decay"],
        "start": group["initial_accumulator_value"] if t == 1 else 0.0,
        "eps": group["eps"],
        "decay": group["weight_decay"],
    }


class Adagrad(CodecOptimizer):
    """Adagrad whose sum of squares is stored by a codec; with a float32 one it is `torch.optim.Adagrad` up to rounding.

    The sum only grows, and rounded to nearest it stops where one more square is less than half a step of the code;
    `Quantized` with stochastic rounding does not stop.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate; a float, or a float32 scalar tensor that may change on the device.
        lr_decay: the learning rate is divided by 1 + (t - 1) lr_decay.
        weight_decay: times the parameter, added to the gradient.
        initial_accumulator_value: what the sum of squares begins with.
        eps: added to the denominator.
        second: how the sum of squares is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule("adagrad", {"second": False}, adagrad_update, _constants)

    def __init__(  # noqa: PLR0913  torch's own signature, and the codec
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0.0,
        weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0,
        eps: float = 1e-10,
        *,
        second: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        hyper = {
            "lr": lr, "lr_decay": lr_decay, "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value, "eps": eps,
        }  # fmt: skip
        check_not_negative(type(self).__name__, **hyper)
        super().__init__(params, hyper, {"second": second}, **options)
