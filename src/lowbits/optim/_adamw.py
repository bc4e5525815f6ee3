# SPDX-License-Identifier: Apache-2.0
"""AdamW, and Adam with its coupled weight decay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from torch import Tensor

from lowbits.optim._checks import check_betas, check_not_negative
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rule import Rule, Scalars, root


def adamw_update(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), in float32.

        p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (m, v), same shape, v >= 0.
        h: `lr`, `beta1`, `rest1` = 1 - b1, `beta2`, `rest2`, `eps`, `decay` = wd, `c_beta1`, `c_beta2`.
    Returns:
        New p and (m, v).
    """
    return _adam_step(p * (1 - h["lr"] * h["decay"]), g, moments, h)


def adam_update(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One step of Adam (Kingma and Ba 2015, arXiv:1412.6980, algorithm 1); weight decay is added to the gradient.

    Args and Returns: as `adamw_update`.
    """
    return _adam_step(p, g + h["decay"] * p, moments, h)


def _adam_step(p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars) -> tuple[Tensor, tuple[Tensor, ...]]:
    m, v = moments
    m = m + h["rest1"] * (g - m)
    v = h["beta2"] * v + (h["rest2"] * g) * g
    denominator = root(v) * (1 / root(h["c_beta2"])) + h["eps"]
    return p - (h["lr"] / h["c_beta1"]) * (m * (1 / denominator)), (m, v)


def _constants(group: Mapping[str, Any], t: int) -> dict[str, float]:
    b1, b2 = group["betas"]
    return {
        "beta1": b1, "rest1": 1 - b1, "beta2": b2, "rest2": 1 - b2, "eps": group["eps"],
        "decay": group["weight_decay"],
    }  # fmt: skip


_MOMENTS = {"first": True, "second": False}


class AdamW(CodecOptimizer):
    """AdamW whose moments are stored by codecs; with float32 ones it is `torch.optim.AdamW` up to rounding.

    Args:
        params: parameters, or groups, or named parameters.
        lr: learning rate; a float, or a float32 scalar tensor that may change on the device.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled from the gradient.
        first: how the first moment is stored.
        second: how the second moment is stored.
        options: see `Options`.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    rule = Rule("adamw", _MOMENTS, adamw_update, _constants, ("beta1", "beta2"))

    def __init__(  # noqa: PLR0913  torch's own signature, and the codecs
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
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


class Adam(AdamW):
    """Adam: as `AdamW`, but weight decay is added to the gradient, as in `torch.optim.Adam` (default 0 there)."""

    rule = Rule("adam", _MOMENTS, adam_update, _constants, ("beta1", "beta2"))

    def __init__(  # noqa: PLR0913  torch's own signature, and the codecs
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        first: StateCodec = FLOAT32,
        second: StateCodec = FLOAT32,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, first=first, second=second, **options)
