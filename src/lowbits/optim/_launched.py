# SPDX-License-Identifier: Apache-2.0
"""Update all parameters of an optimizer in two or three launches; see `lowbits.kernels.optimizer`.

Tables on the device are built when other parameters have gradients than before, or a state was put elsewhere;
afterwards a step compares addresses, sends what changed (as a rule the learning rate alone), and launches. Nothing
waits for the device.

Which parameters: float32, bfloat16 and float16 ones, all on one CUDA device, contiguous, under an element-wise rule,
with moments in float32 or in `Blockwise` codes of one block size. The rest is left to the other paths.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lowbits.optim._multi_tensor import Tables
from lowbits.optim._signature import Signature, signature_of, usable

if TYPE_CHECKING:
    from lowbits.optim._optimizer import CodecOptimizer, Target

_KEPT = 4  # rows of tables kept for each parameter


def update_(optimizer: CodecOptimizer, targets: Sequence[Target]) -> Sequence[Target]:
    """Update those parameters that the kernels know how to.

    Args:
        optimizer: whose state has been made.
        targets: parameters with gradients.
    Returns:
        The rest, untouched; all of it where the rest is not empty but the gradients must be scaled together.
    """
    if torch.compiler.is_compiling() or not any(usable(t.parameter.device) for t in targets[:1]):
        return targets
    members = [(target, signature_of(optimizer, target)) for target in targets]
    taken = [(target, signature) for target, signature in members if signature is not None]
    rest = [target for target, signature in members if signature is None]
    devices = {target.parameter.device for target, _ in taken}
    built: Built = vars(optimizer).setdefault(_BUILT, Built())
    if len(devices) != 1 or (rest and _scaled(optimizer)):
        taken, rest = [], list(targets)
    for target in rest:
        built.counts.pop(target.parameter, None)
    if not taken:
        return rest
    with _current(devices.pop()):
        known = built.tables_for(optimizer, taken)
        known.launch()
    built.last = None if rest or _capturing() else known
    return rest


def repeat_(optimizer: CodecOptimizer) -> bool:
    """Do the step as the last one was done; False where other parameters have gradients now."""
    built: Built | None = vars(optimizer).get(_BUILT)
    known = built.last if built is not None else None
    if known is None or not known.covers_all() or _capturing():
        return False
    with _current(known.device):
        if not known.refresh():
            return False
        known.launch()
    return True


def forget(optimizer: CodecOptimizer) -> None:
    """Drop what was built: states or groups are others now."""
    vars(optimizer).pop(_BUILT, None)


@dataclass
class Built:
    """What one optimizer has built.

    Args:
        tables: by the parameters that they update.
        captured: tables that a CUDA graph reads at each replay. Ordinary steps leave them as they were captured.
        last: what updated all parameters with gradients in the last step.
        counts: how many updates a parameter had, for rules whose constants change with the step. A step that the
            device skips counts here all the same.
    """

    tables: dict[tuple[int, ...], Tables] = field(default_factory=dict)
    captured: dict[tuple[int, ...], Tables] = field(default_factory=dict)
    last: Tables | None = None
    counts: dict[Tensor, int] = field(default_factory=dict)

    def tables_for(self, optimizer: CodecOptimizer, members: Sequence[tuple[Target, Signature]]) -> Tables:
        """Return tables that fit this step."""
        name, home = tuple(id(target.parameter) for target, _ in members), self.tables
        if _capturing():
            home = self.captured
            if name in self.tables:
                home[name] = self.tables.pop(name)
        known = home.get(name)
        if known is None or not known.has_states() or not known.refresh():
            home.pop(name, None)
            self._make_room(optimizer)
            known = home[name] = Tables(optimizer, members, self.counts)
            fits = known.refresh()
            assert fits, "tables that were built just now fit"
        if home is self.captured:  # replays are not counted
            for p in known.parameters:
                self.counts.pop(p, None)
        return known

    def _make_room(self, optimizer: CodecOptimizer) -> None:
        """Drop the oldest tables where they are many: each step of a mixture of experts may have other gradients."""
        room = _KEPT * sum(len(group["params"]) for group in optimizer.param_groups)
        while self.tables and sum(map(len, self.tables)) > room:
            del self.tables[next(iter(self.tables))]


# The optimizer itself keeps it: a table of this module's would keep parameters alive, which the hooks of
# `step_in_backward` tie to the optimizer, for good. Copies and pickles leave it out, see `CodecOptimizer.__getstate__`.
_BUILT = "_built"


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _current(device: torch.device) -> torch.cuda.device | nullcontext[None]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _scaled(optimizer: CodecOptimizer) -> bool:
    names = ("grad_scale", "found_inf")
    return optimizer.clip is not None or any(getattr(optimizer, name, None) is not None for name in names)
