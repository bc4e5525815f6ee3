# SPDX-License-Identifier: Apache-2.0
"""Find the linear layers of a model, and the blocks that it is made of, whatever their names are.

A stack of blocks is an outermost `nn.ModuleList` or numbered `nn.ModuleDict` whose elements are more than a layer, or
an `nn.Sequential` in which a class of such elements comes twice. Lists inside a block (experts) do not count.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lowbits.nn._linear import QuantizedConv1D


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' `Conv1D`, converted or not."""
    kind = type(module)
    return kind is QuantizedConv1D or (kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers."))


def linear_names(model: nn.Module) -> list[str]:
    """Return the names of all linear layers, in the model's order."""
    return [name for name, module in model.named_modules() if _is_linear(module)]


def blocks(model: nn.Module) -> list[str]:
    """Return the names of the model's blocks, in its order; empty where there are none."""
    stacks = [found for name, module in _containers("", model) if (found := _stack(name, module))]
    if stacks:
        return [block for stack in stacks for block in stack]
    # A plain perceptron: its linear layers are its blocks.
    rows = [
        [f"{name}.{key}".lstrip(".") for key, child in module.named_children() if _is_linear(child)]
        for name, module in _containers("", model, whole=True)
    ]
    return max((row for row in rows if len(row) > 1), key=len, default=[])


def holders(model: nn.Module) -> list[nn.Module]:
    """Return the modules whose forward passes run the stacks of blocks; the model itself where it has no blocks.

    Args:
        model: any.
    """
    modules = dict(model.named_modules())
    found: list[nn.Module] = []
    for name, module in _containers("", model):
        if _stack(name, module):
            while name and isinstance(modules[name], nn.ModuleList | nn.ModuleDict):  # which run nothing
                name = name.rpartition(".")[0]
            found += [modules[name]] if modules[name] not in found else []
    return found or [model]


def _containers(name: str, module: nn.Module, whole: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Numbered containers; what is inside a stack is looked into only if `whole`."""
    numbered = isinstance(module, nn.ModuleDict) and all(key.isdigit() for key in module)
    if numbered or isinstance(module, nn.ModuleList | nn.Sequential):
        yield name, module
        if not whole and _stack(name, module):
            return
    for key, child in module.named_children():
        yield from _containers(f"{name}.{key}".lstrip("."), child, whole)


def _stack(name: str, module: nn.Module) -> list[str]:
    """The blocks of a container: its parts that are more than a layer. A mere sequence needs two of one class."""
    parts = {key: child for key, child in module.named_children() if not _is_linear(child) and linear_names(child)}
    kinds = [type(child) for child in parts.values()]
    if isinstance(module, nn.Sequential) and len(set(kinds)) == len(kinds):
        return []
    return [f"{name}.{key}".lstrip(".") for key in parts]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)
