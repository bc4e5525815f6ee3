# SPDX-License-Identifier: Apache-2.0
"""Trace a model to a graph of operators, and learn every shape in it without computing anything."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from lowbits.errors import ConversionError

_ANY_FAILURE = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ArithmeticError)
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size"}


def export(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraphModule:
    """Trace with torch.export: batch sizes and sequence lengths stay free where the model leaves them free.

    Args:
        model: traced in evaluation mode, and left in the mode it was in.
        args: an example of its inputs.
        kwargs: the same by name.
    Raises:
        ConversionError: torch.export cannot trace it.
    """
    with evaluating(model), torch.no_grad():  # a region without gradients inside the model would stay a black box
        try:
            shapes = free_shapes(model, args, kwargs)
            program = torch.export.export(model, tuple(args), dict(kwargs), dynamic_shapes=shapes, strict=False)
        except _ANY_FAILURE as error:  # torch.export lets the errors of the model's own code through
            raise ConversionError(
                f"{type(model).__name__} cannot be traced by torch.export: {_first_line(error)}. Make this part "
                "traceable (torch.export.export(model, ...) shows where it is), or prune a submodule that is."
            ) from error
    module = program.module(check_guards=False)
    for node in reversed(list(module.graph.nodes)):
        if not node.users and getattr(node.target, "__name__", "").partition(".")[0] in _CHECKS:
            module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode without a cache, and back again."""
    modes = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)  # of a transformers model: its cache is a class that export refuses
    cached = getattr(config, "use_cache", None)
    model.eval()
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached
        for module, mode in modes.items():
            module.training = mode


def free_shapes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Leave the first axis of every tensor free, and all axes of token numbers and masks, in torch.export's words.

    Args:
        model: what is exported.
        args: its inputs.
        kwargs: the same by name.
    """

    def axes(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        free = leaf.ndim if not leaf.is_floating_point() else min(leaf.ndim, 1)
        return {axis: torch.export.Dim.AUTO for axis in range(free)}

    positional, named = pytree.tree_map(axes, tuple(args)), pytree.tree_map(axes, dict(kwargs))
    if not named:  # it wants one structure for positional arguments, another as soon as there are named ones
        return positional
    return dict(zip(inspect.signature(model.forward).parameters, positional, strict=False)) | named


def attribute(module: nn.Module, path: str) -> Any:
    """Return what a dotted path leads to."""
    found: Any = module
    for part in path.split("."):
        found = getattr(found, part)
    return found


class _Shapes(Interpreter):
    """Run a graph on tensors that have shapes only, and note what every node returns."""

    def __init__(self, module: GraphModule, mode: Any) -> None:
        super().__init__(module)
        self.mode, self.found, self.faked = mode, {}, {}

    def run_node(self, n: Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = attribute(self.module, target)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self.faked:
            self.faked[id(value)] = self.mode.from_tensor(value.detach(), static_shapes=True)
        return self.faked[id(value)]


def values_of(module: GraphModule, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Node, Any]:
    """Return what every node of a graph returns for an example: tensors without data, numbers.

    Args:
        module: a traced model, or a sub-network.
        args: the example, as the traced model takes it.
        kwargs: the same by name.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)
    flat, _ = pytree.tree_flatten((tuple(args), dict(kwargs)))
    faked = [mode.from_tensor(x, static_shapes=True) if isinstance(x, Tensor) else x for x in flat]
    run = _Shapes(module, mode)
    with mode, torch.no_grad():
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        run.run(*faked[: len(placeholders)], enable_io_processing=False)
    return run.found
