# SPDX-License-Identifier: Apache-2.0
"""Put quantizers before the GEMMs of a model: on every weight, and on the layers' inputs where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lowbits import nn as nn_layers
from lowbits.errors import ConversionError
from lowbits.methods.geta._quantizer import Quantizer

Choose = Callable[[str, nn.Module], bool]
"""`(name of a layer, layer) -> whether to quantize it`."""


class QuantizedLayer(nn.Module):
    """What quantized layers have: a quantizer of the weight, and one of the input or None.

    The layer's own parameters keep their names, so that a checkpoint of the float model loads.
    """

    weight: Any
    bias: Any
    weight_quantizer: Quantizer
    input_quantizer: Quantizer | None

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return x, self.weight_quantizer(self.weight)


class QuantizedLinear(QuantizedLayer, nn.Linear):
    """`nn.Linear` with quantized operands."""

    def forward(self, input: Tensor) -> Tensor:
        """Return x^Q w^Q + b."""
        return linear(*self._operands(input), self.bias)


class QuantizedTransposed(QuantizedLayer):
    """`transformers`' Conv1D, a linear layer whose weight is stored `[in, out]`, with quantized operands."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x^Q w^Q + b."""
        x, w = self._operands(x)
        shape = (*x.shape[:-1], w.shape[1])
        flat = x.reshape(-1, x.shape[-1])
        return (flat @ w if self.bias is None else torch.addmm(self.bias, flat, w)).view(shape)


class _Convolution(QuantizedLayer):
    def forward(self, input: Tensor) -> Tensor:
        """Return the convolution of the quantized input with the quantized weight."""
        x, w = self._operands(input)
        return self._conv_forward(x, w, self.bias)  # type: ignore[operator]


class QuantizedConv1d(_Convolution, nn.Conv1d):
    """`nn.Conv1d` with quantized operands."""


class QuantizedConv2d(_Convolution, nn.Conv2d):
    """`nn.Conv2d` with quantized operands."""


class QuantizedConv3d(_Convolution, nn.Conv3d):
    """`nn.Conv3d` with quantized operands."""


_QUANTIZED: dict[type[nn.Module], type[QuantizedLayer]] = {
    nn.Linear: QuantizedLinear,
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Conv3d: QuantizedConv3d,
}


def _quantized_class(layer: nn.Module) -> type[QuantizedLayer] | None:
    found = _QUANTIZED.get(type(layer))
    if found is None and type(layer).__name__ == "Conv1D" and hasattr(layer, "nf"):
        return QuantizedTransposed
    return found


def quantize_(
    model: nn.Module, choose: Choose | None = None, activations: bool = False, bits: float = 16.0
) -> dict[str, nn.Module]:
    """Insert quantizers in place; weights' ranges are their largest magnitudes.

    Trace the model before. A layer that `lowbits.nn.convert_` made takes its quantizer as `weight_fn`. A head that
    shares its weight with an embedding stays as it is. With `activations`, call
    `calibrate_` before training: the range of an input cannot be guessed from a weight.

    Args:
        model: float, on any device.
        choose: which layers; all linear and convolutional ones if None.
        activations: whether to quantize the layers' inputs as well.
        bits: width at the start.
    Returns:
        The quantized layers by name.
    Raises:
        ConversionError: there is nothing to quantize, or a layer is chosen that cannot be.
    """
    tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    done: dict[str, nn.Module] = {}
    for name, layer in list(model.named_modules()):
        wanted = choose is None or choose(name, layer)
        possible = _quantized_class(layer) is not None or isinstance(layer, nn_layers.QuantizedLayer)
        if choose is not None and wanted and not possible:
            raise ConversionError(
                f"{name}: {type(layer).__name__} cannot be quantized; linear and convolutional layers can. Leave it "
                "out in `choose`."
            )
        if possible and wanted and id(getattr(layer, "weight", None)) not in tied:
            _convert_(name, layer, activations, bits)
            done[name] = layer
    if not done:
        raise ConversionError(
            f"{type(model).__name__}: no layer to quantize; it has no linear or convolutional one that `choose` takes."
        )
    return done


def _convert_(name: str, layer: Any, activations: bool, bits: float) -> None:
    weight: Tensor = layer.weight
    limit = 1.0 if weight.device.type == "meta" else float(weight.detach().abs().max())
    quantizer = Quantizer(limit, bits).to(weight.device)
    if isinstance(layer, nn_layers.QuantizedLayer):
        if not layer.recipe.plain or layer.weight_fn is not None or activations:
            raise ConversionError(
                f"{name} follows the recipe {layer.recipe}; these quantizers stand in its place. Use the recipe bf16, "
                "and quantize inputs in layers that no recipe has converted."
            )
        layer.weight_fn = quantizer
        return
    layer.__class__ = _quantized_class(layer)
    layer.weight_quantizer = quantizer
    layer.input_quantizer = Quantizer(1.0, bits).to(weight.device) if activations else None


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the layers that `quantize_` converted, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def weight_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of weights by the name of the parameter, those in layers of `lowbits.nn`, too."""
    found = {f"{name}.weight": layer.weight_quantizer for name, layer in quantized_layers(model).items()}
    for name, layer in model.named_modules():
        if isinstance(layer, nn_layers.QuantizedLayer) and isinstance(layer.weight_fn, Quantizer):
            found[f"{name}.weight"] = layer.weight_fn
    return found


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return all quantizers of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Quantizer)}


@torch.no_grad()
def calibrate_(model: nn.Module, batches: Iterable[Any], bits: float = 16.0) -> None:
    """Set the ranges of input quantizers to the largest magnitudes that batches show.

    Args:
        model: with quantizers.
        batches: what the model is called with: a tensor, a tuple of positional or a dict of named inputs.
        bits: width to begin with.
    Raises:
        ConversionError: no batch came.
    """
    found = [(layer, layer.input_quantizer) for layer in quantized_layers(model).values()]
    largest: dict[Quantizer, float] = {}
    handles = [x.register_forward_pre_hook(_noting(q, largest)) for x, q in found if q is not None]
    try:
        with inputs_as_they_are(layer for layer, _ in found):
            for batch in batches:
                _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for quantizer, limit in largest.items():
        quantizer.set_range_(limit, bits)
    if handles and not largest:
        raise ConversionError("calibrate_: no batch came, so no input was seen; pass some of the training data.")


def _noting(quantizer: Quantizer, largest: dict[Quantizer, float]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        largest[quantizer] = max(largest.get(quantizer, 0.0), float(args[0].abs().max()))

    return before


@contextmanager
def inputs_as_they_are(layers: Iterable[QuantizedLayer]) -> Iterator[None]:
    """Let the inputs of layers pass unquantized for a while."""
    found = [(layer, layer.input_quantizer) for layer in layers]
    for layer, _ in found:
        layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, quantizer in found:
            layer.input_quantizer = quantizer


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)
