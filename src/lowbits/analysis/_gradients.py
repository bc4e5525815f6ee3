# SPDX-License-Identifier: Apache-2.0
"""Look at output gradients, the hardest tensors to quantize: most entries are tiny beside the largest ones.

`G = dL/dY [N, out]` of a linear layer enters two GEMMs; what a weight update suffers from quantizing it is the angle
between `Q(G)^T X` and `G^T X`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowbits.analysis._errors import quantize_once, tensor_errors
from lowbits.analysis._linears import linear_layers
from lowbits.quantizers import QuantSpec

DECADES = range(-20, 5)

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class GradientSparsity:
    """How a gradient matrix fares under a quantizer.

    Args:
        zero: share of the non-zero entries that become code 0.
        relative_error: ||Q(G) - G|| / ||G||.
        weight_gradient_cosine: cosine of Q(G)^T X with G^T X, all entries as one vector.
    """

    zero: float
    relative_error: float
    weight_gradient_cosine: float


def magnitude_histogram(x: Tensor) -> dict[int, float]:
    """Return the share of entries per decade of magnitude.

    Args:
        x: float, any shape.
    Returns:
        `{k: share of entries with 10^k <= |x| < 10^(k+1)}` for the decades that are not empty; magnitudes below
        1e-20 count as the lowest decade, zeros under -999, so the shares sum to 1.
    """
    magnitude = x.detach().abs().double().flatten()
    zeros = (magnitude == 0).sum().item()
    decade = magnitude[magnitude > 0].log10().floor().clamp(DECADES[0], DECADES[-1]).long() - DECADES[0]
    counts = torch.bincount(decade, minlength=len(DECADES)).tolist()
    shares = {k: n / x.numel() for k, n in zip(DECADES, counts, strict=True) if n}
    return {-999: zeros / x.numel(), **shares} if zeros else shares


def gradient_sparsity(gradient: Tensor, x: Tensor, spec: QuantSpec) -> GradientSparsity:
    """Quantize an output gradient and compare the weight gradients.

    Args:
        gradient: G, `[N, out]`.
        x: the layer's input, `[N, in]`.
        spec: how G is quantized as it lies here: `PerRow` is per token, `PerColumn` per output channel.
    Returns:
        Flushed share, relative error, and the cosine of the two weight gradients.
    """
    errors = tensor_errors(gradient, spec)
    exact = gradient.double().t() @ x.double()
    quantized = quantize_once(gradient, spec).dequantize().double().t() @ x.double()
    norms = exact.norm().item() * quantized.norm().item()
    cosine = (exact * quantized).sum().item() / norms if norms > 0 else math.nan
    return GradientSparsity(errors.zero, errors.relative_error, cosine)


def output_gradients(
    model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch
) -> dict[str, tuple[Tensor, Tensor]]:
    """Run one backward pass and collect each linear layer's output gradient and input.

    Args:
        model: left as it was: no `.grad` is touched.
        loss: `(model, batch) -> scalar`.
        batch: what to run.
    Returns:
        `(G [N, out], X [N, in])` by layer name, for layers that got a gradient. A layer that runs twice gives its
        last call.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with _watching(model, seen):
        value = loss(model, batch)
        torch.autograd.grad(value, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    return {name: seen[name] for name in linear_layers(model) if name in seen}


@contextmanager
def _watching(model: nn.Module, seen: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def keep(gradient: Tensor) -> None:
                seen[name] = (gradient.detach().flatten(0, -2), x)

            if output.requires_grad:
                output.register_hook(keep)

        return hook

    handles = [m.register_forward_hook(watch(name)) for name, m in linear_layers(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
