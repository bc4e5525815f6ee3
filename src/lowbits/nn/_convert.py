# SPDX-License-Identifier: Apache-2.0
"""Turn a model's linear layers into quantized ones, in place, and say what was done."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbits.errors import ConversionError, ShapeError
from lowbits.nn._blocks import is_conv1d
from lowbits.nn._gemms import ROLES
from lowbits.nn._keep import Keep
from lowbits.nn._linear import QuantizedConv1D, QuantizedLayer, QuantizedLinear, switch_
from lowbits.nn._recipe import Recipe
from lowbits.nn._saved import keep_in_few_bits_
from lowbits.nn._weight_view import WeightView
from lowbits.quantizers import Noise, QuantSpec

Choose = Callable[[str, nn.Module], Recipe | None]


@dataclass(frozen=True)
class Conversion:
    """What `convert_` did.

    Args:
        converted: name -> (recipe, in_features, out_features).
        left: name -> why it was left in high precision.
        flops_share: share of all linear-layer FLOPs that the converted layers do, 0 to 1.
        kept_share: share of them that `keep` leaves in high precision.
    """

    converted: dict[str, tuple[Recipe, int, int]]
    left: dict[str, str]
    flops_share: float
    kept_share: float = 0.0

    def __str__(self) -> str:
        """Group the layers by recipe, and list what was left and why."""
        groups: dict[str, list[str]] = {}
        for name, (recipe, k, n) in self.converted.items():
            groups.setdefault(str(recipe), []).append(f"{name} [{k} -> {n}]")
        lines = [f"converted {len(self.converted)} linear layers, {self.flops_share:.1%} of the linear FLOPs"]
        if self.kept_share:
            lines[0] += f", {self.kept_share:.1%} kept in high precision"
        for recipe, names in groups.items():
            shown = names if len(names) <= 4 else [*names[:2], f"... {len(names) - 3} more ...", names[-1]]
            lines += [f"  {recipe}", *(f"    {name}" for name in shown)]
        reasons: dict[str, list[str]] = {}
        for name, why in self.left.items():
            reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            lines.append(f"  left {names[0]}{f' to {names[-1]} ({len(names)})' if len(names) > 1 else ''}: {why}")
        return "\n".join(lines)


def convert_(
    model: nn.Module, choose: Recipe | Choose, *, keep: Keep | None = None, seed: int = 0, verbose: bool = True
) -> Conversion:
    """Convert the linear layers of `model` in place: `nn.Linear` and transformers' `Conv1D`.

    Parameters stay the same objects, so tied weights stay tied, and parameter count and `state_dict` keys do not
    change. Call it after construction, before `torch.compile` and DDP. Converting a converted layer changes its recipe.

    Args:
        model: any module.
        choose: a recipe for all linear layers but the output head; or a callable `(name, module) -> Recipe | None` that
            is asked for every linear layer, the head too. None leaves the layer alone.
        keep: which layers stay in high precision whatever `choose` says; one that was converted before returns to it.
        seed: of the random bits of stochastic rounding.
        verbose: print what was converted, what was left and why.
    Returns:
        The `Conversion`.
    Raises:
        ConversionError: nothing was converted, a part of `keep` matches nothing, or `saved_activations` of two layers
            differ.
        ShapeError: `grad_parts` does not divide a layer's size; names the layer. Nothing has been converted then.
    """
    kept = keep.layers(model) if keep else {}
    linear = {name: module for name, module in model.named_modules() if _is_linear(module)}
    decided = _decide(linear, choose, kept, _head(model))
    chosen = {name: (linear[name], recipe) for name, recipe in decided.items() if isinstance(recipe, Recipe)}
    if not chosen:
        remedy = f"`keep` ({keep}) and `choose` leave none; keep fewer." if kept else (
            "`choose` has to return a Recipe for at least one of them (Recipe() for high precision)."
        )  # fmt: skip
        raise ConversionError(
            f"{type(model).__name__}: none of its {len(linear)} linear layers was converted. {remedy}"
        )
    before = {name: layer.recipe for name, layer in quantized_layers(model).items() if name not in kept}
    _check_saved(before | {name: recipe for name, (_, recipe) in chosen.items()})
    for name, (module, recipe) in chosen.items():
        _check_sizes(name, module, recipe)
    for name, (module, recipe) in chosen.items():
        _convert_layer(name, module, recipe, seed)
    for name, layer in quantized_layers(model).items():
        if name in kept:
            layer.recipe = Recipe()
    keep_in_few_bits_(model, _head(model))
    result = Conversion(
        {name: (recipe, *_sizes(module)) for name, (module, recipe) in chosen.items()},
        _with_own_forward(model) | {name: why for name, why in decided.items() if isinstance(why, str)},
        _share(linear, chosen),
        _share(linear, kept),
    )
    if verbose:
        print(result)
    return result


def _decide(
    linear: dict[str, nn.Module], choose: Recipe | Choose, kept: dict[str, str], head: nn.Module | None
) -> dict[str, Recipe | str]:
    """The recipe of each linear layer, or why it gets none."""
    decided: dict[str, Recipe | str] = {}
    for name, module in linear.items():
        if name in kept:
            decided[name] = f"kept, {kept[name]}"
        elif not isinstance(choose, Recipe):
            decided[name] = choose(name, module) or "`choose` returned None"
        else:
            why = "the output head stays in high precision unless `choose` names it"
            decided[name] = why if module is head else choose
    return decided


def _with_own_forward(model: nn.Module) -> dict[str, str]:
    """Subclasses of `nn.Linear` that convert_ leaves alone."""
    others = {n: type(m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and not _is_linear(m)}
    return {name: f"{kind.__name__} is a subclass with a forward of its own" for name, kind in others.items()}


def _share(linear: dict[str, nn.Module], names: Iterable[str]) -> float:
    """Share of the FLOPs of all linear layers: a layer's are proportional to its weights."""
    weights = {name: math.prod(_sizes(module)) for name, module in linear.items()}
    return sum(weights.get(name, 0) for name in names) / sum(weights.values())


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the converted layers by name, in the model's order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear | QuantizedConv1D)}


def set_step_(model: nn.Module, step: int) -> None:
    """Set the counter of all random bits; call it before every forward with a number that never repeats in a run."""
    counters = [layer.noise[0] for layer in quantized_layers(model).values()]
    by_device: dict[torch.device, list[Tensor]] = {}
    for counter in counters:
        by_device.setdefault(counter.device, []).append(counter)
    for device, places in by_device.items():  # one launch, not one a layer
        value = torch.full((), step, dtype=torch.int64, device=device)
        torch._foreach_copy_(places, [value] * len(places))  # pyright: ignore[reportPrivateImportUsage]


def set_phase_(model: nn.Module, *, forward: bool = True, backward: bool = True) -> None:
    """Switch the quantizers of the forward and of the backward pass, apart, between two steps.

    Every layer keeps its recipe, so switching back is exact; model, optimizer and compiled code stay. With the forward
    pass off a layer returns what `nn.Linear` returns, bit for bit, while its gradients are still quantized. Layers that
    were left in high precision stay so, and `high_precision` switches both off in any phase.

    Args:
        model: converted; may be in the middle of a run.
        forward: whether fprop follows the recipes.
        backward: whether dgrad and wgrad do.
    """
    for layer in quantized_layers(model).values():
        if layer.passes != (forward, backward):
            switch_(layer, (forward, backward))


@contextmanager
def high_precision(model: nn.Module) -> Iterator[None]:
    """Switch all quantizers off within the block, functions and views of weights too; these are assignments."""
    layers = quantized_layers(model).values()
    before = [(layer.recipe, layer.weight_fn) for layer in layers]
    views = [module for module in model.modules() if isinstance(module, WeightView) and not module.off]
    for layer in layers:
        layer.recipe, layer.weight_fn = Recipe(), None
    for view in views:
        view.off = True
    try:
        yield
    finally:
        for view in views:
            view.off = False
        for layer, (recipe, weight_fn) in zip(layers, before, strict=True):
            layer.recipe, layer.weight_fn = recipe, weight_fn


def _is_linear(module: nn.Module) -> bool:
    return type(module) in (nn.Linear, QuantizedLinear) or is_conv1d(module)


def _head(model: nn.Module) -> nn.Module | None:
    """The output head: what transformers calls the output embeddings, or a module named `lm_head`."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head if isinstance(head, nn.Module) else dict(model.named_modules()).get("lm_head")


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(in_features, out_features)."""
    assert isinstance(module.weight, nn.Parameter)
    rows, columns = module.weight.shape
    return (rows, columns) if is_conv1d(module) else (columns, rows)


def _convert_layer(name: str, module: nn.Module, recipe: Recipe, seed: int) -> None:
    # The class is exchanged rather than the module, so that parameters, ties, hooks and references all survive.
    module.__class__ = QuantizedConv1D if is_conv1d(module) else QuantizedLinear
    assert isinstance(module, QuantizedLinear | QuantizedConv1D)
    module.recipe = recipe
    module.layer_name = name
    keys = [word for role in ROLES for word in Noise.of(seed, name, role).key]
    noise = torch.tensor([0, *keys], dtype=torch.int64, device=module.weight.device)
    module.register_buffer("noise", noise, persistent=False)
    if "weight_fn" not in module._modules:
        module.register_module("weight_fn", None)


def _check_saved(recipes: dict[str, Recipe]) -> None:
    """Refuse two ways of keeping what lies between layers."""
    first: dict[QuantSpec, str] = {}
    for name, recipe in recipes.items():
        if recipe.saved_activations is not None:
            first.setdefault(recipe.saved_activations, name)
    if len(first) > 1:
        (one, of_one), (two, of_two) = list(first.items())[:2]
        raise ConversionError(
            f"saved_activations is `{one}` for {of_one} and `{two}` for {of_two}: what lies between layers is kept in "
            "one way. Choose one of them, or None."
        )


def _check_sizes(name: str, module: nn.Module, recipe: Recipe) -> None:
    """Refuse parts of G that do not divide; groups, tiles and rotations take any size."""
    _, n = _sizes(module)
    if n % recipe.grad_parts:
        raise ShapeError(f"{name}: grad_parts={recipe.grad_parts} does not divide out_features={n}.")
