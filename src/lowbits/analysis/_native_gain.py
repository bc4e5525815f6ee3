# SPDX-License-Identifier: Apache-2.0
"""Time natively run layers beside plain ones: small GEMMs gain less than quantizing their operands costs."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from lowbits.nn import QuantizedConv1D, convert_, quantized_layers

_REPEATS = 5


def native_gains(model: nn.Module, tokens: int) -> dict[str, float]:
    """Return, by layer, how many times as fast its GEMMs are as `nn.Linear`'s, forward and backward, eagerly.

    One layer of each shape and recipe is timed, in the autocast of the caller; the median of some passes.

    Args:
        model: converted, on its device.
        tokens: of a forward pass.
    """
    known: dict[object, float] = {}
    gains: dict[str, float] = {}
    for name, layer in quantized_layers(model).items():
        device = layer.weight.device
        if layer.recipe.plain or not any(layer.recipe.native(device)):
            continue
        rows, columns = layer.weight.shape
        sizes = (rows, columns) if isinstance(layer, QuantizedConv1D) else (columns, rows)
        kind = (sizes, layer.weight.dtype, layer.recipe)
        if kind not in known:
            plain, native = (_layer(sizes, layer.weight) for _ in range(2))
            convert_(native, layer.recipe, verbose=False)
            known[kind] = _seconds(plain, tokens) / _seconds(native, tokens)
        gains[name] = known[kind]
    return gains


def _layer(sizes: tuple[int, int], like: Tensor) -> nn.Linear:
    """Without torch's initialization, which would draw from the generator of the run."""
    layer = skip_init(nn.Linear, *sizes, bias=False, device=like.device, dtype=like.dtype)
    assert isinstance(layer, nn.Linear)
    generator = torch.Generator(like.device).manual_seed(0)
    nn.init.normal_(layer.weight, std=0.02, generator=generator)
    return layer


def _seconds(layer: nn.Linear, tokens: int) -> float:
    generator = torch.Generator(layer.weight.device).manual_seed(0)
    shape, options = (tokens, layer.in_features), {"device": layer.weight.device, "dtype": layer.weight.dtype}
    x = torch.randn(shape, generator=generator, requires_grad=True, **options)
    times = []
    for _ in range(_REPEATS + 1):
        _wait(x.device)
        start = time.perf_counter()
        y = layer(x)
        y.backward(torch.ones_like(y))
        _wait(x.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first one compiles


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
