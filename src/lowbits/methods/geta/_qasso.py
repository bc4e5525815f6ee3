# SPDX-License-Identifier: Apache-2.0
"""QASSO: four stages around the steps of any optimizer, under exact sparsity and bit ranges."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import CheckpointError, SpecError
from lowbits.methods.geta._doomed import Doomed
from lowbits.methods.geta._forgetting import rates, uniform_rate
from lowbits.methods.geta._graph import Graph
from lowbits.methods.geta._launch import Slices, Table
from lowbits.methods.geta._layers import quantizers, weight_quantizers
from lowbits.methods.geta._quantizer import EXPONENTS, HIDING, SMALLEST_RANGE, Quantizer, bits_of, step_of
from lowbits.methods.geta._saliency import check_reachable, lowest, saliency, unit_sums
from lowbits.methods.geta._schedule import START_BITS, Moment, Schedule, Stage, Target

Score = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

TRUST = 0.01
"""Largest change of a quantizer's scalar in one step, as a share of it: its gradient is a sum over a whole tensor."""


class Progress(nn.Module):
    """What the stages remember, as buffers: a checkpoint of this module resumes a run bit for bit.

    Args:
        units: N.
        layers: number of quantizers.
    """

    count: Tensor
    pruned: Tensor
    doomed: Tensor
    bits: Tensor
    climbed: Tensor
    chosen: Tensor

    def __init__(self, units: int, layers: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pruned", torch.zeros(units, dtype=torch.bool))
        self.register_buffer("doomed", torch.zeros(units, dtype=torch.bool))
        self.register_buffer("bits", torch.zeros(layers))
        self.register_buffer("climbed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("chosen", torch.zeros((), dtype=torch.int64))


class Qasso:
    """Prune to an exact sparsity and quantize within a range of bits, while an optimizer of your choice trains.

        qasso = Qasso(model, graph, Target(0.5), Schedule.of(steps=1000))
        qasso.attach(optimizer)                       # from here on optimizer.step() does it all

    Any optimizer with `p.grad` at its step works: SGD, Adam, AdamW, those with 8-bit states. The stages read what it
    did to the doomed coordinates, so that the descent inequality holds for its own direction, decay included. The
    quantizers' scalars are trained here, by projected SGD; the optimizer never sees their gradients, and clipping to a
    global norm does not either, since they are scaled by 2^-40 on their way.

    Args:
        model: with quantizers.
        graph: of the model, traced before they were inserted.
        target: sparsity and bits.
        schedule: of the stages.
        lr: learning rate of the quantizers' scalars, alpha_q.
        score: how much units matter, from ||x||^2, <x, u>, ||u||^2 and their numbers of elements; lowest go first.
        progress: where to remember what is remembered; one of its own if None.
    Raises:
        SpecError: the target cannot be reached, or the model has no quantizers.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        target: Target,
        schedule: Schedule,
        lr: float = 1e-3,
        score: Score = saliency,
        progress: Progress | None = None,
    ) -> None:
        self.sizes = [dimension.size for dimension in graph.dimensions]
        schedule.check(target)
        check_reachable(self.sizes, target)
        self.model, self.graph, self.target, self.schedule, self.lr = model, graph, target, schedule, lr
        self.score = score
        self.quantizers: list[Quantizer] = list(quantizers(model).values())
        if not self.quantizers:
            raise SpecError("Qasso: the model has no quantizers; call geta.quantize_(model) first.")
        self.parameters = _zeroed(graph, model)
        numbers = {id(q): number for number, q in enumerate(self.quantizers)}
        self.layer_of = {name: numbers[id(q)] for name, q in weight_quantizers(model).items()}
        for quantizer in self.quantizers:
            quantizer.hide_gradients_()
        if progress is None:
            progress = Progress(graph.units, len(self.quantizers)).to(next(iter(self.parameters.values())).device)
        self.progress = progress
        self._scalar_gradients: Tensor | None = None
        self._doomed: Doomed | None = None
        self._frozen: list[Slices] | None = None
        self._cleared: Table | None = None
        self._before: Any = None
        self._remembered = False
        self._at = 0
        self._known = (0, 0, 0)

    # --- the seam to an optimizer -----------------------------------------------------------------------------------

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Do `before_step_` and `after_step_` around every step of an optimizer."""
        optimizer.register_step_pre_hook(lambda *_: self.before_step_())
        optimizer.register_step_post_hook(lambda *_: self.after_step_())

    @torch.no_grad()
    def before_step_(self) -> None:
        """Take the scalars' gradients away, and remember what the step is about to change."""
        self.remember_()
        self._take_gradients_()

    def _take_gradients_(self) -> None:
        scalars = [s for q in self.quantizers for s in (q.step, q.limit, q.exponent)]
        gradients = [torch.zeros_like(s) if s.grad is None else s.grad for s in scalars]
        self._scalar_gradients = torch.stack(gradients).view(-1, 3).nan_to_num(0.0, 0.0, 0.0) / HIDING
        for scalar in scalars:
            scalar.grad = None

    @torch.no_grad()
    def remember_(self) -> None:
        """Remember what the next optimizer step will change; may be called any number of times before it."""
        self._remembered = True
        self._at = self._step_number()
        moment = self.moment
        self._before = None
        if moment.stage is Stage.JOINT and self.target.pruned(self.graph.units):
            if moment.index == 0:
                self._before = {name: p.detach().clone() for name, p in self.parameters.items()}
            else:
                self._before = self.doomed_rows().gather()

    @torch.no_grad()
    def after_step_(self) -> None:
        """Do what the stage asks for after the optimizer's step."""
        if not self._remembered:
            raise SpecError("Qasso: after_step_() without before_step_(); call it before the optimizer's step.")
        if self._scalar_gradients is None:
            self._take_gradients_()
        self._freeze_()
        moment, scalars = self.moment, self._scalars()
        new = self._stepped(scalars)
        if moment.stage is Stage.JOINT and self._before is not None:
            if moment.index == 0:
                self._choose_(moment)
            new = self._forget_(moment, scalars, new)
        self._write_(moment, new)
        if moment.stage is Stage.JOINT and moment.index == moment.length - 1:
            self.progress.pruned |= self.progress.doomed
            self.progress.doomed.zero_()
            self._doomed = self._frozen = None
            self._freeze_()
        self.progress.count += 1
        self._known = (id(self.progress.count), self.progress.count._version, self._at + 1)
        self._scalar_gradients = self._before = None
        self._remembered = False

    def _step_number(self) -> int:
        """Return the count of steps; it is read from its buffer only where somebody else has written that."""
        place, version, number = self._known
        count = self.progress.count
        return number if (place, version) == (id(count), count._version) else int(count)

    @property
    def moment(self) -> Moment:
        """Place within the stages of the step that is under way."""
        return self.schedule.at(self._at, self.target)

    # --- quantizers -------------------------------------------------------------------------------------------------

    def _scalars(self) -> Tensor:
        """Return step, range and exponent of every quantizer, `[L, 3]`."""
        flat = [s.detach() for q in self.quantizers for s in (q.step, q.limit, q.exponent)]
        return torch.stack(flat).view(-1, 3)

    def _stepped(self, scalars: Tensor) -> Tensor:
        """Take a plain step of SGD, none by more than a share of itself."""
        assert self._scalar_gradients is not None
        bound = TRUST * scalars
        new = scalars - (self.lr * self._scalar_gradients).clamp(-bound, bound)
        new[:, 1].clamp_(min=SMALLEST_RANGE)
        new[:, 2].clamp_(*EXPONENTS)
        return new

    def ceiling(self, moment: Moment) -> float:
        """Return the most bits that a quantizer may have."""
        if moment.stage is Stage.WARM_UP:
            return START_BITS
        return self.target.ceilings()[moment.period] if moment.stage is Stage.PROJECTION else self.target.highest

    def _write_(self, moment: Moment, new: Tensor) -> None:
        """Project the steps into the range of bits that the stage allows, and store the scalars."""
        step, limit, exponent = new.unbind(1)
        if moment.stage is Stage.COOL_DOWN:
            if moment.index == 0:
                self.progress.bits.copy_(self._whole(bits_of(*self._scalars().unbind(1))))
            step = step_of(self.progress.bits, limit, exponent)
        else:
            finest = step_of(self.ceiling(moment), limit, exponent)
            step = step.clamp(finest, step_of(self.target.lowest, limit, exponent))
        flat = torch.stack([step, limit, exponent], 1).view(-1).unbind()
        scalars = [s for q in self.quantizers for s in (q.step, q.limit, q.exponent)]
        torch._foreach_copy_(scalars, list(flat))  # type: ignore[reportPrivateImportUsage]

    def _whole(self, bits: Tensor) -> Tensor:
        low, high = torch.tensor(self.target.lowest).ceil(), torch.tensor(self.target.highest).floor()
        return bits.round().clamp(float(low), float(high))

    # --- units ------------------------------------------------------------------------------------------------------

    def _freeze_(self) -> None:
        """Hold pruned slices at zero."""
        if self._frozen is None:
            self._frozen = _rows(self.graph, self.parameters, self.progress.pruned.cpu())
            self._cleared = Table(self._frozen) if Table.takes(s.parameter for s in self._frozen) else None
        if self._cleared is not None:
            self._cleared.clear_()
            return
        for slices in self._frozen:
            slices.parameter.index_fill_(slices.axis, slices.rows, 0.0)

    def doomed_rows(self) -> Doomed:
        """Return the coordinates of the units that this period forgets."""
        if self._doomed is None:
            self._doomed = Doomed(self.graph, self.parameters, self.layer_of, self.progress.doomed.cpu())
        return self._doomed

    def _choose_(self, moment: Moment) -> None:
        """Score every live unit with the step just taken, and doom the lowest."""
        x, u = self._before, {n: self._before[n] - p.detach() for n, p in self.parameters.items()}
        sums = [
            unit_sums(self.graph, products)
            for products in (
                {name: value.float().square() for name, value in x.items()},
                {name: value.float() * u[name].float() for name, value in x.items()},
                {name: value.float().square() for name, value in u.items()},
                {name: torch.ones_like(value, dtype=torch.float32) for name, value in x.items()},
            )
        ]
        total, periods = self.target.pruned(self.graph.units), self.schedule.periods
        number = total // periods if moment.period < periods - 1 else total - (periods - 1) * (total // periods)
        live = ~self.progress.pruned.cpu()
        chosen = lowest(self.score(*sums).cpu(), live, self.sizes, self.target, number)
        self.progress.doomed.copy_(chosen)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # Sums on a GPU depend on the order of its threads: replicas must not choose other units by a rounding.
            units = self.progress.doomed.to(torch.uint8)
            torch.distributed.broadcast(units, 0)
            self.progress.doomed.copy_(units)
        self._doomed = None
        self._before = self.doomed_rows().gather(self._before)

    def _forget_(self, moment: Moment, old: Tensor, new: Tensor) -> Tensor:
        """Decay the doomed coordinates; return the scalars with the steps that the rule chose."""
        rows = self.doomed_rows()
        if not rows.pieces:
            return new
        limit, exponent = new[:, 1], new[:, 2]
        finest = step_of(self.target.highest, limit, exponent)
        coarsest = step_of(self.target.lowest, limit, exponent)
        found = rows.products(self._before, old)
        chosen = rates(found, rows.pairs, finest, coarsest, uniform_rate(moment.index, moment.length))
        rows.decay_(self._before, old, chosen)
        self.progress.chosen += rows.dimensions
        self.progress.climbed += ((chosen.slope >= 0) & (found.descent > 0)).sum()
        return torch.cat([torch.where(chosen.step.isnan(), new[:, 0], chosen.step)[:, None], new[:, 1:]], 1)

    # --- what came of it --------------------------------------------------------------------------------------------

    @property
    def keep(self) -> Tensor:
        """The units that stay so far, bool `[units]` on the CPU."""
        return ~self.progress.pruned.cpu()

    @property
    def done(self) -> bool:
        """Whether all units are gone that shall go, and all bits are whole."""
        at = self.schedule.at(max(self._step_number() - 1, 0), self.target)
        return at.stage is Stage.COOL_DOWN

    @property
    def bits(self) -> dict[str, float]:
        """Bits of every quantizer now."""
        widths = bits_of(*self._scalars().unbind(1)).tolist()
        return dict(zip(quantizers(self.model), widths, strict=True))

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside the model's and the optimizer's state."""
        return {name: tensor.clone() for name, tensor in self.progress.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where `state_dict` was called.

        Raises:
            CheckpointError: it belongs to another model.
        """
        own = self.progress.state_dict()
        for name, tensor in own.items():
            if name not in state or state[name].shape != tensor.shape:
                found = list(state[name].shape) if name in state else "missing"
                raise CheckpointError(
                    f"Qasso: the state does not fit this model, {name} is {found} instead of {list(tensor.shape)}; "
                    "load the state of a run of the same model and graph."
                )
        self.progress.load_state_dict(dict(state))
        self._doomed = self._frozen = None


def _zeroed(graph: Graph, model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have slices driven to zero, by name."""
    wanted = {member.name for dimension in graph.dimensions for member in dimension.members if member.zeroed}
    found = dict(model.named_parameters(remove_duplicate=False))
    if missing := sorted(wanted - found.keys()):
        raise SpecError(
            f"Qasso: the graph is of another model, this one has no parameter {missing[0]}; trace it again."
        )
    return {name: parameter for name, parameter in found.items() if name in wanted}


def _rows(graph: Graph, parameters: Mapping[str, nn.Parameter], units: Tensor) -> list[Slices]:
    """Return the slices of some units, parameter by parameter and axis by axis."""
    masks: dict[tuple[str, int], Tensor] = {}
    for dimension, part in zip(graph.dimensions, units.split([d.size for d in graph.dimensions]), strict=True):
        padded = torch.cat([part, torch.zeros(1, dtype=torch.bool)])
        for member in dimension.members:
            if member.zeroed and part.any():
                key = member.name, member.axis
                hit = padded[member.index]
                masks[key] = masks[key] | hit if key in masks else hit
    return [
        Slices(parameters[name], axis, mask.nonzero().squeeze(1).to(parameters[name].device))
        for (name, axis), mask in masks.items()
    ]
