# SPDX-License-Identifier: Apache-2.0
"""Change the sizes that are written into a graph to those that are left after cutting."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from lowbits.methods.geta._axes import Axis, kept, leaves
from lowbits.methods.geta._calls import Call


class Sizes:
    """Say how much of an axis is left.

    Args:
        keep: bool mask of every leaf that is cut.
    """

    def __init__(self, keep: dict[Axis, Tensor]) -> None:
        self.keep = keep

    def left(self, axis: Axis) -> int:
        """Return how many indices of an axis are left."""
        return int(kept(axis, self.keep).sum())

    def cut(self, axis: Axis) -> bool:
        """Whether anything of an axis goes."""
        return any(not bool(self.keep[leaf].all()) for leaf in leaves(axis) if leaf in self.keep)

    def before(self, axis: Axis, place: int) -> int:
        """Return how many indices before a place are left."""
        return int(kept(axis, self.keep)[:place].sum())


def rewrite_(call: Call, axes: Any, sizes: Sizes) -> None:
    """Rewrite the constants of one call in place.

    Args:
        call: read against the whole network.
        axes: of what it returns.
        sizes: what is left.
    """
    rule = _RULES.get(call.name)
    if rule is not None and axes is not None:
        rule(call, axes, sizes)
    if call.node.target is torch.ops.aten.view.default:
        # Attention lays its result out by size: what could be viewed before may have to be copied.
        call.node.target = torch.ops.aten.reshape.default
        call.node.kwargs = {{"size": "shape"}.get(name, name): value for name, value in call.node.kwargs.items()}


def _shaped(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    """view, reshape, expand, zeros, ...: a list of sizes."""
    name = next(n for n in ("size", "shape", "sizes") if n in call.arguments)
    new = []
    for axis, size in zip(axes[-len(call.arguments[name]) :], call.arguments[name], strict=True):
        if isinstance(size, Node):
            new.append(_scaled(call.node, size, axis, sizes) if sizes.cut(axis) else size)
        else:
            new.append(size if size == -1 else sizes.left(axis))
    _set(call.node, name, new)


def _scaled(node: Node, size: Node, axis: Axis, sizes: Sizes) -> Node:
    """A size that depends on the input is a product: a batch times heads, for example."""
    with node.graph.inserting_before(node):
        times = node.graph.call_function(operator.mul, (size, sizes.left(axis)))
        return node.graph.call_function(operator.floordiv, (times, axis.size))


def _unflattened(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    dim = call["dim"] % (len(axes) - len(call["sizes"]) + 1)
    parts = axes[dim : dim + len(call["sizes"])]
    _set(call.node, "sizes", [s if s == -1 else sizes.left(a) for a, s in zip(parts, call["sizes"], strict=True)])


def _divided(call: Call, axes: tuple[list[Axis], ...], sizes: Sizes) -> None:
    """split, chunk: pieces of any sizes."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    if not sizes.cut(x[dim]):
        return
    call.node.target = torch.ops.aten.split_with_sizes.default
    call.node.args = (call.arguments["self"], [sizes.left(piece[dim]) for piece in axes], dim)
    call.node.kwargs = {}


def _sliced(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    if not sizes.cut(x[dim]):
        return
    if call.name == "narrow":
        begin = sizes.before(x[dim], call["start"] % x[dim].size)
        _set(call.node, "start", begin)
        _set(call.node, "length", sizes.left(axes[dim]))
        return
    begin, end, _ = slice(call["start"], call["end"]).indices(x[dim].size)
    _set(call.node, "start", sizes.before(x[dim], begin))
    _set(call.node, "end", sizes.before(x[dim], end))


def _padded(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    x, amounts = call.axes("self"), list(call["pad"])
    for place in range(1, len(amounts) // 2 + 1):
        whole = kept(axes[-place], sizes.keep)
        before, size = amounts[2 * place - 2], x[-place].size
        amounts[2 * place - 2] = int(whole[:before].sum())
        amounts[2 * place - 1] = int(whole[before + size :].sum())
    _set(call.node, "pad", amounts)


def _repeated(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    x = call.axes("self")
    x = [Axis(1)] * (len(axes) - len(x)) + x
    new = [sizes.left(a) // max(sizes.left(b), 1) for a, b in zip(axes, x, strict=True)]
    _set(call.node, "repeats", new if call.name == "repeat" else new[call.dim("dim", len(axes))])


def _grouped(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    """The groups left are the channels read over the channels that one group reads."""
    x, w = call.axes("input"), call.axes("weight")
    if call["groups"] == 1:
        return
    channel, transposed = x[1 - len(w)], "transpose" in call.name or bool(call["transposed"])
    group = sizes.left(axes[1 - len(w)]) // sizes.left(w[1]) if transposed else sizes.left(channel) // sizes.left(w[1])
    _set(call.node, "groups", group)


def _normalized_groups(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    _set(call.node, "num_groups", call["num_groups"] * sizes.left(axes[1]) // axes[1].size)


def _attended(call: Call, axes: list[Axis], sizes: Sizes) -> None:
    """The scale stays that of the whole head."""
    if call["scale"] is None:
        call.node.kwargs = {**call.node.kwargs, "scale": 1 / math.sqrt(call.axes("query")[-1].size)}


def _set(node: Node, name: str, value: Any) -> None:
    """Change an argument of a node, by position or by name."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index(name)
    if place < len(node.args):
        node.update_arg(place, value)
    else:
        node.update_kwarg(name, value)


_Rule = Callable[[Call, Any, Sizes], None]
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "expand", "broadcast_to", "zeros", "ones", "full", "empty",
                     "new_zeros", "new_ones", "new_full", "new_empty"), _shaped),
    "unflatten": _unflattened,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _divided),
    **dict.fromkeys(("slice", "narrow"), _sliced), **dict.fromkeys(("pad", "constant_pad_nd"), _padded),
    **dict.fromkeys(("repeat", "repeat_interleave"), _repeated),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
                     "conv_transpose3d"), _grouped),
    "group_norm": _normalized_groups, "scaled_dot_product_attention": _attended,
}  # fmt: skip
