# SPDX-License-Identifier: Apache-2.0
"""What all optimizers share: states in codecs, clipping, write-back, checkpoints. A subclass brings its rule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypedDict, Unpack

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from lowbits.errors import SpecError
from lowbits.nn import QParameter
from lowbits.optim import _compiled, _launched
from lowbits.optim._checkpoint import by_parameter, check_layouts, check_same_groups, check_state, restored_rate
from lowbits.optim._checks import check_betas as check_betas
from lowbits.optim._checks import check_gradient, check_group, check_options, check_parameters
from lowbits.optim._checks import check_not_negative as check_not_negative
from lowbits.optim._clipping import HISTORY, Clip, Percentile, gradient_factors, new_history
from lowbits.optim._codec import FLOAT32, StateCodec
from lowbits.optim._grid import as_float32, name_of, write_codes_
from lowbits.optim._interchange import translated
from lowbits.optim._rule import Rule, Scalars, power
from lowbits.optim._sharding import (
    add_up_gradient_,
    as_stored,
    first_element,
    fitted,
    is_sharded,
    local,
    shard_of,
)
from lowbits.quantizers import Noise, Rounding


class Options(TypedDict, total=False):
    """Keyword arguments that every optimizer takes.

    Args:
        clip: `GlobalNorm(limit)` scales all gradients down to a common norm, `Percentile()` each one to its own past;
            both inside the step. What a norm that is not finite belongs to is left as it is: parameters, moments and
            step counters. Without clipping NaN and infinity go into the parameters, as in torch; they are never hidden.
            Default: None.
        rounding: of bfloat16 and float16 parameters after the float32 update; `Rounding.STOCHASTIC` (bfloat16 alone)
            trains without a master copy. Default: nearest.
        min_8bit_size: tensors of fewer elements keep float32 moments, whatever their codec. A group may
            override it, `math.inf` keeps all of it in float32. Default 0; the 8- and 4-bit constructors set 4096.
        seed: of the random bits of stochastic rounding.
        offload: keep the moments of CUDA parameters in pinned host memory, where the kernels read and write them over
            the bus: for states that the GPU's memory does not hold. The numbers are the same. Default: False.
    """

    clip: Clip | None
    rounding: Rounding
    min_8bit_size: float
    seed: int
    offload: bool


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
    _step_supports_amp_scaling = True  # torch.amp.GradScaler leaves the unscaling to the step

    def __init__(
        self,
        params: Iterable[Any],
        hyper: dict[str, Any],
        codecs: Mapping[str, StateCodec],
        **options: Unpack[Options],
    ) -> None:
        name = type(self).__name__
        check_options(name, options, Options.__annotations__.keys())
        params = params if isinstance(params, Tensor) else list(params)
        if isinstance(params, list) and not params:
            raise SpecError(
                f"{name}: no parameters; a generator is empty after its first use. Pass model.parameters()."
            )
        self.clip, self.seed = options.get("clip"), options.get("seed", 0)
        self.rounding, self.offload = options.get("rounding", Rounding.NEAREST), options.get("offload", False)
        self._shapes: dict[Tensor, torch.Size] = {}
        super().__init__(params, {**hyper, **codecs, "min_8bit_size": options.get("min_8bit_size", 0)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with any of the constructor's arguments, codecs too, for them alone.

        Raises:
            SpecError: an argument does not exist or is out of range; a parameter is no real float, or is there already.
        """
        name = type(self).__name__
        check_group(name, param_group, self.defaults)
        params = param_group["params"]
        if not isinstance(params, set):  # which torch refuses
            params = [params] if isinstance(params, Tensor) else list(params)
            tensors = [p[1] if isinstance(p, tuple) else p for p in params]
            check_parameters(name, tensors, [p for group in self.param_groups for p in group["params"]])
        super().add_param_group({**param_group, "params": params})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy needs; torch's own version forgets all but the groups."""
        return super().__getstate__() | {
            key: vars(self)[key] for key in ("clip", "seed", "rounding", "offload", "_shapes")
        }

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
        if not self._repeat_():
            self._step_([target for target in self._targets() if target.parameter.grad is not None])
        return loss

    def _targets(self) -> Iterator[Target]:
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                yield Target(p, group, f"{number}.{index}")

    @_disable_dynamo
    def _repeat_(self) -> bool:
        return _launched.repeat_(self)

    @_disable_dynamo  # as torch's own methods; its trace rounds scalars otherwise, and this is compiled already
    def _step_(self, targets: Sequence[Target]) -> None:
        """Update parameters that have gradients."""
        targets = [target for target in targets if target.parameter.numel()]
        if not targets:
            return
        for target in targets:
            self._prepare_(target)
        targets = _launched.update_(self, targets)
        if not targets:
            return
        factors = self._gradient_factors(targets)
        work: list[tuple[Target, Tensor | None]] = [(target, None) for target in targets]
        if factors is not None:
            each, finite = factors.expand(len(targets)), factors.isfinite().expand(len(targets)).tolist()
            work = [(t, f.to(t.parameter.device)) for t, f, ok in zip(targets, each, finite, strict=True) if ok]
        for target, factor in _compiled.update_(self, work):
            self._update_(target, factor)

    def _prepare_(self, target: Target) -> None:
        """Check the gradient and make the state of a parameter that has none."""
        p = target.parameter
        check_gradient(type(self).__name__, target.name, p, self._shapes.setdefault(p, p.shape))
        add_up_gradient_(p)
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            for moment, codec in self.codecs(p, target.group).items():
                stored = codec.init(local(p))
                parts = {f"{moment}.{part}": as_stored(tensor, p) for part, tensor in stored.items()}
                state.update({name: self._placed(tensor) for name, tensor in parts.items()})
        if isinstance(self.clip, Percentile) and HISTORY not in state:
            state[HISTORY] = new_history(self.clip, p.device)

    def _placed(self, stored: Tensor) -> Tensor:
        """Return a state tensor where it is to stay."""
        if not self.offload or stored.device.type != "cuda":
            return stored
        if is_sharded(stored):
            raise SpecError(
                f"{type(self).__name__}: offload=True does not work with sharded parameters, whose states are sharded. "
                "Shard over more ranks, or use fewer bits."
            )
        return torch.empty_like(stored, device="cpu", pin_memory=True).copy_(stored)

    def codecs(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, StateCodec]:
        """Return how each moment of a parameter is stored, which need not be as its group says."""
        return {moment: codec for moment, (codec, _) in self.storage(p, group).items()}

    def storage(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[StateCodec, str]]:
        """Return how each moment of a parameter is stored, and why where that is not as its group says."""
        moments = self.rule_of(group).moments
        if p.numel() < group["min_8bit_size"]:
            return {moment: (FLOAT32, f"fewer than {group['min_8bit_size']} elements") for moment in moments}
        return {moment: fitted(group[moment], p) for moment in moments}

    def _gradient_factors(self, targets: Sequence[Target]) -> Tensor | None:
        """Return `gradient_factors`; torch.amp.GradScaler leaves `grad_scale` and `found_inf` here for the step."""
        gradients = [t.parameter.grad for t in targets if t.parameter.grad is not None]
        states = [self.state[t.parameter] for t in targets]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        return gradient_factors(self.clip, gradients, states, scale, found_inf)

    def _update_(self, target: Target, factor: Tensor | None) -> None:
        p, group = local(target.parameter), target.group
        state, codecs = self.state[target.parameter], self.codecs(target.parameter, group)
        state["step"] += 1
        g = local(target.parameter.grad).float()  # type: ignore[arg-type]
        g = g if factor is None else g * factor
        parts = {moment: parts_of(state, moment) for moment in codecs}
        stored = {moment: {name: t.to(p.device) for name, t in found.items()} for moment, found in parts.items()}
        moments = tuple(codec.decode(stored[moment], p.shape) for moment, codec in codecs.items())
        new, moments = self._new(target, as_float32(p), g, moments, self._scalars(group, state["step"]))
        step = state["step"].to(torch.int64)
        self._write_(target, new, step)
        for (moment, codec), value in zip(codecs.items(), moments, strict=True):
            codec.encode_(stored[moment], value, Noise.of(self.seed, target.name, moment), step)
            for name, tensor in stored[moment].items():
                if tensor is not parts[moment][name]:  # offloaded
                    parts[moment][name].copy_(tensor)

    def rule_of(self, group: Mapping[str, Any]) -> Rule:
        """Return the rule that a group's parameters follow; one that has no moments stores none."""
        return self.rule

    def _new(
        self, target: Target, p: Tensor, g: Tensor, moments: tuple[Tensor, ...], h: Scalars
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what the update makes of a tensor; rules that look at whole tensors override this (`_tensorwise`)."""
        return self.rule_of(target.group).update(p, g, moments, h)

    def _scalars(self, group: dict[str, Any], step: Tensor) -> Scalars:
        t, rule = int(step), self.rule_of(group)
        constants = {"lr": float(group["lr"])} | rule.constants(group, t)
        constants |= {f"c_{name}": 1 - power(constants[name], t) for name in rule.corrections}
        return {k: torch.tensor(v, dtype=torch.float32, device=step.device) for k, v in constants.items()}

    def _write_(self, target: Target, new: Tensor, step: Tensor) -> None:
        """Round a float32 parameter, or this rank's shard of it, to its own dtype or onto its grid."""
        p = local(target.parameter)
        if isinstance(p, QParameter):
            write_codes_(target.parameter, new, Noise.of(self.seed, name_of(p, target.name), "weight"), step)
            return
        if self.rounding is Rounding.STOCHASTIC and p.dtype == torch.bfloat16:
            # A float32 lies between two bfloat16 in proportion to its lower 16 bits.
            noise, first = Noise.of(self.seed, target.name, "weight"), first_element(target.parameter)
            bits = noise.bits16(p.shape, step, offset=first, device=p.device).to(torch.int32)
            new = torch.where(new.isfinite(), ((new.view(torch.int32) + bits) & -0x10000).view(torch.float32), new)
        p.copy_(new)

    def moment(self, p: Tensor, name: str) -> Tensor:
        """Return a moment of a parameter as the next step will see it.

        Args:
            p: a parameter that was updated before.
            name: one of the rule's moments.
        Returns:
            float32, of the parameter's shape; sharded like it.
        """
        group = next(group for group in self.param_groups if any(p is q for q in group["params"]))
        return as_stored(self.codecs(p, group)[name].decode(parts_of(self.state[p], name), local(p).shape), p)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return torch's layout with plain data only: in place of a codec stands what it stores, in words."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group.update({key: group[key].layout for key in self.stores})
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, codes bit for bit; or go on from torch's or bitsandbytes' optimizer.

        torch's own version would cast every state tensor to the parameter's dtype. A learning rate that is a tensor
        stays the same tensor.

        Args:
            state_dict: of this library, of `torch.optim` (its moments are encoded), or of bitsandbytes (its codes are
                taken over, and encoded anew where blocks or code book are others).
        Raises:
            CheckpointError: the state does not fit this optimizer's parameters and codecs; nothing is changed then.
        """
        _launched.forget(self)
        check_same_groups(state_dict, self.param_groups)
        state_dict = translated(state_dict, self)
        check_layouts(state_dict, [{key: group[key] for key in self.stores} for group in self.param_groups])
        states = by_parameter(state_dict, self.param_groups)
        for index, (p, group, state) in enumerate(states):
            if state:
                check_state(self, index, p, group, state)
        kept = [{key: group[key] for key in ("lr", "min_8bit_size", *self.stores)} for group in self.param_groups]
        super().load_state_dict({**state_dict, "state": {}})
        for group, ours in zip(self.param_groups, kept, strict=True):
            ours["lr"] = restored_rate(ours["lr"], group["lr"], [other["lr"] for other in kept if other is not ours])
            group.update(ours)
        for p, _, state in states:
            if state:
                copies = {name: t.to(p.device, copy=True) for name, t in state.items()}
                placed = {name: t if name == HISTORY else shard_of(t, p) for name, t in copies.items()}
                self.state[p] = {name: self._placed(t) if "." in name else t for name, t in placed.items()}

    @property
    def stores(self) -> list[str]:
        """The keys of a group that are codecs."""
        return [key for key, value in self.defaults.items() if hasattr(value, "encode_")]


def parts_of(state: Mapping[str, Tensor], moment: str) -> dict[str, Tensor]:
    """Return what this rank has of one moment's tensors, under their names in the codec."""
    prefix = moment + "."
    return {name.removeprefix(prefix): local(tensor) for name, tensor in state.items() if name.startswith(prefix)}
