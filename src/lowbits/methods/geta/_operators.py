# SPDX-License-Identifier: Apache-2.0
"""How operators that compute tie the axes of their tensors together; `_movements` has those that move elements.

Shapes: N batch, C channels, L and S lengths, E features of a head, O and I outputs and inputs of a weight.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

from lowbits.methods.geta._axes import Axis, fix, product, unify
from lowbits.methods.geta._calls import Axes, Call

ADDITIVE = {"add", "sub", "rsub", "where", "maximum", "minimum", "fmax", "fmin", "lerp", "addcmul", "addcdiv"}
"""Zero where all operands are."""
MULTIPLICATIVE = {"mul", "__and__", "bitwise_and", "logical_and"}
"""Zero where any operand is."""
KEEP_ZERO = {
    "relu", "gelu", "silu", "tanh", "neg", "abs", "dropout", "feature_dropout", "alpha_dropout", "to", "_to_copy",
    "clone", "contiguous", "detach", "alias", "type_as", "sin", "sqrt", "sign", "leaky_relu", "elu", "celu", "selu",
    "relu6", "hardswish", "mish", "erf", "expm1", "floor", "ceil", "round", "trunc", "square", "asin", "atan", "sinh",
    "asinh", "atanh", "tan", "softshrink", "hardshrink", "hardtanh", "div", "masked_fill", "lift_fresh_copy", "pow",
    "clamp", "real", "prelu", "rrelu", "positive", "log1p", "float", "half", "bfloat16", "nan_to_num",
}  # fmt: skip
"""Zero where the first operand is; `_zeros` looks at the bounds of clamp and the exponent of pow."""
KERNEL = "kernel of a convolution"
_NOT_TAGGED = {"to", "_to_copy", "dropout", "feature_dropout", "alpha_dropout", "contiguous", "type_as", "detach",
               "alias", "lift_fresh_copy", "masked_fill", "float", "half", "bfloat16", "rrelu", "expand_as",
               "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "where"}  # fmt: skip
"""Element by element although torch does not tag them so."""


def is_elementwise(call: Call) -> bool:
    """Whether each element of the result depends on the elements at its place alone."""
    from torch import Tag

    tags: Sequence[object] = getattr(call.node.target, "tags", ())
    return call.name in _NOT_TAGGED or (Tag.pointwise in tags and call.name != "prelu")


def elementwise(call: Call) -> Axes:
    """Unify aligned axes of all tensors; an axis of size 1 is broadcast."""
    return broadcast(call, [call.known[node] for node in call.tensors() if node in call.known])


def broadcast(call: Call, operands: Sequence[Axes], shape: Sequence[int] | None = None) -> Axes:
    """Unify the axes of tensors that are broadcast to a common shape."""
    result: Axes = []
    for place, size in enumerate(reversed(call.shape if shape is None else shape), start=1):
        found = [axes[-place] for axes in operands if len(axes) >= place and axes[-place].size == size]
        for axis in found[1:]:
            unify(found[0], axis, call.where)
        result.insert(0, found[0] if found else call.fixed(size, "broadcast"))
    return result


def linear(call: Call) -> Axes:
    """y[..., O] = x[..., I] w[O, I]^T + b[O]."""
    x, w = call.axes("input"), call.axes("weight")
    unify(x[-1], w[1], call.where)
    for bias in call.axes("bias"):
        unify(w[0], bias, call.where)
    return [*x[:-1], w[0]]


def matmul(call: Call) -> Axes:
    """[..., L, K] times [..., K, S]: the batch axes are broadcast."""
    a, b = (call.axes(name) for name in (("self", "other") if call.name == "matmul" else ("self", "mat2")))
    unify(a[-1], b[-2] if len(b) > 1 else b[-1], call.where)
    rows, columns = a[-2:-1], b[-1:] if len(b) > 1 else []
    batch = call.shape[: len(call.shape) - len(rows) - len(columns)]
    return [*broadcast(call, [a[:-2], b[:-2]], batch), *rows, *columns]


def addmm(call: Call) -> Axes:
    """bias + [L, K] times [K, S]."""
    bias, a, b = (call.axes(name) for name in ("self", "mat1", "mat2"))
    unify(a[1], b[0], call.where)
    return broadcast(call, [[a[0], b[1]], bias])


def einsum(call: Call) -> Axes | tuple[Axes, ...]:
    """A letter is an axis."""
    inputs, arrow, output = call["equation"].replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        return opaque(call)
    letters: dict[str, Axis] = {}
    for term, node in zip(inputs.split(","), call.arguments["tensors"], strict=True):
        for letter, axis in zip(term, call.known[node], strict=True):
            if axis.size > 1 or letter not in letters:
                if letters.setdefault(letter, axis) is not axis and letters[letter].size > 1:
                    unify(letters[letter], axis, call.where)
                else:
                    letters[letter] = axis
    return [letters[letter] for letter in output]


def convolution(call: Call) -> Axes:
    """x[N, C, ...] with w[O, C / groups, ...], transposed with w[C, O / groups, ...]."""
    x, w, bias = call.axes("input"), call.axes("weight"), call.axes("bias")
    spatial = len(w) - 2
    channel, transposed = x[-spatial - 1], bool(call["transposed"]) or "transpose" in call.name
    for axis in w[2:]:
        fix(axis, f"{KERNEL} ({call.where})")
    groups = Axis(call["groups"])
    if transposed:
        whole = product([groups, w[1]])
        unify(channel, w[0], call.where)
        unify(w[0], product([groups, Axis(w[0].size // groups.size)]), call.where)
    else:
        whole = w[0]
        unify(channel, product([groups, w[1]]), call.where)
        unify(whole, product([groups, Axis(whole.size // groups.size)]), call.where)
    for axis in bias:
        unify(whole, axis, call.where)
    places = [call.fixed(size, "position") for size in call.shape[-spatial:]]
    return [*x[: -spatial - 1], whole, *places]


def embedding(call: Call) -> Axes:
    """Rows of w[V, E]: V is a vocabulary."""
    w = call.axes("weight")
    fix(w[0], f"vocabulary: its entries are looked up by number ({call.where})")
    return [*call.axes("indices"), w[1]]


def attention(call: Call) -> Axes:
    """softmax(q k^T) v with q[..., H, L, E], k[..., H, S, E], v[..., H, S, Ev]; query heads may share keys."""
    q, k, v, mask = (call.axes(name) for name in ("query", "key", "value", "attn_mask"))
    unify(q[-1], k[-1], call.where)
    unify(k[-2], v[-2], call.where)
    for axis in (q[-2], k[-2]):
        fix(axis, f"length of a sequence ({call.where})")
    if call["enable_gqa"] and len(q) > 2 and q[-3].size != k[-3].size:
        unify(k[-3], v[-3], call.where)
        unify(q[-3], product([k[-3], Axis(q[-3].size // k[-3].size)]), call.where)
        batch = [*broadcast(call, [q[:-3], k[:-3], v[:-3]], call.shape[:-3]), q[-3]]
    else:
        batch = broadcast(call, [q[:-2], k[:-2], v[:-2]], call.shape[:-2])
    if mask:
        broadcast(call, [[*batch, q[-2], k[-2]], mask], [a.size for a in (*batch, q[-2], k[-2])])
    return [*batch, q[-2], v[-1]]


def over_an_axis(call: Call) -> Axes:
    """Softmax, cumulative sums, sorting: the result has the operand's shape, one axis is looked at as a whole."""
    x = call.axes("self")
    fix(x[call.dim("dim", len(x))], f"its entries are compared or added up one after another ({call.where})")
    return x


def reduction(call: Call) -> Axes:
    """Mean, maximum, variance, ...: what is reduced is coupled by a statistic; a sum's axis can be cut."""
    x, dims = call.axes("self"), call["dim"]
    dims = (
        list(range(len(x))) if dims in (None, []) else [d % len(x) for d in ([dims] if isinstance(dims, int) else dims)]
    )
    for dim in dims:
        if call.name != "sum":
            fix(x[dim], f"statistic over this axis ({call.where})")
    keepdim = bool(call["keepdim"])
    return [Axis(1) if i in dims else axis for i, axis in enumerate(x) if keepdim or i not in dims]


def several(call: Call) -> tuple[Axes, ...]:
    """A reduction that returns values and indices."""
    result = reduction(call)
    return tuple(list(result) for _ in call.value)


def extreme(call: Call) -> Axes | tuple[Axes, ...]:
    """Largest, smallest, sorted: of two tensors element by element, else over an axis or over all."""
    if call.given("other"):
        return elementwise(call)
    if isinstance(call.value, tuple | list):
        return tuple(over_an_axis(call) for _ in call.value) if call.name in ("sort", "topk") else several(call)
    return reduction(call)


def layer_norm(call: Call) -> Axes:
    """Mean and variance over the last axes."""
    x = call.axes("input")
    last = x[-len(call["normalized_shape"]) :]
    for name in ("weight", "bias"):
        for axis, own in zip(last, call.axes(name), strict=False):
            unify(axis, own, call.where)
    for axis in last:
        fix(axis, f"statistic over this axis ({call.where})")
    return x


def group_norm(call: Call) -> Axes:
    """Mean and variance over the channels of a group: whole groups can be cut."""
    x = call.axes("input")
    groups = Axis(call["num_groups"])
    inner = call.fixed(x[1].size // groups.size, "statistic over the channels of a group")
    unify(x[1], product([groups, inner]), call.where)
    for name in ("weight", "bias"):
        for own in call.axes(name):
            unify(x[1], own, call.where)
    return x


def batch_norm(call: Call) -> Axes:
    """Statistics a channel."""
    x = call.axes("input")
    for name in ("weight", "bias", "running_mean", "running_var"):
        for own in call.axes(name):
            unify(x[1], own, call.where)
    return x


def prelu(call: Call) -> Axes:
    """One slope, or one a channel."""
    x, w = call.axes("self"), call.axes("weight")
    if w and w[0].size > 1:
        unify(x[1], w[0], call.where)
    return x


def pooling(call: Call) -> Axes | tuple[Axes, ...]:
    """Pooling and resizing of the last axes, as many as the operator's name says."""
    x = call.axes("self" if "self" in call.arguments else "input")
    match = re.search(r"(\d)d", call.name)
    spatial = int(match[1]) if match else len(x) - 2
    shape = call.value[0].shape if isinstance(call.value, tuple | list) else call.shape
    places = [call.fixed(size, "position") for size in shape[-spatial:]]
    result = [*x[:-spatial], *places]
    return tuple(list(result) for _ in call.value) if isinstance(call.value, tuple | list) else result


def opaque(call: Call) -> Axes | tuple[Axes, ...]:
    """Keep every axis that an operator sees whole, and every axis that it makes."""
    for axis in seen(call):
        fix(axis, no_rule(call))
    return unrelated(call)


def no_rule(call: Call) -> str:
    """Say that nothing is known of an operator."""
    return f"no rule says which of its slices belong together ({call.where})"


def seen(call: Call) -> list[Axis]:
    """Return the axes of all operands."""
    every = itertools.chain.from_iterable(call.known.get(node) or [] for node in call.tensors())
    return [axis for axis in every if isinstance(axis, Axis)]


def unrelated(call: Call) -> Axes | tuple[Axes, ...]:
    """Return axes for the result that nothing can be cut from."""
    if isinstance(call.value, tuple | list):
        return tuple([call.fixed(n, _MADE) for n in getattr(value, "shape", ())] for value in call.value)
    return [call.fixed(size, _MADE) for size in getattr(call.value, "shape", ())]


_MADE = "made by an operator without a rule"
Rule = Callable[[Call], "Axes | tuple[Axes, ...]"]

COMPUTE: dict[str, Rule] = {
    "linear": linear, "matmul": matmul, "mm": matmul, "bmm": matmul, "addmm": addmm, "einsum": einsum,
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d",
                     "conv_transpose3d"), convolution),
    "embedding": embedding, "scaled_dot_product_attention": attention,
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp"),
                    over_an_axis),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "argmax", "argmin", "logsumexp", "any", "all", "std", "var",
                     "prod", "linalg_vector_norm"), reduction),
    **dict.fromkeys(("var_mean", "std_mean"), several), **dict.fromkeys(("max", "min", "median", "sort"), extreme),
    "layer_norm": layer_norm, "rms_norm": layer_norm, "group_norm": group_norm, "batch_norm": batch_norm,
    "instance_norm": batch_norm, "prelu": prelu,
    **dict.fromkeys((f"{kind}_pool{n}d" for n in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg",
                                                                        "adaptive_max")), pooling),
    **dict.fromkeys(("max_pool2d_with_indices", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d",
                     "upsample_bicubic2d", "upsample_nearest3d", "upsample_linear1d"), pooling),
}  # fmt: skip
"""Rules by the name of the operator."""
