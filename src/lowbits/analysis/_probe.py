# SPDX-License-Identifier: Apache-2.0
"""Rank the layers of a model by what a recipe does to the outputs of their GEMMs, and say which to keep as they are.

    ||Y_hat - Y|| / ||Y||,   the same for dX and dW,   with X and G of a high-precision pass over real batches

"Pretraining Large Language Models with NVFP4" (arXiv:2509.25149, app. E.2) looks at the error of dW and finds it
largest in the last layers: those stay in bfloat16. An operand's own error says less, since a GEMM averages it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowbits.analysis._evaluating import evaluating
from lowbits.errors import SpecError
from lowbits.nn import QuantizedLayer, Recipe, high_precision, quantized_layers, set_step_

Batch = TypeVar("Batch")
Loss = Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class LayerProbe:
    """What a recipe does to one layer.

    Args:
        fprop: relative error of Y, Frobenius, mean over the batches; 0 in high precision, inf where it is not finite.
        dgrad: likewise of dX.
        wgrad: likewise of dW.
        wgrad_deviation: standard deviation of the latter over the batches; NaN for a single one.
        flops_share: its share of the FLOPs of all converted layers, 0 to 1; the head is not among them as a rule.
    """

    fprop: float
    dgrad: float
    wgrad: float
    wgrad_deviation: float
    flops_share: float


def probe_layers(
    model: nn.Module, loss: Loss[Batch], batches: Sequence[Batch], advance: Callable[[], object] = lambda: None
) -> dict[str, LayerProbe]:
    """Measure the outputs of all GEMMs of every converted layer, each under its own recipe and on exact inputs.

    Stochastic rounding takes another draw for every batch, always the same ones.

    Args:
        model: converted; run in `eval` mode, left as it was: no `.grad` is touched.
        loss: `(model, batch) -> scalar`.
        batches: what to run; real ones, since errors depend on what flows through.
        advance: called after every layer of every batch, to move a progress bar.
    Returns:
        By layer name, in the order of the model; layers that got no gradient are left out.
    Raises:
        SpecError: no batch, or no converted layer.
    """
    recipes = {name: layer.recipe for name, layer in quantized_layers(model).items()}
    if not recipes or not batches:
        raise SpecError(f"probe_layers: needs a converted layer and a batch, got {len(recipes)} and {len(batches)}.")
    found: dict[str, list[list[float]]] = {name: [] for name in recipes}
    with evaluating(model), high_precision(model):
        for number, batch in enumerate(batches):
            set_step_(model, number)
            sums = _one_batch(model, loss, batch, recipes, advance)
            for name, row in zip(sums, torch.stack(list(sums.values())).tolist() if sums else [], strict=True):
                found[name].append(row)
    weights = {name: layer.weight.numel() for name, layer in quantized_layers(model).items()}
    total = sum(weights.values())
    return {name: _mean(rows, weights[name] / total) for name, rows in found.items() if rows}


def _one_batch(
    model: nn.Module, loss: Loss[Batch], batch: Batch, recipes: Mapping[str, Recipe], advance: Callable[[], object]
) -> dict[str, Tensor]:
    """Relative errors [3] by layer; a layer that runs twice gives its last call."""
    seen: dict[str, Tensor] = {}

    def measure(name: str, layer: QuantizedLayer, x: Tensor, g: Tensor) -> None:
        seen[name] = _output_errors(layer, recipes[name], x, g)
        advance()

    with _gradients_of_outputs(model, measure):
        value = loss(model, batch)
        torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return {name: seen[name] for name in recipes if name in seen}


@contextmanager
def _gradients_of_outputs(
    model: nn.Module, measure: Callable[[str, QuantizedLayer, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call `measure` with X and G of every layer as the backward pass comes to it, so that one layer's are there."""

    def watch(name: str, layer: QuantizedLayer) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()
            if output.requires_grad and layer.weight.requires_grad:
                output.register_hook(lambda g: measure(name, layer, x, g.detach()))

        return hook

    handles = [layer.register_forward_hook(watch(n, layer)) for n, layer in quantized_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _output_errors(layer: QuantizedLayer, recipe: Recipe, x: Tensor, g: Tensor) -> Tensor:
    """Relative errors of Y without its bias, dX and dW, float64 [3]."""
    exact = _outputs(layer, x, g)
    layer.recipe = recipe
    try:
        rounded = _outputs(layer, x, g)
    finally:
        layer.recipe = Recipe()
    bias = 0.0 if layer.bias is None else layer.bias.detach()
    signal = [exact[0] - bias, *exact[1:]]
    noise = [a - b for a, b in zip(rounded, exact, strict=True)]
    norms = [torch.linalg.vector_norm(t.double()) for t in (*noise, *signal)]
    tiny = torch.finfo(torch.float64).tiny  # an exact zero has no error: 0 / tiny
    return torch.stack([n / s.clamp_min(tiny) for n, s in zip(norms[:3], norms[3:], strict=True)])


def _outputs(layer: QuantizedLayer, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Y, dX and dW by the layer's own numerics, without its hooks."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        y = layer.forward(x)
    return y.detach(), *torch.autograd.grad(y, (x, layer.weight), g.to(y.dtype))


def _mean(rows: list[list[float]], flops_share: float) -> LayerProbe:
    fprop, dgrad, wgrad = ([v if math.isfinite(v) else math.inf for v in column] for column in zip(*rows, strict=True))
    several = len(wgrad) > 1 and math.inf not in wgrad
    deviation = statistics.stdev(wgrad) if several else math.nan
    means = [statistics.fmean(column) for column in (fprop, dgrad, wgrad)]
    return LayerProbe(*means, wgrad_deviation=deviation, flops_share=flops_share)


def propose_keep(found: Mapping[str, LayerProbe], share: float) -> list[str]:
    """Return the layers to keep in high precision: those with the largest error of dW that fit into a budget.

    Where a recipe leaves wgrad alone, the error of dX decides, or else that of Y.

    Args:
        found: what `probe_layers` returned.
        share: of the FLOPs of all converted layers, 0 to 1; the paper keeps about 0.15.
    Returns:
        Names, in the order of the model.
    """
    gemms = ("wgrad", "dgrad", "fprop")
    deciding = next((gemm for gemm in gemms if any(getattr(layer, gemm) for layer in found.values())), "wgrad")
    errors = {name: getattr(layer, deciding) for name, layer in found.items()}
    kept: set[str] = set()
    left = share + 1e-9
    for name in sorted(found, key=lambda name: -errors[name]):
        if found[name].flops_share <= left and errors[name] > 0:
            kept.add(name)
            left -= found[name].flops_share
    return [name for name in found if name in kept]


def as_patterns(chosen: Collection[str], names: Collection[str]) -> list[str]:
    """Return few patterns that match the chosen names and none of the others, for `Keep(names=...)`.

    Args:
        chosen: some of `names`.
        names: all that there are.

    >>> as_patterns(["h.0.fc", "h.1.fc", "h.1.proj"], ["h.0.fc", "h.0.proj", "h.1.fc", "h.1.proj"])
    ['h.*.fc', 'h.1.proj']
    """
    left, patterns = set(chosen), list[str]()
    found = {pattern: {n for n in names if fnmatchcase(n, pattern)} for name in chosen for pattern in _patterns(name)}
    legal = {pattern: matched for pattern, matched in found.items() if matched <= set(chosen)}
    while left:
        # A name itself where no pattern does more.
        best = max([*legal, *sorted(left)], key=lambda p: len(legal.get(p, {p}) & left) + (p not in legal) * 0.5)
        patterns.append(best)
        left -= legal.get(best, {best})
    return patterns


def _patterns(name: str) -> Iterator[str]:
    parts = name.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            yield ".".join([*parts[:i], "*", *parts[i + 1 :]])
            yield ".".join([*parts[: i + 1], "*"])


@dataclass(frozen=True)
class Whole:
    """A whole model under its recipes against itself in high precision.

    Args:
        loss: mean over the batches, nats.
        gradient_error: ||g_hat - g|| / ||g|| of the gradients of all linear weights, mean over the batches.
    """

    loss: float
    gradient_error: float


def probe_model(
    model: nn.Module,
    loss: Loss[Batch],
    batches: Iterable[Batch],
    variants: Mapping[str, Collection[str]],
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Whole]:
    """Compare the whole model, where errors add up over the layers, with several lists of layers kept as they are.

    Args:
        model: as in `probe_layers`.
        loss: likewise.
        batches: likewise.
        variants: name -> layers that are kept in high precision.
        advance: called after every pass.
    Returns:
        `high precision` first, then one result a variant.
    """
    layers = quantized_layers(model)
    recipes = {name: layer.recipe for name, layer in layers.items()}
    totals: dict[str, list[tuple[float, float]]] = {name: [] for name in ("high precision", *variants)}
    with evaluating(model):
        for number, batch in enumerate(batches):
            reference: list[Tensor] = []
            for name, kept in {"high precision": set(layers), **variants}.items():
                for layer, module in layers.items():
                    module.recipe = Recipe() if layer in kept else recipes[layer]
                set_step_(model, number)
                try:
                    value, gradients = _gradients(model, loss, batch)
                finally:
                    for layer, module in layers.items():
                        module.recipe = recipes[layer]
                reference = reference or gradients
                totals[name].append((value, _relative(gradients, reference)))
                advance()
    return {name: Whole(*(statistics.fmean(c) for c in zip(*rows, strict=True))) for name, rows in totals.items()}


def _gradients(model: nn.Module, loss: Loss[Batch], batch: Batch) -> tuple[float, list[Tensor]]:
    value = loss(model, batch)
    weights = [layer.weight for layer in quantized_layers(model).values()]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    return value.item(), [torch.zeros(()) if g is None else g for g in gradients]


def _relative(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> float:
    noise = sum((g - r).double().square().sum() for g, r in zip(gradients, reference, strict=True))
    return (noise / sum(r.double().square().sum() for r in reference)).sqrt().item()  # type: ignore[union-attr]
