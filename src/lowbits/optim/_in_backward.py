# SPDX-License-Identifier: Apache-2.0
"""Update each parameter as soon as its gradient is complete, and free the gradient.

At no time do the gradients of all parameters exist, only that of the layer which backward is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from lowbits.errors import SpecError
from lowbits.optim._clipping import GlobalNorm
from lowbits.optim._optimizer import CodecOptimizer, Target


class StepInBackward:
    """What `step_in_backward` installed; `remove` takes it away."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles
        self._accumulating = False

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Let gradients add up within the block, for all but the last of several micro-batches."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Take the hooks off the parameters: `step()` is the ordinary one again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @property
    def accumulating(self) -> bool:
        """Whether gradients add up."""
        return self._accumulating


def step_in_backward(model: nn.Module, optimizer: CodecOptimizer) -> StepInBackward:
    """Update the model's parameters within `loss.backward()`, with the same numbers as `optimizer.step()` to the bit.

    The training loop stays as it is: `step()` then finds no gradients, and does nothing but for parameters that are
    not the model's; schedulers set the learning rate of the next backward. There are no gradients after backward, so
    what needs all of them cannot be had: a global norm, a loss scale (`GradScaler`), a second look at the gradients.
    Tied parameters are updated once, when the gradients of all their uses have been added. Reentrant checkpointing
    completes a gradient more than once where a parameter is used in several segments; use `use_reentrant=False`.

    With `fully_shard` call it after wrapping: the hooks see the reduced shards.

    Python does not see through hooks: parameters and optimizer are freed after `remove` only.

    Args:
        model: whose parameters are updated in its backward.
        optimizer: that has them.
    Returns:
        A handle to accumulate gradients, and to undo this.
    Raises:
        SpecError: the optimizer clips to a global norm, does not have the model's parameters, or the model holds a
            `DistributedDataParallel`, which averages gradients only after they are complete.

    >>> from lowbits.optim import AdamW
    >>> model = nn.Linear(4, 2)
    >>> handle = step_in_backward(model, AdamW(model.parameters()))
    >>> model(torch.ones(1, 4)).sum().backward()
    >>> model.weight.grad is None
    True
    """
    name = type(optimizer).__name__
    if isinstance(optimizer.clip, GlobalNorm):
        raise SpecError(
            f"step_in_backward: {name} has clip={optimizer.clip}, and a global norm needs all gradients at once. "
            "Pass clip=Percentile(...), which looks at each gradient alone, or None."
        )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise SpecError(
            "step_in_backward: DistributedDataParallel averages gradients after they are complete, too late for an "
            "update in backward. Use fully_shard, or optimizer.step()."
        )
    parameters = {id(p) for p in model.parameters()}
    places = [
        (p, number, index)
        for number, group in enumerate(optimizer.param_groups)
        for index, p in enumerate(group["params"])
        if id(p) in parameters and p.requires_grad
    ]
    if not places:
        raise SpecError(
            f"step_in_backward: {name} has none of the parameters of {type(model).__name__}. Make the optimizer from "
            "this model, after wrapping and moving it."
        )
    result = StepInBackward([])
    result._handles = [p.register_post_accumulate_grad_hook(_hook(optimizer, n, i, result)) for p, n, i in places]
    return result


def _hook(optimizer: CodecOptimizer, number: int, index: int, owner: StepInBackward) -> Callable[[Tensor], None]:
    @torch.no_grad()
    def update(p: Tensor) -> None:
        if owner.accumulating:
            return
        # The group is looked up each time: load_state_dict puts new ones in place.
        optimizer._step_([Target(p, optimizer.param_groups[number], f"{number}.{index}")])
        p.grad = None

    return update
