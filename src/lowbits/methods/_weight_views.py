# SPDX-License-Identifier: Apache-2.0
"""Let a layer see its weight through a function, and keep the weight itself where it was.

A view is a property of the layer's class that stands before the parameter: `layer.weight` is the viewed weight, the
parameter stays in `parameters()` and `state_dict()` under its own name, tied parameters stay tied, hooks and references
survive. `nn.utils.parametrize` gives the same numbers, but renames the parameter, so that neither the checkpoint of a
transformers model nor `param_groups` would know it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lowbits.errors import ConversionError, RunError
from lowbits.export import CodedModel, PointTensor
from lowbits.nn import WeightView

_SUFFIX = "_view"
MATRIX_LAYERS = (
    nn.Linear,
    nn.Embedding,
    nn.EmbeddingBag,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
)


class View(WeightView, ABC):
    """A function of a weight; subclasses give `forward` and `coded`."""

    @abstractmethod
    def coded(self, weight: Tensor) -> PointTensor:
        """Return the viewed weight as it would be stored.

        Args:
            weight: the parameter.
        """

    def set_draw_(self, draw: int) -> None:
        """Set the counter of the random bits, for views that have some.

        Args:
            draw: a number that never repeats in a run.
        """


class Place(NamedTuple):
    """A weight and where it is.

    Args:
        name: of the parameter, in the model.
        module: that owns it.
        attribute: its name there.
        parameter: itself.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter: nn.Parameter


def is_conv1d(module: nn.Module) -> bool:
    """Tell GPT-2's `Conv1D`, converted or not, whose weight is [in, out]."""
    return any(kind.__name__ in ("Conv1D", "QuantizedConv1D") for kind in type(module).__mro__)


def matrices(model: nn.Module) -> list[Place]:
    """Return every weight of two or more dimensions of linear, convolution, recurrent and embedding layers.

    Norms, biases and free parameters are not among them. A tied weight comes once for each layer that has it.

    Args:
        model: any module.
    """
    return [
        Place(f"{path}.{key}" if path else key, module, key, parameter)
        for path, module in model.named_modules()
        if isinstance(module, MATRIX_LAYERS) or is_conv1d(module)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.ndim >= 2
    ]


def install_(model: nn.Module, make: Callable[[Place], View | None]) -> list[str]:
    """Put views before the weights for which `make` returns one; an earlier view of the same weight is replaced.

    Args:
        model: any module, in place.
        make: asked once for each weight of `matrices`, a tied one under its first name.
    Returns:
        The names of the viewed weights.
    Raises:
        ConversionError: there is none.
    """
    views: dict[int, View | None] = {}
    names = []
    for place in matrices(model):
        if id(place.parameter) not in views:
            views[id(place.parameter)] = view = make(place)
            if view is not None:
                names.append(place.name)
        view = views[id(place.parameter)]
        if view is not None:
            place.module._modules[place.attribute + _SUFFIX] = view.to(place.parameter.device)
            _stand_before_(place.module, place.attribute)
    if not names:
        raise ConversionError(
            f"{type(model).__name__}: none of its {len(views)} weights was chosen. `choose` has to name at least one; "
            "weights of linear, convolution, recurrent and embedding layers can be."
        )
    return names


def viewed(model: nn.Module) -> list[tuple[Place, View]]:
    """Return the weights that are seen through a view, a tied one under its first name."""
    seen: set[int] = set()
    found = []
    for place in matrices(model):
        view = place.module._modules.get(place.attribute + _SUFFIX)
        if isinstance(view, View) and id(place.parameter) not in seen:
            seen.add(id(place.parameter))
            found.append((place, view))
    return found


def set_draw_(model: nn.Module, draw: int) -> None:
    """Set the counter of all random bits of the views.

    Args:
        model: with views.
        draw: a number that never repeats in a run.
    """
    for _, view in viewed(model):
        view.set_draw_(draw)


@contextmanager
def master_weights(model: nn.Module) -> Iterator[None]:
    """Let all layers see the parameters themselves within the block.

    Args:
        model: with views.
    """
    views = [view for _, view in viewed(model)]
    before = [view.off for view in views]
    for view in views:
        view.off = True
    try:
        yield
    finally:
        for view, off in zip(views, before, strict=True):
            view.off = off


def settle_(model: nn.Module) -> list[str]:
    """Write the viewed values into the parameters and take the views away: w <- Q(w), the end of the algorithm.

    Args:
        model: with views, in place; an ordinary model afterwards.
    Returns:
        The names of the weights that were written.
    """
    places = viewed(model)
    with torch.no_grad():
        for place, view in places:
            place.parameter.copy_(view.coded(place.parameter).dequantize())
    remove_views_(model)
    return [place.name for place, _ in places]


def remove_views_(model: nn.Module) -> None:
    """Take all views away; the parameters keep their values.

    Args:
        model: in place.
    """
    for place in matrices(model):
        if isinstance(place.module._modules.get(place.attribute + _SUFFIX), View):
            del place.module._modules[place.attribute + _SUFFIX]
            if not any(isinstance(child, View) for child in place.module._modules.values()):
                place.module.__class__ = type(place.module).__mro__[1]


def coded_model(model: nn.Module) -> CodedModel:
    """Return a model's weights as `lowbits.export.save_coded` writes them: viewed ones coded, all others plain.

    Args:
        model: with views.
    Raises:
        ConversionError: no weight has a view.
    """
    found = viewed(model)
    if not found:
        raise ConversionError(f"{type(model).__name__}: no weight is quantized; call quantize_weights_ first.")
    with torch.no_grad():
        coded = {place.name: view.coded(place.parameter) for place, view in found}
    parts = {f"{place.name}{_SUFFIX}." for place in matrices(model)}
    first: dict[tuple[object, ...], str] = {_identity(p.parameter): p.name for p, _ in found}
    plain, ties = {}, {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if any(key.startswith(part) for part in parts):
            continue
        owner = first.setdefault(_identity(tensor), key)
        if owner != key:
            ties[key] = owner
        elif key not in coded:
            plain[key] = tensor.detach()
    return CodedModel(coded, plain, ties)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """Equal for two names of one tensor; an empty one has no storage to share."""
    storage = tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)
    return storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _stand_before_(module: nn.Module, attribute: str) -> None:
    kind = type(module)
    if attribute not in getattr(kind, "_viewed", ()):
        base = kind.__mro__[1] if hasattr(kind, "_viewed") else kind
        module.__class__ = _class(base, (*getattr(kind, "_viewed", ()), attribute))


@cache
def _class(base: type[nn.Module], attributes: tuple[str, ...]) -> type[nn.Module]:
    """A subclass of a layer's class whose weights are properties."""
    members = {attribute: property(_getter(attribute)) for attribute in attributes}
    return type(f"Viewed{base.__name__}", (base,), {**members, "_viewed": attributes, "__module__": base.__module__})


def _getter(attribute: str) -> Callable[[nn.Module], Tensor]:
    def get(self: nn.Module) -> Tensor:
        parameter, view = self._parameters[attribute], self._modules.get(attribute + _SUFFIX)
        if view is None or view.off or parameter is None:
            return parameter  # type: ignore[return-value]
        try:
            return view(parameter)
        except AttributeError as error:  # torch would take it for a missing attribute and return the parameter
            raise RunError(f"{type(self).__name__}.{attribute}: its view failed: {error}") from error

    return get
