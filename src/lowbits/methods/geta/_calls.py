# SPDX-License-Identifier: Apache-2.0
"""One operator call of a traced graph, with its arguments by name and the axes of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lowbits.methods.geta._axes import Axis, fix

Axes = list[Axis]
"""The axes of one tensor, outermost first."""


class Call:
    """A `call_function` node that is about to be read.

    Args:
        node: its target is an operator of torch's dispatcher.
        axes: of every tensor that was computed before; a tuple of them where a node returns several.
        values: what every node returned for the traced example (fake tensors, numbers).
    """

    def __init__(self, node: Node, axes: Mapping[Node, Any], values: Mapping[Node, Any]) -> None:
        self.node, self.known, self.values = node, axes, values
        self.name = operator_name(node)
        self.arguments = bound(node)

    def __getitem__(self, name: str) -> Any:
        """Return an argument; a node that stands for a number becomes the number of the traced example."""
        return self._number(self.arguments.get(name))

    def _number(self, value: Any) -> Any:
        if isinstance(value, Node) and not isinstance(self.values[value], Tensor):
            return self.values[value]
        if isinstance(value, list | tuple):
            return [self._number(item) for item in value]
        return value

    def axes(self, name: str) -> Axes:
        """Return the axes of a tensor argument; empty if it was not given."""
        node = self.arguments.get(name)
        return list(self.known.get(node) or []) if isinstance(node, Node) else []

    def given(self, name: str) -> bool:
        """Whether an argument is a tensor."""
        node = self.arguments.get(name)
        return isinstance(node, Node) and isinstance(self.values[node], Tensor)

    def tensors(self) -> list[Node]:
        """Return all tensor arguments in order, those within lists, too."""
        return [node for node in self.node.all_input_nodes if isinstance(self.values[node], Tensor)]

    @property
    def value(self) -> Any:
        """What the node returned for the traced example."""
        return self.values[self.node]

    @property
    def shape(self) -> torch.Size:
        """Shape of the one tensor that it returned."""
        return self.value.shape

    @property
    def where(self) -> str:
        """The node and the module that it came from, for a message."""
        return described(self.node)

    def dim(self, name: str, rank: int) -> int:
        """Return an axis number, counted from the front."""
        return self[name] % rank

    def fixed(self, size: int, reason: str) -> Axis:
        """Return a new axis that nothing can be cut from."""
        axis = Axis(size)
        fix(axis, f"{reason} ({self.where})")
        return axis


def operator_name(node: Node) -> str:
    """Return an operator's name as its rule is found: without `aten::` and without the underscore of in-place ones."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    namespace, _, name = schema.name.partition("::")
    if namespace != "aten":
        return schema.name
    return name if name.startswith("__") else name.removesuffix("_")


def bound(node: Node) -> dict[str, Any]:
    """Return all arguments of a call by the names of the operator's schema, defaults too."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return {str(index): value for index, value in enumerate(node.args)} | dict(node.kwargs)
    names = [argument.name for argument in schema.arguments]
    defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    return defaults | dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def described(node: Node) -> str:
    """Return a node's name, its operator, and the module that it came from."""
    stack = node.meta.get("nn_module_stack") or {}
    module = [str(path).removeprefix("L['self'].") for path, _ in stack.values() if path]
    inside = f" in {module[-1]}" if module else ""
    return f"node {node.name}, operator {operator_name(node)}{inside}"
