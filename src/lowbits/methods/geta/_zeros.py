# SPDX-License-Identifier: Apache-2.0
"""Which parameter slices must be zero so that a network computes what it will once its units are cut.

The rows that make a unit, its biases and its norm vectors always are; the columns that read it can stay as they are
where everything between maps 0 to 0, and are zeroed as well where something (a sigmoid, an added constant) does not.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from lowbits.methods.geta._axes import Axis, fix, leaves
from lowbits.methods.geta._calls import Axes, Call
from lowbits.methods.geta._movements import MOVE
from lowbits.methods.geta._operators import ADDITIVE, COMPUTE, KEEP_ZERO, MULTIPLICATIVE

Zero = list[frozenset[Axis]]
"""For every axis of a tensor the leaves whose units make the tensor vanish on their slices."""

_NORMS = {"layer_norm", "rms_norm", "batch_norm", "group_norm", "instance_norm"}
_CONTRACTED: dict[str, tuple[tuple[str, int], ...]] = {
    "linear": (("input", -1), ("weight", 1)),
    "matmul": (("self", -1), ("other", -2)),
    "mm": (("self", -1), ("mat2", -2)),
    "bmm": (("self", -1), ("mat2", -2)),
    "addmm": (("mat1", -1), ("mat2", -2)),
    "scaled_dot_product_attention": (("query", -1), ("key", -1)),
}
_MADE_ZERO = {"zeros", "new_zeros", "zeros_like"}


class Vanishing:
    """Follow zeros through a graph whose axes are known.

    A first pass finds the columns that weights are contracted over; a second one follows the zeros, and adds columns
    where needed. What no parameter can make zero is fixed.

    Args:
        module: the traced model.
        axes: of every node.
        values: of every node.
    """

    def __init__(self, module: GraphModule, axes: dict[Node, Any], values: dict[Node, Any]) -> None:
        self.axes, self.values = axes, values
        self.read: set[tuple[Node, int]] = set()
        self.columns: set[tuple[Node, int, Axis]] = set()
        self.zero: dict[Node, Any] = {}
        self.sources: dict[Node, Node | None] = {}
        calls = [Call(node, axes, values) for node in module.graph.nodes if node.op == "call_function" and node in axes]
        parameters = [node for node in module.graph.nodes if node.op == "get_attr" and axes.get(node)]
        self.trainable = {node for node in parameters if getattr(_value(module, node), "requires_grad", False)}
        for call in calls:
            for operand, place in itertools.chain.from_iterable(_contractions(call)):
                if (source := self._source(operand)) is not None and source in self.trainable:
                    self.read |= {(source, i) for i in self._places(source, operand, place)}
        self.read = {(node, i) for node, i in self.read if not self._is_vector(node)}
        for node in parameters:
            self.zero[node] = [self._parameter(node, i) for i in range(len(axes[node]))]
        for node in module.graph.nodes:
            if node.op == "placeholder" and axes.get(node):
                self.zero[node] = [frozenset()] * len(axes[node])
        for call in calls:
            self._require(call)
            self.zero[call.node] = self._follow(call)

    def zeroed(self, node: Node, axis: int, leaf: Axis) -> bool:
        """Whether the slices of a parameter along an axis are driven to zero with the units of a leaf."""
        return node in self.trainable and ((node, axis) not in self.read or (node, axis, leaf) in self.columns)

    def _source(self, node: Node) -> Node | None:
        """Return the one parameter that a tensor is made of, by moves, by scalars, by a quantizer."""
        if node not in self.sources:
            found: set[Node | None] = {node} if node.op == "get_attr" else {None}
            if node.op == "call_function" and Call(node, {}, {}).name not in COMPUTE:
                inputs = [n for n in node.all_input_nodes if isinstance(self.axes.get(n), tuple) or self.axes.get(n)]
                found = {self._source(n) for n in inputs} or {None}
            self.sources[node] = found.pop() if len(found) == 1 else None
        return self.sources[node]

    def _is_vector(self, node: Node) -> bool:
        return len(self.axes[node]) < 2

    def _places(self, node: Node, operand: Node, place: int) -> Iterable[int]:
        """Return the axes of a parameter that an axis of a view of it comes from."""
        if node is operand:
            return [place % len(self.axes[node])]
        wanted = set(leaves(self.axes[operand][place]))
        return [i for i, own in enumerate(self.axes[node]) if wanted & set(leaves(own))]

    def _parameter(self, node: Node, axis: int) -> frozenset[Axis]:
        return frozenset(leaf for leaf in leaves(self.axes[node][axis]) if self.zeroed(node, axis, leaf))

    def _require(self, call: Call) -> None:
        """Make every product that is added up over a cut axis zero there."""
        for operands in _contractions(call):
            node, place = operands[-1]
            for leaf in leaves(self.axes[node][place]):
                if leaf.fixed is None and leaf.size > 1 and not any(leaf in self.zero[o][p] for o, p in operands):
                    self._add_columns(call, leaf, operands)

    def _add_columns(self, call: Call, leaf: Axis, operands: list[tuple[Node, int]]) -> None:
        for operand, place in operands:
            source = self._source(operand)
            if source in self.trainable and source is not None:
                found = [i for i in self._places(source, operand, place) if (source, i) in self.read]
                if found:
                    self.columns |= {(source, i, leaf) for i in found}
                    return
        fix(leaf, f"added up here, and no parameter makes it zero ({call.where})")

    # --- what a call makes of zeros ---------------------------------------------------------------------------------

    def _follow(self, call: Call) -> Any:
        axes = self.axes[call.node]
        if call.name == "getitem":
            source, index = call.node.args[:2]
            return self.zero[source][index] if axes is not None else None  # type: ignore[index]
        if isinstance(axes, tuple):
            return tuple(self._moved(call, part) if call.name in MOVE else _none(part) for part in axes)
        if call.name in ("cat", "concat", "concatenate"):
            return self._joined(call, axes)
        if call.name in ("pad", "constant_pad_nd"):
            own = self._moved(call, axes)
            made = self.axes[call.arguments["self"]]
            new = [frozenset(leaves(a)) - frozenset(leaves(b)) for a, b in zip(axes, made, strict=True)]
            return [a | b for a, b in zip(own, new, strict=True)] if not call["value"] else _none(axes)
        if call.name in _MADE_ZERO:
            return [frozenset(leaves(axis)) for axis in axes]
        if (
            call.name in ("matmul", "mm", "bmm", "linear", "addmm", "scaled_dot_product_attention")
            or "conv" in call.name
        ):
            return self._product(call, axes)
        if call.name in _NORMS:
            return self._scaled(call, axes)
        if call.name in MOVE or call.name in ("sum", "embedding") or "pool" in call.name:
            return self._moved(call, axes)
        return self._elementwise(call, axes)

    def _moved(self, call: Call, axes: Axes) -> Zero:
        """Zeros go where their leaves go; a leaf that the operand has twice is given up."""
        zero: set[Axis] = set()
        for node in call.tensors():
            found = [leaf for axis in self.axes.get(node) or [] if isinstance(axis, Axis) for leaf in leaves(axis)]
            zero |= {x for part in self.zero.get(node) or [] for x in part if found.count(x) == 1}
        return [frozenset(leaves(axis)) & zero for axis in axes]

    def _joined(self, call: Call, axes: Axes) -> Zero:
        parts = [node for node in call.arguments["tensors"] if len(self.axes[node]) == len(axes)]
        dim = call.dim("dim", len(axes))
        result = []
        for place, axis in enumerate(axes):
            zero = set(leaves(axis))
            for node in parts:
                there = set(leaves(self.axes[node][place])) if place == dim else zero
                zero -= there - self.zero[node][place]
            result.append(frozenset(zero))
        return result

    def _product(self, call: Call, axes: Axes) -> Zero:
        """A row is zero if either factor is; with a bias, if the bias is as well."""
        names = ("input", "weight", "self", "other", "mat1", "mat2", "value")
        names = tuple(n for n in names if call.given(n) and not (n == "self" and call.name == "addmm"))
        operands = [call.arguments[name] for name in names]
        found = frozenset(leaf for node in operands for part in self.zero[node] for leaf in part)
        bias = call.arguments.get("self" if call.name == "addmm" else "bias")
        if isinstance(bias, Node):
            found &= frozenset(leaf for part in self.zero[bias] for leaf in part)
        twice = {x for x in found if sum(x in leaves(axis) for axis in axes) > 1}
        return [(frozenset(leaves(axis)) & found) - twice for axis in axes]

    def _scaled(self, call: Call, axes: Axes) -> Zero:
        """A norm's result is zero where its scale and its shift are; without them nothing is known."""
        if not call.given("weight"):
            return _none(axes)
        found = frozenset(self.zero[call.arguments["weight"]][-1])
        if call.given("bias"):
            found &= self.zero[call.arguments["bias"]][-1]
        return [frozenset(leaves(axis)) & found for axis in axes]

    def _elementwise(self, call: Call, axes: Axes) -> Zero:
        tensors = call.tensors()
        if call.name == "where":
            tensors = tensors[1:]
        parts = [self._aligned(node, axes) for node in tensors]
        if not parts:
            return _none(axes)
        numbers = len(tensors) < sum(isinstance(call.arguments.get(n), Node | int | float) for n in ("self", "other"))
        if call.name in MULTIPLICATIVE:
            return [frozenset().union(*zeros) for zeros in zip(*parts, strict=True)]
        if call.name in ADDITIVE and not (numbers and call["other"] != 0):
            return [frozenset.intersection(*zeros) for zeros in zip(*parts, strict=True)]
        if call.name == "div" and len(parts) > 1:  # 0 / 0 is not 0
            return [a - b for a, b in zip(*parts, strict=True)]
        return parts[0] if call.name in KEEP_ZERO and _keeps_zero(call) else _none(axes)

    def _aligned(self, node: Node, axes: Axes) -> Zero:
        zero, own = self.zero.get(node) or [], self.axes.get(node) or []
        if isinstance(zero, tuple):
            return _none(axes)
        kept = [z if a.find().size > 1 else frozenset() for z, a in zip(zero, own, strict=True)]
        return [frozenset()] * (len(axes) - len(kept)) + kept


def _none(axes: Axes) -> Zero:
    return [frozenset()] * len(axes)


def _keeps_zero(call: Call) -> bool:
    """Look at the arguments of operators that map 0 to 0 under some of them only."""
    if call.name == "pow":
        return isinstance(call["exponent"], int | float) and call["exponent"] > 0
    if call.name == "masked_fill":
        return call["value"] == 0
    if call.name in ("clamp", "hardtanh"):
        low, high = (call["min"], call["max"]) if call.name == "clamp" else (call["min_val"], call["max_val"])
        numbers = all(x is None or isinstance(x, int | float) for x in (low, high))
        return numbers and (low is None or low <= 0) and (high is None or high >= 0)
    return True


def _contractions(call: Call) -> list[list[tuple[Node, int]]]:
    """Return, for every sum of products that a call takes, its operands and the axis of each that is added up."""
    arguments = call.arguments
    if "conv" in call.name and call.given("weight"):
        transposed = bool(call["transposed"]) or "transpose" in call.name
        channel = 1 - len(call.axes("weight"))
        return [[(arguments["input"], channel), (arguments["weight"], 0 if transposed else 1)]]
    if call.name == "einsum" and "->" in call["equation"] and "." not in call["equation"]:
        inputs, _, output = call["equation"].replace(" ", "").partition("->")
        terms = list(zip(inputs.split(","), arguments["tensors"], strict=True))
        letters = [letter for letter in dict.fromkeys(inputs.replace(",", "")) if letter not in output]
        return [[(node, term.index(letter)) for term, node in terms if letter in term] for letter in letters]
    if call.name == "sum":
        x = call.axes("self")
        dims = call["dim"] if isinstance(call["dim"], list | tuple) and call["dim"] else range(len(x))
        return [[(arguments["self"], dim)] for dim in dims]
    operands = [(arguments[name], place) for name, place in _CONTRACTED.get(call.name, ())]
    return [[(o, max(p, -len(call.known[o]))) for o, p in operands]] if operands else []


def _value(module: GraphModule, node: Node) -> Any:
    found: Any = module
    for part in str(node.target).split("."):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None
