# SPDX-License-Identifier: Apache-2.0
"""SGD, plain, with momentum, and with Nesterov's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.errors import SpecError
from lowbits.optim._checks import check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule, Scalars

Moments = tuple[Tensor, ...]


def sgd_update(p: Tensor, g: Tensor, moments: Moments, h: Scalars) -> tuple[Tensor, Moments]:
    """One step of gradient descent, p <- p - lr (s g + wd p), in float32.

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: none.
        h: `lr`, `sign` s = 1, or -1 to maximize, `decay` = wd.
    Returns:
        New p, and no moments.
    """
    return p - h["lr"] * _decayed(p, g, h), ()


def momentum_update(p: Tensor, g: Tensor, moments: Moments, h: Scalars) -> tuple[Tensor, Moments]:
    """One step of SGD with momentum, as `torch.optim.SGD` defines it (Sutskever et al. 2013), in float32.

        m <- momentum m + (1 - dampening) (s g + wd p), without dampening at t = 1;   p <- p - lr m

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (m,), same shape.
        h: as `sgd_update`, and `momentum`, `rest` = 1 - dampening, 1 at t = 1.
    Returns:
        New p and (m,).
    """
    m = h["momentum"] * moments[0] + h["rest"] * _decayed(p, g, h)
    return p - h["lr"] * m, (m,)


def nesterov_update(p: Tensor, g: Tensor, moments: Moments, h: Scalars) -> tuple[Tensor, Moments]:
    """One step of SGD with Nesterov momentum: as `momentum_update`, but p <- p - lr (s g + wd p + momentum m)."""
    g = _decayed(p, g, h)
    m = h["momentum"] * moments[0] + h["rest"] * g
    return p - h["lr"] * (g + h["momentum"] * m), (m,)


def _decayed(p: Tensor, g: Tensor, h: Scalars) -> Tensor:
    return h["sign"] * g + h["decay"] * p


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    return {"sign": -1.0 if group["maximize"] else 1.0, "decay": group["weight_decay"]}


def _momentum_constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    rest = 1.0 if t == 1 else 1.0 - group["dampening"]
    return {**_constants(group, t), "momentum": group["momentum"], "rest": rest}


PLAIN = Rule("sgd", {}, sgd_update, _constants)
MOMENTUM = Rule("momentum", {"first": True}, momentum_update, _momentum_constants)
NESTEROV = Rule("nesterov", {"first": True}, nesterov_update, _momentum_constants)


class SGD(CodecOptimizer):
    """SGD whose momentum is stored by a codec; with a float32 one it is `torch.optim.SGD` up to rounding.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate; a float, or a float32 scalar tensor that may change on the device.
        momentum: decay rate of the momentum; groups with 0 store nothing.
        dampening: the gradient enters the momentum times 1 - dampening, from the second step on.
        weight_decay: times the parameter, added to the gradient.
        nesterov: look one step of momentum ahead; needs momentum, and no dampening.
        maximize: climb instead.
        first: how the momentum is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range, or Nesterov momentum without momentum or with dampening.
    """

    rule = MOMENTUM

    def __init__(  # noqa: PLR0913  torch's own signature, and the codec
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        first: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        check_not_negative(type(self).__name__, lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0 or dampening != 0):
            raise SpecError(
                f"{type(self).__name__}: nesterov needs momentum above 0 and dampening 0, got {momentum}, {dampening}."
            )
        hyper = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay,
            "nesterov": nesterov, "maximize": maximize,
        }  # fmt: skip
        super().__init__(params, hyper, {"first": first}, **options)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """See `CodecOptimizer.rule_of`."""
        if not group["momentum"]:
            return PLAIN
        return NESTEROV if group["nesterov"] else MOMENTUM
