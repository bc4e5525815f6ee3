# SPDX-License-Identifier: Apache-2.0
"""How operators that move, join and cut up elements change the axes of a tensor."""

from __future__ import annotations

import math

from lowbits.methods.geta._axes import (
    Axis,
    IncompatibleError,
    concatenation,
    fix,
    product,
    split,
    unify,
)
from lowbits.methods.geta._calls import Axes, Call
from lowbits.methods.geta._operators import Rule, broadcast, opaque


def view(call: Call) -> Axes:
    """Split and merge axes: group by group the shapes before and after are row-major products of the same elements."""
    old, new = list(call.axes("self")), [Axis(size) for size in call.shape]
    result = list(new)
    if 0 in call.shape:
        return [call.fixed(size, "empty") for size in call.shape]
    while old or new:
        a, b = old[:1], new[:1]
        del old[:1], new[:1]
        while (before := math.prod(p.size for p in a)) != (after := math.prod(p.size for p in b)):
            if before < after:
                a.append(old.pop(0))
            else:
                b.append(new.pop(0))
        if after > 1:
            unify(product(a), product(b), call.where)
    return result


def permute(call: Call) -> Axes:
    """Move axes."""
    x = call.axes("self")
    return [x[dim] for dim in call["dims"]]


def transpose(call: Call) -> Axes:
    """Swap two axes."""
    x = call.axes("self")
    i, j = (0, 1) if call.name == "t" else (call.dim(name, len(x)) for name in _swapped(call))
    if len(x) > 1:
        x[i], x[j] = x[j], x[i]
    return x


def _swapped(call: Call) -> tuple[str, str]:
    return next(pair for pair in (("dim0", "dim1"), ("axis0", "axis1")) if pair[0] in call.arguments)


def unsqueeze(call: Call) -> Axes:
    """Insert an axis of size 1."""
    x = call.axes("self")
    x.insert(call.dim("dim", len(x) + 1), Axis(1))
    return x


def squeeze(call: Call) -> Axes:
    """Drop axes of size 1."""
    x, dims = call.axes("self"), call["dim"] if "dim" in call.arguments else None
    chosen = range(len(x)) if dims is None else {d % len(x) for d in ([dims] if isinstance(dims, int) else dims)}
    return [axis for i, axis in enumerate(x) if not (i in chosen and axis.size == 1)]


def joined(call: Call) -> Axes:
    """Concatenate along one axis, unify the others."""
    parts = [call.known[node] for node in call.arguments["tensors"]]
    rank = len(call.shape)
    parts = [axes for axes in parts if len(axes) == rank]  # torch lets an empty vector pass
    dim = call.dim("dim", rank)
    for axes in parts[1:]:
        for place in range(rank):
            if place != dim:
                unify(parts[0][place], axes[place], call.where)
    return [concatenation([axes[dim] for axes in parts]) if i == dim else a for i, a in enumerate(parts[0])]


def stacked(call: Call) -> Axes:
    """Unify all axes, and make one for the list."""
    parts = [call.known[node] for node in call.arguments["tensors"]]
    x = broadcast(call, parts, [axis.size for axis in parts[0]])
    x.insert(call.dim("dim", len(x) + 1), call.fixed(len(parts), "stack"))
    return x


def cut(call: Call) -> tuple[Axes, ...]:
    """Cut an axis into the pieces that the example shows."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    pieces, rest = [], x[dim]
    sizes = [tensor.shape[dim] for tensor in call.value]
    try:
        for size in sizes[:-1]:
            piece, rest = split(rest, size)
            pieces.append(piece)
    except IncompatibleError:
        fix(x[dim], f"cut at a place that its factors do not have ({call.where})")
        return tuple([*x[:dim], call.fixed(size, "a piece of an axis"), *x[dim + 1 :]] for size in sizes)
    return tuple([*x[:dim], piece, *x[dim + 1 :]] for piece in [*pieces, rest])


def unbound(call: Call) -> tuple[Axes, ...]:
    """Take every index of an axis by its number."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    fix(x[dim], f"its entries are taken by number ({call.where})")
    return tuple([*x[:dim], *x[dim + 1 :]] for _ in call.value)


def selected(call: Call) -> Axes:
    """Take one index of an axis by its number."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    if x[dim].size > 1:
        fix(x[dim], f"its entries are taken by number ({call.where})")
    return [*x[:dim], *x[dim + 1 :]]


def sliced(call: Call) -> Axes:
    """Take a range of an axis."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    size, length = x[dim].size, call.shape[dim]
    if length == size:
        return x
    begin, end = slice(call["start"], call["end"]).indices(size)[:2]
    if call.name == "narrow":
        begin, end = call["start"] % size, call["start"] % size + call["length"]
    if length and call.arguments.get("step", 1) == 1:
        try:
            left, rest = split(x[dim], begin) if begin else (None, x[dim])
            piece, _ = split(rest, end - begin) if end < size else (rest, None)
        except IncompatibleError:
            pass
        else:
            del left
            return [*x[:dim], piece, *x[dim + 1 :]]
    fix(x[dim], f"only some of its entries are taken ({call.where})")
    return [*x[:dim], call.fixed(length, "some entries of an axis"), *x[dim + 1 :]]


def expanded(call: Call) -> Axes:
    """Repeat axes of size 1; how often may change when what they are unified with is cut."""
    x = call.axes("self")
    x = [Axis(1)] * (len(call.shape) - len(x)) + x
    return [axis if axis.size == size else Axis(size) for axis, size in zip(x, call.shape, strict=True)]


def repeated(call: Call) -> Axes:
    """Tile: the number of repetitions is an outer factor."""
    x = call.axes("self")
    x = [Axis(1)] * (len(call.shape) - len(x)) + x
    return [product([Axis(times), axis]) for axis, times in zip(x, call["repeats"], strict=True)]


def interleaved(call: Call) -> Axes:
    """Repeat every entry: the number of repetitions is an inner factor."""
    x, times = call.axes("self"), call["repeats"]
    if not isinstance(times, int) or call["dim"] is None:
        return opaque(call)  # type: ignore[return-value]
    dim = call.dim("dim", len(x))
    return [*x[:dim], product([x[dim], Axis(times)]), *x[dim + 1 :]]


def padded(call: Call) -> Axes:
    """Put constants around; on an axis that can be cut they are segments of their own."""
    x, amounts = call.axes("self"), call["pad"]
    if call.arguments.get("mode", "constant") != "constant" or min(amounts) < 0:
        return opaque(call)  # type: ignore[return-value]
    result = list(x)
    for place, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True), start=1):
        if before or after:
            parts = [*([Axis(before)] if before else []), x[-place], *([Axis(after)] if after else [])]
            result[-place] = concatenation(parts)
    return result


def made(call: Call) -> Axes:
    """Make a tensor of one constant: nothing tells its entries apart."""
    return [Axis(size) for size in call.shape]


def numbered(call: Call) -> Axes:
    """Make a tensor whose entries depend on their place."""
    return [call.fixed(size, "made from numbers") for size in call.shape]


def gated(call: Call) -> Axes:
    """One half times the sigmoid of the other."""
    x = call.axes("self")
    dim = call.dim("dim", len(x))
    try:
        left, right = split(x[dim], x[dim].size // 2)
    except IncompatibleError:
        return opaque(call)  # type: ignore[return-value]
    unify(left, right, call.where)
    return [*x[:dim], left, *x[dim + 1 :]]


MOVE: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"), view),
    "permute": permute,
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims"), transpose),
    "unsqueeze": unsqueeze, "squeeze": squeeze,
    **dict.fromkeys(("cat", "concat", "concatenate"), joined), "stack": stacked,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), cut), "unbind": unbound,
    "select": selected, "slice": sliced, "narrow": sliced,
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expanded), "repeat": repeated,
    "repeat_interleave": interleaved, **dict.fromkeys(("pad", "constant_pad_nd"), padded), "glu": gated,
    **dict.fromkeys(("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"), made),
    **dict.fromkeys(("arange", "linspace", "scalar_tensor", "eye", "rand", "randn", "randint", "tril_indices"),
                    numbered),
}  # fmt: skip
"""Rules by the name of the operator."""
