# SPDX-License-Identifier: Apache-2.0
"""Which slices of which parameters must be cut together: the dependency graph of a model."""

from __future__ import annotations

import enum
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from lowbits.errors import ConversionError, UnknownNameError
from lowbits.methods.geta._axes import Axis, fix, index_of, kept, leaves
from lowbits.methods.geta._calls import Axes, Call
from lowbits.methods.geta._movements import MOVE
from lowbits.methods.geta._operators import (
    COMPUTE,
    KERNEL,
    Rule,
    elementwise,
    is_elementwise,
    no_rule,
    opaque,
    seen,
    unrelated,
)
from lowbits.methods.geta._trace import attribute, export, values_of
from lowbits.methods.geta._zeros import Vanishing


class Treat(enum.Enum):
    """What `trace` shall take an operator for that it has no rule for."""

    ELEMENTWISE = enum.auto()
    """Each element of the result depends on the elements at its place alone: a quantizer that maps 0 to 0."""
    WHOLE = enum.auto()
    """Whatever it sees cannot be cut."""


@dataclass(frozen=True)
class Member:
    """Slices of one parameter or buffer along one axis that belong to the units of a dimension.

    Args:
        name: of the parameter or buffer.
        axis: number of the axis.
        index: int64 `[size of the axis]`, the unit that each slice belongs to, -1 where to none.
        zeroed: whether training drives these slices to zero; the others are cut at the end without being needed.
    """

    name: str
    axis: int
    index: Tensor
    zeroed: bool


@dataclass(frozen=True)
class Dimension:
    """Slices that can be cut one unit at a time: unit i is slice i of every member.

    Args:
        name: the first layer that makes it; `[i]` says which factor or segment of its rows.
        size: number of units.
        members: parameters and buffers.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    leaf: Axis = field(repr=False, compare=False)

    @property
    def layers(self) -> tuple[str, ...]:
        """The modules that have members."""
        return tuple(dict.fromkeys(member.name.rpartition(".")[0] for member in self.members))


@dataclass(frozen=True)
class Kept:
    """Slices that cannot be cut.

    Args:
        name: the first layer that makes them.
        size: how many.
        reason: why, and the node that says so.
    """

    name: str
    size: int
    reason: str


@dataclass(frozen=True, eq=False)
class Graph:
    """The dependency graph of a model.

    Args:
        module: the traced model; its parameters are the model's own.
        dimensions: what can be cut.
        kept: what cannot, with the reason.
        example: positional and named inputs that it was traced with.
    """

    module: GraphModule
    dimensions: tuple[Dimension, ...]
    kept: tuple[Kept, ...]
    example: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)
    axes: dict[Node, Any] = field(repr=False)
    values: dict[Node, Any] = field(repr=False)

    @property
    def units(self) -> int:
        """Number of units of all dimensions."""
        return sum(dimension.size for dimension in self.dimensions)

    @cached_property
    def parameter_nodes(self) -> dict[str, Node]:
        """The node of every parameter and buffer that the graph reads."""
        return {str(node.target): node for node in self.module.graph.nodes if node.op == "get_attr"}

    def dimension(self, name: str) -> Dimension:
        """Return the dimension of a name.

        Raises:
            UnknownNameError: there is none.
        """
        for dimension in self.dimensions:
            if dimension.name == name:
                return dimension
        raise UnknownNameError("dimension", name, [d.name for d in self.dimensions], where="lowbits graph")

    def masks(self, keep: Tensor) -> dict[Axis, Tensor]:
        """Return the units that stay, by dimension's leaf.

        Args:
            keep: bool `[units]`, in the order of `dimensions`.
        """
        parts = keep.cpu().split([dimension.size for dimension in self.dimensions])
        return {dimension.leaf.find(): part for dimension, part in zip(self.dimensions, parts, strict=True)}

    def kept_slices(self, keep: Tensor) -> dict[str, list[Tensor]]:
        """Return which slices of every parameter and buffer stay, axis by axis.

        Args:
            keep: bool `[units]`.
        """
        masks = self.masks(keep)
        nodes = self.parameter_nodes.items()
        return {name: [kept(axis, masks) for axis in self.axes[node]] for name, node in nodes if self.axes.get(node)}

    @torch.no_grad()
    def zero_(self, model: nn.Module, keep: Tensor) -> None:
        """Set the slices of units that do not stay to zero: the model computes what it will once they are cut.

        Args:
            model: the traced one, or one with the same parameters.
            keep: bool `[units]`.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for dimension, stays in zip(self.dimensions, keep.split([d.size for d in self.dimensions]), strict=True):
            for member in dimension.members:
                if member.zeroed and member.name in parameters:
                    cut = torch.cat([~stays.cpu(), torch.zeros(1, dtype=torch.bool)])[member.index]
                    parameter = parameters[member.name]
                    parameter.index_fill_(member.axis, cut.nonzero().squeeze(1).to(parameter.device), 0.0)


def trace(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    rules: Mapping[str, Treat] | None = None,
    keep: Iterable[str] = (),
) -> Graph:
    """Find what can be cut from a model, and what must be cut with it.

    Nothing is computed: a model on the meta device will do. Trace the model as it is, before any quantizer is inserted.

    Args:
        model: any module that torch.export takes; left as it is.
        args: an example of its inputs; batch of 2 or more, no two axes of which are equal by chance.
        kwargs: inputs by name.
        rules: what to take operators for that have no rule here, by name (`library::operator`).
        keep: names of parameters that shall not be cut, `*` for any part of a name.
    Returns:
        The dependency graph.
    Raises:
        ConversionError: it cannot be traced, an operator without a rule keeps something from being cut, or nothing can.

    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [(d.name, d.size, d.layers) for d in trace(net, (torch.ones(2, 3),)).dimensions]
    [('0', 8, ('0', '2'))]
    """
    kwargs = dict(kwargs or {})
    module = export(model, args, kwargs)
    reading = _Reading(module, values_of(module, args, kwargs), rules or {})
    reading.keep(list(keep))
    blamed = reading.blame()
    vanishing = Vanishing(module, reading.axes, reading.values)
    dimensions, whole = reading.dimensions(vanishing)
    graph = Graph(module, dimensions, whole, (tuple(args), kwargs), reading.axes, reading.values)
    _check(graph, model, [call for leaf, call in blamed.items() if (leaf.size, leaf.fixed) in _sizes(whole)])
    return graph


def _sizes(whole: Sequence[Kept]) -> set[tuple[int, str | None]]:
    return {(kept.size, kept.reason) for kept in whole}


def _check(graph: Graph, model: nn.Module, to_blame: Sequence[Call]) -> None:
    if to_blame:
        call = to_blame[0]
        raise ConversionError(
            f"{type(model).__name__}: {call.where}: no rule says which slices of its operands belong together. Say "
            f"what it is with trace(..., rules={{{call.name!r}: Treat.ELEMENTWISE}}), or accept with Treat.WHOLE that "
            "nothing it sees can be cut."
        )
    if not graph.dimensions:
        reason = f" For example {graph.kept[0].name}: {graph.kept[0].reason}." if graph.kept else ""
        raise ConversionError(
            f"{type(model).__name__}: nothing in it can be cut.{reason} Trace a model with hidden layers of its own."
        )


class _Reading:
    """One pass over a graph that unifies, refines and fixes axes."""

    def __init__(self, module: GraphModule, values: dict[Node, Any], rules: Mapping[str, Treat]) -> None:
        self.module, self.values, self.rules = module, values, rules
        self.axes: dict[Node, Any] = {}
        self.unknown: list[tuple[Call, list[Axis]]] = []
        tensors: dict[int, Axes] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self._read_attribute(node, tensors)
            elif node.op == "placeholder" and isinstance(values[node], Tensor):
                self.axes[node] = [_fixed(size, f"input {node.name} of the network") for size in values[node].shape]
            elif node.op == "call_function":
                self._read_call(node)
            elif node.op == "output":
                for source in node.all_input_nodes:
                    for axis in self.axes.get(source) or []:
                        fix(axis, f"output {source.name} of the network")

    def _read_attribute(self, node: Node, tensors: dict[int, Axes]) -> None:
        value = self.values[node]
        if isinstance(value, Tensor):  # tied parameters are one tensor
            same = attribute(self.module, str(node.target))
            self.axes[node] = tensors.setdefault(id(same), [Axis(size) for size in value.shape])

    def _read_call(self, node: Node) -> None:
        if str(getattr(node.target, "__name__", "")) == "getitem":
            source, index = node.args[:2]
            found = self.axes.get(source)  # type: ignore[arg-type]
            self.axes[node] = found[index] if isinstance(found, tuple) else None  # type: ignore[index]
            return
        if not _is_tensor(self.values[node]):
            return
        call = Call(node, self.axes, self.values)
        self.axes[node] = self._rule(call)(call)

    def _rule(self, call: Call) -> Rule:
        if call.name in self.rules:
            return elementwise if self.rules[call.name] is Treat.ELEMENTWISE else opaque
        rule = COMPUTE.get(call.name) or MOVE.get(call.name)
        if rule is not None:
            return rule
        return elementwise if is_elementwise(call) else self._unknown

    def _unknown(self, call: Call) -> Any:
        """Go on with unrelated axes; what the operator sees is fixed last, to know what it alone keeps whole."""
        self.unknown.append((call, seen(call)))
        return unrelated(call)

    def blame(self) -> dict[Axis, Call]:
        """Fix what operators without a rule see, and return the leaves that nothing else had fixed."""
        blamed = {}
        for call, axes in self.unknown:
            blamed |= {leaf: call for axis in axes for leaf in leaves(axis) if leaf.fixed is None}
            for axis in axes:
                fix(axis, no_rule(call))
        return blamed

    def keep(self, patterns: Sequence[str]) -> None:
        """Fix what the user wants kept."""
        for pattern in patterns:
            found = [node for node in self.axes if node.op == "get_attr" and fnmatch.fnmatch(str(node.target), pattern)]
            if not found:
                names = [str(node.target) for node in self.axes if node.op == "get_attr"]
                raise UnknownNameError("parameter", pattern, names, where="lowbits graph")
            for axis in (axis for node in found for axis in self.axes[node]):
                fix(axis, f"asked to be kept ({pattern})")

    def dimensions(self, vanishing: Vanishing) -> tuple[tuple[Dimension, ...], tuple[Kept, ...]]:
        """Collect the leaves that parameters have: those that can be cut, and those that cannot."""
        found: dict[Axis, list[tuple[Node, int]]] = {}
        for node in self.module.graph.nodes:
            if node.op == "get_attr" and self.axes.get(node):
                for place, axis in enumerate(self.axes[node]):
                    for leaf in leaves(axis):
                        found.setdefault(leaf, []).append((node, place))
        cut, whole = [], []
        for leaf, places in found.items():
            made = [(n, p) for n, p in places if vanishing.zeroed(n, p, leaf) and len(self.axes[n]) > 1]
            if leaf.size == 1 or not made or (leaf.fixed or "").startswith(KERNEL):
                continue
            name = self._name(leaf, *made[0])
            if leaf.fixed is not None:
                whole.append(Kept(name, leaf.size, leaf.fixed))
                continue
            members = tuple(
                Member(
                    str(node.target), place, index_of(self.axes[node][place], leaf), vanishing.zeroed(node, place, leaf)
                )
                for node, place in places
            )
            cut.append(Dimension(name, leaf.size, members, leaf))
        return tuple(cut), tuple(whole)

    def _name(self, leaf: Axis, node: Node, place: int) -> str:
        path, _, parameter = str(node.target).rpartition(".")
        name = path if parameter == "weight" and path else str(node.target)
        parts = [part for part in leaves(self.axes[node][place]) if part.size > 1]
        return f"{name}[{parts.index(leaf)}]" if len(parts) > 1 else name


def _fixed(size: int, reason: str) -> Axis:
    axis = Axis(size)
    fix(axis, reason)
    return axis


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))
