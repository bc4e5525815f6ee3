# SPDX-License-Identifier: Apache-2.0
"""AdamW: a pure update times a codec for each moment."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from lowbits.errors import CheckpointError, SpecError
from lowbits.optim._codec import Exact, StateCodec
from lowbits.quantizers import Noise

_MOMENTS = ("first", "second")
_FLOAT32 = Exact()


def adamw_update(
    p: Tensor,
    g: Tensor,
    moments: tuple[Tensor, Tensor],
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    decay: tuple[float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """One step of AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2), in float32.

        p <- p (1 - lr wd);  m <- m + (1 - b1)(g - m);  v <- b2 v + (1 - b2) g^2
        p <- p - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)

    Args:
        p: the parameter.
        g: its gradient, same shape.
        moments: (m, v), same shape, v >= 0.
        step: t, counted from 1, a float32 scalar tensor.
        lr: learning rate.
        betas: (b1, b2).
        decay: (wd, eps).
    Returns:
        New (p, m, v).
    """
    (m, v), (b1, b2), (wd, eps) = moments, betas, decay
    p = p * (1 - lr * wd)
    m = m + (1 - b1) * (g - m)
    v = b2 * v + (1 - b2) * g * g
    denominator = v.sqrt() / (1 - b2**step).sqrt() + eps
    return p - (lr / (1 - b1**step)) * m / denominator, m, v


class AdamW(torch.optim.Optimizer):
    """AdamW whose moments are stored by codecs; with `Exact()` it is `torch.optim.AdamW` up to float32 rounding.

    A parameter group may override everything, the codecs too: `{"params": ..., "first": Quantized(spec)}`. Groups made
    by `param_groups` do so for the layers of a recipe.

    Args:
        params: parameters, or groups.
        lr: learning rate.
        betas: decay rates of the moments, in [0, 1).
        eps: added to the denominator.
        weight_decay: decoupled.
        first: how the first moment is stored.
        second: how the second moment is stored.
        seed: of the random bits of codecs that round stochastically.
    Raises:
        SpecError: a hyper-parameter is out of range.
    """

    def __init__(  # noqa: PLR0913  torch's own signature, and the codecs
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        first: StateCodec = _FLOAT32,
        second: StateCodec = _FLOAT32,
        seed: int = 0,
    ) -> None:
        self._seed = seed
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise SpecError(
                f"AdamW: lr={lr}, eps={eps}, weight_decay={weight_decay} are at least 0 and betas={betas} in [0, 1)."
            )
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "first": first,
            "second": second,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p.grad is not None:
                    self._update_(p, group, f"{number}.{index}")
        return loss

    def _update_(self, p: Tensor, group: dict[str, Any], name: str) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state |= {moment: group[moment].init(p) for moment in _MOMENTS}
        state["step"] += 1
        moments = tuple(group[moment].decode(state[moment], p.shape) for moment in _MOMENTS)
        new, *moments = adamw_update(
            p.float(), p.grad.float(), moments, state["step"], group["lr"], group["betas"],  # type: ignore[union-attr, arg-type]
            (group["weight_decay"], group["eps"]),
        )  # fmt: skip
        p.copy_(new)
        count = state["step"].to(torch.int64)
        for moment, value in zip(_MOMENTS, moments, strict=True):
            group[moment].encode_(state[moment], value, Noise.of(self._seed, name, moment), count)

    def state_dict(self) -> dict[str, Any]:
        """Return torch's layout with plain data only: codecs are left out, they are not state."""
        packed = super().state_dict()
        packed["param_groups"] = [{k: v for k, v in g.items() if k not in _MOMENTS} for g in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, codes bit for bit.

        torch's own version would cast every state tensor to the parameter's dtype.

        Raises:
            CheckpointError: the state does not fit this optimizer's parameters and codecs; nothing is changed then.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        codecs = [group for group in self.param_groups for _ in group["params"]]
        for index, state in state_dict["state"].items():
            if index >= len(params):
                raise CheckpointError(f"optimizer: state for parameter {index}, but there are {len(params)}.")
            _check_state(index, state, params[index], codecs[index])
        kept = [{moment: group[moment] for moment in _MOMENTS} for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        for group, moments in zip(self.param_groups, kept, strict=True):
            group.update(moments)
        for index, state in state_dict["state"].items():
            device = params[index].device
            copied: dict[str, Any] = {"step": state["step"].to(device, copy=True)}
            copied |= {m: {k: t.to(device, copy=True) for k, t in state[m].items()} for m in _MOMENTS}
            self.state[params[index]] = copied


def _check_state(index: int, state: dict[str, Any], p: Tensor, group: dict[str, Any]) -> None:
    for moment in _MOMENTS:
        want = {k: (t.shape, t.dtype) for k, t in group[moment].init(p).items()}
        got = {k: (t.shape, t.dtype) for k, t in state[moment].items()}
        if want != got:
            raise CheckpointError(
                f"optimizer: the {moment} moment of parameter {index} {tuple(p.shape)} is stored as {got}, "
                f"{group[moment]} stores {want}. Resume with the recipe that the checkpoint was written with."
            )
