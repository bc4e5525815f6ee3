# SPDX-License-Identifier: Apache-2.0
"""What all optimizers share: states in codecs, clipping, write-back, checkpoints. A subclass brings its rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from lowbits.errors import CheckpointError, SpecError
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._rule import Rule, Scalars, power
from lowbits.quantizers import Noise, Rounding


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes.

    Args:
        max_grad_norm: scale all gradients down, inside the step, to this global 2-norm; a step whose norm is not
            finite changes nothing. Default: no clipping.
        rounding: of bfloat16 and float16 parameters after the float32 update; `Rounding.STOCHASTIC` (bfloat16 alone)
            trains without a master copy. Default: nearest.
        min_8bit_size: tensors of fewer elements keep float32 moments, whatever their codec. Default 0; the 8- and
            4-bit constructors set 4096.
        seed: of the random bits of stochastic rounding.
    """

    max_grad_norm: float | None
    rounding: Rounding
    min_8bit_size: int
    seed: int


@dataclass(frozen=True)
class Target:
    """A parameter that is about to be updated.

    Args:
        parameter: with a gradient.
        group: its parameter group.
        name: by which its random bits are drawn: position of the group, position in it.
    """

    parameter: Tensor
    group: dict[str, Any]
    name: str


class CodecOptimizer(torch.optim.Optimizer):
    """Base of the optimizers: an element-wise `rule` times a codec for each of its moments.

    `state[p]` is flat: `step`, a float32 scalar, and `moment.part`, the tensors of the moment's codec.
    """

    rule: ClassVar[Rule]

    def __init__(
        self,
        params: Iterable[Any],
        hyper: dict[str, Any],
        codecs: Mapping[str, StateCodec],
        *,
        max_grad_norm: float | None = None,
        rounding: Rounding = Rounding.NEAREST,
        min_8bit_size: int = 0,
        seed: int = 0,
    ) -> None:
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise SpecError(f"{type(self).__name__}: max_grad_norm is positive or None, got {max_grad_norm}.")
        self.max_grad_norm, self.rounding, self.min_8bit_size, self.seed = (
            max_grad_norm, rounding, min_8bit_size, seed,
        )  # fmt: skip
        super().__init__(params, {**hyper, **codecs})

    # --- the step ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        targets = [
            Target(p, group, f"{number}.{index}")
            for number, group in enumerate(self.param_groups)
            for index, p in enumerate(group["params"])
            if p.grad is not None
        ]
        for target in targets:
            self._prepare_(target)
        factor = self._gradient_factor(targets)
        if factor is None or math.isfinite(float(factor)):
            for target in targets:
                self._update_(target, factor)
        return loss

    def _prepare_(self, target: Target) -> None:
        """Check the gradient and make the state of a parameter that has none."""
        p = target.parameter
        check_gradient(type(self).__name__, target.name, p)
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for moment, codec in self._codecs(p, target.group).items():
                state.update({f"{moment}.{part}": tensor for part, tensor in codec.init(p).items()})

    def _codecs(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, StateCodec]:
        small = p.numel() < self.min_8bit_size
        return {moment: FLOAT32 if small else group[moment] for moment in self.rule.moments}

    def _gradient_factor(self, targets: list[Target]) -> Tensor | None:
        """What every gradient is multiplied by before the update; not finite where the step must not happen."""
        if self.max_grad_norm is None:
            return None
        norm = sum((t.parameter.grad.double().square().sum() for t in targets), torch.zeros((), dtype=torch.float64))  # type: ignore[union-attr]
        return (self.max_grad_norm / norm.sqrt().clamp_min(self.max_grad_norm)).float()

    def _update_(self, target: Target, factor: Tensor | None) -> None:
        p, group = target.parameter, target.group
        state, codecs = self.state[p], self._codecs(p, group)
        state["step"] += 1
        g = p.grad.float() if factor is None else p.grad.float() * factor  # type: ignore[union-attr]
        stored = {moment: parts_of(state, moment) for moment in codecs}
        moments = tuple(codec.decode(stored[moment], p.shape) for moment, codec in codecs.items())
        new, moments = self.rule.update(p.float(), g, moments, self._scalars(group, state["step"]))
        step = state["step"].to(torch.int64)
        self._write_(p, new, Noise.of(self.seed, target.name, "weight"), step)
        for (moment, codec), value in zip(codecs.items(), moments, strict=True):
            codec.encode_(stored[moment], value, Noise.of(self.seed, target.name, moment), step)

    def _scalars(self, group: dict[str, Any], step: Tensor) -> Scalars:
        t = int(step)
        constants = {"lr": float(group["lr"])} | self.rule.constants(group, t)
        constants |= {f"c_{name}": 1 - power(constants[name], t) for name in self.rule.corrections}
        return {k: torch.tensor(v, dtype=torch.float32, device=step.device) for k, v in constants.items()}

    def _write_(self, p: Tensor, new: Tensor, noise: Noise, step: Tensor) -> None:
        """Round a float32 parameter to its own dtype."""
        if self.rounding is Rounding.STOCHASTIC and p.dtype == torch.bfloat16:
            # A float32 lies between two bfloat16 in proportion to its lower 16 bits.
            bits = new.view(torch.int32) + noise.bits16(p.shape, step, device=p.device).to(torch.int32)
            new = torch.where(new.isfinite(), (bits & -0x10000).view(torch.float32), new)
        p.copy_(new)

    def moment(self, p: Tensor, name: str) -> Tensor:
        """Return a moment of a parameter as the next step will see it.

        Args:
            p: a parameter that was updated before.
            name: one of the rule's moments.
        Returns:
            float32, of the parameter's shape.
        """
        group = next(group for group in self.param_groups if any(p is q for q in group["params"]))
        return self._codecs(p, group)[name].decode(parts_of(self.state[p], name), p.shape)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's layout with plain data only: codecs are left out, they are not state."""
        packed = super().state_dict()
        moments = self.rule.moments
        packed["param_groups"] = [{k: v for k, v in g.items() if k not in moments} for g in packed["param_groups"]]
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, codes bit for bit.

        torch's own version would cast every state tensor to the parameter's dtype.

        Raises:
            CheckpointError: the state does not fit this optimizer's parameters and codecs; nothing is changed then.
        """
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for index, state in state_dict["state"].items():
            if index >= len(params):
                raise CheckpointError(f"optimizer: state for parameter {index}, but there are {len(params)}.")
            self._check_state(index, state, *params[index])
        kept = [{moment: group[moment] for moment in self.rule.moments} for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        for group, codecs in zip(self.param_groups, kept, strict=True):
            group.update(codecs)
        for index, state in state_dict["state"].items():
            p, _ = params[index]
            self.state[p] = {name: tensor.to(p.device, copy=True) for name, tensor in state.items()}

    def _check_state(self, index: int, state: dict[str, Tensor], p: Tensor, group: dict[str, Any]) -> None:
        for moment, codec in self._codecs(p, group).items():
            want = {k: (t.shape, t.dtype) for k, t in codec.init(p).items()}
            got = {k: (t.shape, t.dtype) for k, t in parts_of(state, moment).items()}
            if want != got:
                raise CheckpointError(
                    f"optimizer: the {moment} moment of parameter {index} {tuple(p.shape)} is stored as {got}, "
                    f"{codec} stores {want}. Resume with the recipe that the checkpoint was written with."
                )


def parts_of(state: Mapping[str, Tensor], moment: str) -> dict[str, Tensor]:
    """Return the tensors of one moment under their names in the codec."""
    prefix = moment + "."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def check_gradient(optimizer: str, name: str, p: Tensor) -> None:
    """Raise where a gradient is of a kind that no rule can use.

    Raises:
        SpecError: it is sparse or complex, or the parameter changed its shape.
    """
    g = p.grad
    assert g is not None
    if g.layout != torch.strided or not g.dtype.is_floating_point or not p.dtype.is_floating_point:
        raise SpecError(
            f"{optimizer}: parameter {name}, {p.dtype}, has a {g.layout} gradient of {g.dtype}; dense real floats are "
            "needed. For nn.Embedding pass sparse=False."
        )


def check_not_negative(optimizer: str, **values: float | Tensor) -> None:
    """Raise SpecError for the first hyper-parameter below 0 or NaN."""
    for name, value in values.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise SpecError(f"{optimizer}: {name} is at least 0, got {value}.")


def check_betas(optimizer: str, betas: tuple[float, ...]) -> None:
    """Raise SpecError unless every decay rate is in [0, 1)."""
    if not all(0 <= beta < 1 for beta in betas):
        raise SpecError(f"{optimizer}: betas are in [0, 1), got {betas}.")
