# SPDX-License-Identifier: Apache-2.0
"""Notice what goes wrong in a training, and find where it began."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbits.nn import QuantizedConv1D, QuantizedLinear
from lowbits.train._state import Progress

WINDOW = 32  # losses that a spike is measured against
_LEAST = 16  # no verdict on fewer
_SIGMAS = 6.0
_NATS = 0.2
_MAD_TO_SIGMA = 1.4826  # of a normal distribution


@dataclass(frozen=True)
class Event:
    """Something out of the ordinary.

    Args:
        event: `skipped`, `spike`, `nonfinite`, `diverged`, `resumed`, `fallback`, `interrupted` or `phase`.
        message: one sentence.
        layer: where, if known.
        role: `weight`, `input`, `output` or `gradient`, if known; of a `nonfinite` operand `weight`, `input` or `grad`.
    """

    event: str
    message: str
    layer: str = ""
    role: str = ""


@dataclass(frozen=True)
class Source:
    """Where the first number that is not finite was seen.

    Args:
        layer: name of the module; `loss` if only the loss was affected.
        role: `weight`, `input`, `output` or `gradient`.
    """

    layer: str
    role: str


def judge(progress: Progress, loss: float, grad_norm: float) -> list[Event]:
    """Count a step in `progress` and return what was out of the ordinary.

    A step is skipped if its loss or gradient is not finite. A loss is a spike if it exceeds the median of the last 32
    finite ones by 6 robust standard deviations (1.4826 times the median absolute deviation) and by 0.2 nats; no verdict
    before 16 losses.

    Args:
        progress: of the run; `streak`, `skipped`, `spikes` and `recent` are brought up to date.
        loss: of the step.
        grad_norm: before clipping.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        progress.streak += 1
        progress.skipped += 1
        what = "gradient" if math.isfinite(loss) else "loss"
        return [Event("skipped", f"non-finite {what}, step skipped ({progress.streak} in a row)")]
    progress.streak = 0
    events = []
    limit = spike_limit(progress.recent)
    if loss > limit:
        progress.spikes += 1
        events.append(Event("spike", f"loss {loss:.3f} exceeds {limit:.3f}, the limit set by the last {WINDOW} steps"))
    progress.recent = [*progress.recent, loss][-WINDOW:]
    return events


def spike_limit(recent: list[float]) -> float:
    """Return the loss above which a step is a spike; infinite while there are too few losses.

    Args:
        recent: the last losses, all finite.
    """
    if len(recent) < _LEAST:
        return math.inf
    median = statistics.median(recent)
    deviation = statistics.median(abs(loss - median) for loss in recent)
    return median + max(_SIGMAS * _MAD_TO_SIGMA * deviation, _NATS)


def find_source(model: nn.Module, loss_of_batch: Callable[[], Tensor]) -> Source | None:
    """Run a batch again and return where a number first was not finite, forward before backward.

    Args:
        model: not wrapped; its gradients are overwritten.
        loss_of_batch: runs the forward pass and returns the loss.
    Returns:
        The source, or None if all is finite this time.
    """
    model.zero_grad(set_to_none=True)
    # Compiled blocks would not call the hooks.
    with torch.compiler.set_stance("force_eager"), _watched(model) as found:
        loss = loss_of_batch()
        if not found and not loss.isfinite():
            found.append(Source("loss", "output"))
        if not found:
            loss.backward()
    if not found:
        bad = [name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        found += [Source(name.rpartition(".")[0], "gradient") for name in bad]
    model.zero_grad(set_to_none=True)
    return found[0] if found else None


@contextmanager
def _watched(model: nn.Module) -> Iterator[list[Source]]:
    """Collect sources in the order in which they are seen, while the block runs the model."""
    found: list[Source] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedConv1D) or any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(_before(name, found)))
            handles.append(module.register_forward_hook(_after(name, found)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _before(name: str, found: list[Source]) -> Callable[[nn.Module, tuple[object, ...]], None]:
    def hook(module: nn.Module, inputs: tuple[object, ...]) -> None:
        for parameter in module.parameters(recurse=False):
            _look(parameter, Source(name, "weight"), found)
        for x in _floats(inputs):
            _look(x, Source(name, "input"), found)

    return hook


def _after(name: str, found: list[Source]) -> Callable[[nn.Module, tuple[object, ...], object], None]:
    def hook(_: nn.Module, inputs: tuple[object, ...], outputs: object) -> None:
        for y in _floats(outputs):
            _look(y, Source(name, "output"), found)
        for tensor in [*_floats(outputs), *_floats(inputs)]:
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: _look(gradient, Source(name, "gradient"), found))

    return hook


def _look(tensor: Tensor, source: Source, found: list[Source]) -> None:
    if not found and not tensor.isfinite().all():
        found.append(source)


def _floats(values: object) -> list[Tensor]:
    several = values if isinstance(values, tuple) else (values,)
    return [value for value in several if isinstance(value, Tensor) and value.is_floating_point()]
