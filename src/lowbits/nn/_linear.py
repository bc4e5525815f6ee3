# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose three GEMMs follow a recipe; `_gemms` has the numerics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lowbits.nn._gemms import Observer, PlainForward, Plan, QuantizedMatmul
from lowbits.nn._phase import during
from lowbits.nn._recipe import Recipe


def _own(layer: QuantizedLayer) -> Recipe:
    """The layer's recipe; assign `Recipe()` to switch the quantizers off."""
    return layer.own_recipe


def _assign(layer: QuantizedLayer, recipe: Recipe) -> None:
    layer.own_recipe, layer.active = recipe, during(recipe, *layer.passes)


def _told(layer: QuantizedLayer) -> str:
    return f"recipe=[{layer.recipe}], {layer.recipe.runs(layer.weight.device)}"


def switch_(layer: QuantizedLayer, passes: tuple[bool, bool]) -> None:
    """Quantize the forward and the backward pass of a layer, or not; its recipe stays."""
    layer.passes, layer.active = passes, during(layer.own_recipe, *passes)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` under a recipe; made from one by `convert_`, which keeps its parameters and `state_dict` keys.

    Attributes:
        recipe: the layer's own; assign `Recipe()` to switch the quantizers off.
        passes: whether the forward and the backward pass follow the recipe; `set_phase_` sets it.
        active: what the layer computes: the recipe without the operands of a pass that is off.
        layer_name: the module's path, which names it in errors and keys its random bits.
        observer: called with role (`fprop.lhs`, ...), operand and its quantized form, whenever the forward pass or its
            backward quantizes one: telemetry, in eager mode. Whoever sets it takes it away after the forward pass.
        noise: int64 [1 + 2 roles], the step and the Philox keys of `ROLES`. A buffer that no checkpoint holds; as
            plain numbers the keys would be constants of a compiled graph, another graph for every layer.
        weight_fn: None, or a module whose result stands for the weight in all three GEMMs: learned or noisy quantizers.
            It is differentiated as usual, and takes the weight as it is stored.
        keep_weight: False where the backward pass shall make the result of `weight_fn` again instead of keeping it.
        copies: of the quantized weight, see `weights_quantized_once`.
    """

    recipe = property(_own, _assign)
    own_recipe: Recipe
    active: Recipe
    passes: tuple[bool, bool] = (True, True)
    layer_name: str
    noise: Tensor
    observer: Observer | None = None
    weight_fn: nn.Module | None
    keep_weight: bool = True
    copies: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return input W^T + b in the compute dtype, [..., in] -> [..., out]."""
        return _through_weight_fn(self, input)

    def extra_repr(self) -> str:
        """Show the recipe beside the sizes."""
        return f"{super().extra_repr()}, {_told(self)}"


class QuantizedConv1D(nn.Module):
    """transformers' `Conv1D` (GPT-2), a linear layer that stores its weight as [in, out], under a recipe."""

    recipe = property(_own, _assign)
    own_recipe: Recipe
    active: Recipe
    passes: tuple[bool, bool] = (True, True)
    layer_name: str
    noise: Tensor
    observer: Observer | None = None
    weight_fn: nn.Module | None
    keep_weight: bool = True
    copies: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    weight: nn.Parameter
    bias: nn.Parameter

    @property
    def in_features(self) -> int:
        """Size of the contraction of fprop."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Size of the result."""
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b in the compute dtype, [..., in] -> [..., out]."""
        return _through_weight_fn(self, x)

    def extra_repr(self) -> str:
        """Show sizes and recipe."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {_told(self)}"


QuantizedLayer = QuantizedLinear | QuantizedConv1D
_AGAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def _through_weight_fn(layer: QuantizedLayer, x: Tensor) -> Tensor:
    if layer.keep_weight or layer.weight_fn is None:
        return _with_weight(layer, x)
    if torch.compiler.is_compiling():  # all that comes out of a checkpoint is made again, so let no product do so
        return _multiplied(layer, x, checkpoint(layer.weight_fn, layer.weight, **_AGAIN))
    # The backward pass runs it again up to the GEMM, whose operands are all that it needs: one pass over the weight.
    y: Any = checkpoint(_with_weight, layer, x, **_AGAIN)
    return y


def _with_weight(layer: QuantizedLayer, x: Tensor) -> Tensor:
    return _multiplied(layer, x, layer.weight if layer.weight_fn is None else layer.weight_fn(layer.weight))


def _multiplied(layer: QuantizedLayer, x: Tensor, weight: Any) -> Tensor:
    return quantized_linear(layer, x, weight if isinstance(layer, QuantizedLinear) else weight.t())


def quantized_linear(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """Run `layer`'s three GEMMs on x [..., in] and weight [out, in].

    The compute dtype is autocast's, or x's. X is cast to it first, as `nn.Linear` does under autocast, so that what
    waits for backward is no larger; the weight is quantized from its own, wider dtype.
    """
    recipe = layer.active
    if recipe.plain:
        return linear(x, weight, layer.bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # A name inside a graph is one of its constants: torch 2.11 would compile every layer anew.
    name = "a compiled layer" if torch.compiler.is_compiling() else layer.layer_name
    plan = Plan(recipe, recipe.native(x.device), dtype, name, layer.observer, torch.is_grad_enabled())
    if not any(recipe.fprop):
        return PlainForward.apply(x.to(dtype), weight, layer.bias, layer.noise, plan)
    ready = layer.copies is not None and layer.observer is None and plan.native[:2] == (True, True)
    copies = layer.copies if ready and layer.copies is not None else ()
    y = QuantizedMatmul.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight, layer.noise, plan, *copies)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if layer.bias is None else y + layer.bias.to(dtype)
