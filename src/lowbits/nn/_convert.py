# SPDX-License-Identifier: Apache-2.0
"""Turn a model's linear layers into quantized ones, in place, and say what was done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from lowbits.errors import ConversionError, ShapeError
from lowbits.nn._linear import ROLES, QuantizedConv1D, QuantizedLayer, QuantizedLinear
from lowbits.nn._recipe import Recipe
from lowbits.quantizers import Noise

Choose = Callable[[str, nn.Module], Recipe | None]


@dataclass(frozen=True)
class Conversion:
    """What `convert_` did.

    Args:
        converted: name -> (recipe, in_features, out_features).
        left: name -> why it was left in high precision.
        flops_share: share of all linear-layer FLOPs that the converted layers do, 0 to 1.
    """

    converted: dict[str, tuple[Recipe, int, int]]
    left: dict[str, str]
    flops_share: float

    def __str__(self) -> str:
        """Group the layers by recipe, and list what was left and why."""
        groups: dict[str, list[str]] = {}
        for name, (recipe, k, n) in self.converted.items():
            groups.setdefault(str(recipe), []).append(f"{name} [{k} -> {n}]")
        lines = [f"converted {len(self.converted)} linear layers, {self.flops_share:.1%} of the linear FLOPs"]
        for recipe, names in groups.items():
            shown = names if len(names) <= 4 else [*names[:2], f"... {len(names) - 3} more ...", names[-1]]
            lines += [f"  {recipe}", *(f"    {name}" for name in shown)]
        lines += [f"  left {name}: {why}" for name, why in self.left.items()]
        return "\n".join(lines)


def convert_(model: nn.Module, choose: Recipe | Choose, *, seed: int = 0, verbose: bool = True) -> Conversion:
    """Convert the linear layers of `model` in place: `nn.Linear` and transformers' `Conv1D`.

    Parameters stay the same objects, so tied weights stay tied, and parameter count and `state_dict` keys do not
    change. Call it after construction, before `torch.compile` and DDP. Converting a converted layer changes its recipe.

    Args:
        model: any module.
        choose: a recipe for all linear layers but the output head; or a callable `(name, module) -> Recipe | None` that
            is asked for every linear layer, the head too. None leaves the layer alone.
        seed: of the random bits of stochastic rounding.
        verbose: print what was converted, what was left and why.
    Returns:
        The `Conversion`.
    Raises:
        ConversionError: nothing was converted.
        ShapeError: `grad_parts` does not divide a layer's size; names the layer. Nothing has been converted then.
    """
    head = _head(model)
    chosen: dict[str, tuple[nn.Module, Recipe]] = {}
    left: dict[str, str] = {}
    weights: dict[str, int] = {}
    for name, module in model.named_modules():
        if not _is_linear(module):
            if isinstance(module, nn.Linear):
                left[name] = f"{type(module).__name__} is a subclass with a forward of its own"
            continue
        weights[name] = module.weight.numel()  # type: ignore[union-attr, operator]
        if isinstance(choose, Recipe):
            recipe = None if module is head else choose
            why = "the output head stays in high precision unless `choose` names it"
        else:
            recipe, why = choose(name, module), "`choose` returned None"
        if recipe is None:
            left[name] = why
        else:
            _check_sizes(name, module, recipe)
            chosen[name] = (module, recipe)
    if not chosen:
        raise ConversionError(
            f"{type(model).__name__}: none of its {len(weights)} linear layers was converted. "
            "`choose` has to return a Recipe for at least one of them (Recipe() for high precision)."
        )
    for name, (module, recipe) in chosen.items():
        _convert_layer(name, module, recipe, seed)
    share = sum(weights[name] for name in chosen) / sum(weights.values())
    result = Conversion({n: (r, *_sizes(m)) for n, (m, r) in chosen.items()}, left, share)
    if verbose:
        print(result)
    return result


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the converted layers by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedConv1D)}


def set_step_(model: nn.Module, step: int) -> None:
    """Set the counter of all random bits; call it before every forward with a number that never repeats in a run."""
    for layer in quantized_layers(model).values():
        layer.noise[0] = step


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Switch all quantizers off within the block; a recipe is data, so this is an assignment."""
    layers = quantized_layers(model).values()
    recipes = [layer.recipe for layer in layers]
    for layer in layers:
        layer.recipe = Recipe()
    try:
        yield
    finally:
        for layer, recipe in zip(layers, recipes, strict=True):
            layer.recipe = recipe


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind is QuantizedConv1D or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, QuantizedLinear) or _is_conv1d(module)


def _head(model: nn.Module) -> nn.Module | None:
    """The output head: what transformers calls the output embeddings, or a module named `lm_head`."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else dict(model.named_modules()).get("lm_head")


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    assert isinstance(module.weight, nn.Parameter)
    rows, columns = module.weight.shape
    return (rows, columns) if _is_conv1d(module) else (columns, rows)


def _convert_layer(name: str, module: nn.Module, recipe: Recipe, seed: int) -> None:
    # The class is exchanged rather than the module, so that parameters, ties, hooks and references all survive.
    module.__class__ = QuantizedConv1D if _is_conv1d(module) else QuantizedLinear
    assert isinstance(module, QuantizedLinear | QuantizedConv1D)
    module.recipe = recipe
    module.layer_name = name
    keys = [word for role in ROLES for word in Noise.of(seed, name, role).key]
    noise = torch.tensor([0, *keys], dtype=torch.int64, device=module.weight.device)
    module.register_buffer("noise", noise, persistent=False)


def _check_sizes(name: str, module: nn.Module, recipe: Recipe) -> None:
    """Refuse parts of G that do not divide; groups, tiles and rotations take any size."""
    _, n = _sizes(module)
    if n % recipe.grad_parts:
        raise ShapeError(f"{name}: grad_parts={recipe.grad_parts} does not divide out_features={n}.")
