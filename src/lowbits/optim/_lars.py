# SPDX-License-Identifier: Apache-2.0
"""LARS: SGD with momentum, every tensor with a learning rate of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options, Target
from lowbits.optim._rule import Rule, Scalars
from lowbits.optim._tensorwise import Whole, trust_ratio


def lars_update(
    p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars, whole: Whole | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of LARS (You et al. 2017, arXiv:1708.03888, eq. 6 and algorithm 1), in float32.

        rate = lr eta ||p|| / (||g|| + wd ||p||);   m <- momentum m + rate (g + wd p);   p <- p - m

    The ratio may be above 1 as well as below; where ||p|| or the divisor is 0 the rate is lr.

    Args:
        p: the whole parameter, or a shard of it.
        g: its gradient, same shape.
        moments: (m,), same shape.
        h: `lr`, `momentum`, `trust` = eta, `decay` = wd.
        whole: what p is a shard of; None: all of it.
    Returns:
        New p and (m,).
    """
    rms = (whole or Whole.of(p)).rms
    weight = rms(p)
    ratio = trust_ratio(h["trust"] * weight, rms(g) + h["decay"] * weight)
    m = h["momentum"] * moments[0] + (h["lr"] * ratio) * (g + h["decay"] * p)
    return p - m, (m,)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    return {"momentum": group["momentum"], "trust": group["trust_coefficient"], "decay": group["weight_decay"]}


class LARS(CodecOptimizer):
    """LARS whose momentum is stored by a codec. Not the one-sided clipping of that name in bitsandbytes.

    Args:
        params: parameters, or groups, or named parameters.
        lr: global learning rate; a float, or a float32 scalar tensor that may change on the device.
        momentum: decay rate of the momentum, in [0, 1).
        weight_decay: times the parameter, added to the gradient.
        trust_coefficient: eta, the length of a step relative to the parameter at lr = 1.
        first: how the momentum is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule("lars", {"first": True}, lars_update, _constants)

    def __init__(  # noqa: PLR0913  the reference's signature, and the codec
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        *,
        first: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        check_betas(type(self).__name__, (momentum,))
        hyper = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust_coefficient": trust_coefficient}
        check_not_negative(type(self).__name__, **hyper)
        super().__init__(params, hyper, {"first": first}, **options)

    def _new(
        self, target: Target, p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return lars_update(p, g, moments, h, Whole.of(target.parameter))
