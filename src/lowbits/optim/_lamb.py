# SPDX-License-Identifier: Apache-2.0
"""LAMB: Adam's step, as long as the tensor that takes it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options, Target
from lowbits.optim._rule import Rule, Scalars, root
from lowbits.optim._tensorwise import Whole, trust_ratio


def lamb_update(
    p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars, whole: Whole | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of LAMB (You et al. 2020, arXiv:1904.00962, algorithm 2, phi(x) = x), in float32.

        m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2
        u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + wd p;   p <- p - lr ||p|| / ||u|| u

    The ratio may be above 1 as well as below; it is 1 where a norm is 0.

    Args:
        p: the whole parameter, or a shard of it.
        g: its gradient, same shape.
        moments: (m, v), same shape, v >= 0.
        h: `lr`, `beta1`, `rest1` = 1 - b1, `beta2`, `rest2`, `eps`, `decay` = wd, `c_beta1`, `c_beta2`.
        whole: what p is a shard of; None: all of it.
    Returns:
        New p and (m, v).
    """
    m, v = moments
    m = m + h["rest1"] * (g - m)
    v = h["beta2"] * v + (h["rest2"] * g) * g
    denominator = root(v) * (1 / root(h["c_beta2"])) + h["eps"]
    u = (m / denominator) * (1 / h["c_beta1"]) + h["decay"] * p
    rms = (whole or Whole.of(p)).rms
    return p - (h["lr"] * trust_ratio(rms(p), rms(u))) * u, (m, v)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    b1, b2 = group["betas"]
    return {
        "beta1": b1, "rest1": 1 - b1, "beta2": b2, "rest2": 1 - b2, "eps": group["eps"],
        "decay": group["weight_decay"],
    }  # fmt: skip


class LAMB(CodecOptimizer):
    """LAMB whose moments are stored by codecs. Not the one-sided clipping of that name in bitsandbytes.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate; a float, or a float32 scalar tensor that may change on the device.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: times the parameter, added to the step before its length is taken.
        first: how the first moment is stored.
        second: how the second moment is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule("lamb", {"first": True, "second": False}, lamb_update, _constants, ("beta1", "beta2"))

    def __init__(  # noqa: PLR0913  the reference's signature, and the codecs
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        first: StateCodec = FLOAT32,
        second: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        check_betas(type(self).__name__, betas)
        check_not_negative(type(self).__name__, lr=lr, eps=eps, weight_decay=weight_decay)
        hyper = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, hyper, {"first": first, "second": second}, **options)

    def _new(
        self, target: Target, p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        return lamb_update(p, g, moments, h, Whole.of(target.parameter))
