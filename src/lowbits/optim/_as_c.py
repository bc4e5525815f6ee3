# SPDX-License-Identifier: Apache-2.0
"""An update rule as C, translated from a trace of its definition, so that there is no second one to maintain."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer, TraceError

from lowbits.optim._rule import Update

# What torch computes on a CPU with one rounding, and C as well. torch's own float32 root is not among them.
_INFIX = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/",
    operator.gt: ">", operator.ge: ">=", operator.lt: "<", operator.le: "<=",
}  # fmt: skip
_METHODS = {
    "abs": "fabsf({0})",
    "sign": "(float)(({0} > 0) - ({0} < 0))",
    "square": "{0} * {0}",
    "neg": "-{0}",
}
_FUNCTIONS = {operator.neg: "-{0}", torch.where: "{0} ? {1} : {2}"}
_ROOT = ("double", "sqrt", "float")  # `root`: a float32 root that is rounded correctly, as sqrtf's is


@cache
def rule_as_c(update: Update, moments: int, scalars: Sequence[str]) -> str | None:
    """Return the body of a C function that applies a rule to n elements, float32 operation by float32 operation.

    It reads and writes `p`, `g`, `m` (an array a moment) and reads the scalars from `h`.

    Args:
        update: the rule's definition.
        moments: how many it has.
        scalars: names of what `h` holds.
    Returns:
        Statements; None where the rule does what has no translation, say look at a whole tensor.
    """
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    p, g, *m = (fx.Proxy(graph.placeholder(name), tracer) for name in ("p", "g", *(f"m{k}" for k in range(moments))))
    h = {name: fx.Proxy(graph.placeholder(f"h_{name}"), tracer) for name in scalars}
    try:
        new, moved = update(p, g, tuple(m), h)  # type: ignore[arg-type]
        return _body(graph, [new, *moved], scalars)  # type: ignore[list-item]
    except (TraceError, _UntranslatableError, TypeError):
        return None


class _UntranslatableError(Exception):
    pass


def _body(graph: fx.Graph, results: Sequence[fx.Proxy], scalars: Sequence[str]) -> str:
    """Write statements, those that all elements share before the loop."""
    shared, each, words = [], [], dict[fx.Node, str]()
    alike = set[fx.Node]()
    for number, node in enumerate(graph.nodes):
        if node.op == "placeholder":
            index = scalars.index(node.name.removeprefix("h_")) if node.name.startswith("h_") else None
            alike |= {node} if index is not None else set()
            words[node] = f"h[{index}]" if index is not None else {"p": "p[i]", "g": "g[i]"}.get(node.name, "")
            words[node] = words[node] or f"m[{node.name[1:]}][i]"
            continue
        words[node] = f"t{number}"
        inputs = [a for a in node.args if isinstance(a, fx.Node)]
        statement = f"const float t{number} = {_expression(node, words)};"
        if all(a in alike for a in inputs):
            alike.add(node)
            shared.append(statement)
        else:
            each.append(statement)
    targets = ["p[i]", *(f"m[{k}][i]" for k in range(len(results) - 1))]
    each += [f"{target} = {words[result.node]};" for target, result in zip(targets, results, strict=True)]
    return "\n    ".join([*shared, "#pragma omp simd", "for (int i = 0; i < n; i++) {", *each, "}"])


def _expression(node: fx.Node, words: Mapping[fx.Node, str]) -> str:
    if node.kwargs:
        raise _UntranslatableError
    if node.op == "call_method" and node.target in _ROOT:
        return ("sqrtf({})" if _in_root(node) == "sqrt" else "{}").format(_word(node.args[0], words))
    args = [_word(a, words) for a in node.args]
    if node.op == "call_function" and node.target in _INFIX:
        return f"{args[0]} {_INFIX[node.target]} {args[1]}"  # type: ignore[index]
    form = (_METHODS if node.op == "call_method" else _FUNCTIONS).get(node.target)  # type: ignore[arg-type]
    if form is None or node.op not in ("call_method", "call_function"):
        raise _UntranslatableError
    return form.format(*args)


def _in_root(node: fx.Node) -> str:
    """Return which step of `root` a node is; float64 does not occur elsewhere."""
    position = _ROOT.index(str(node.target))
    first = node
    for _ in range(position):
        first = first.args[0]
        if not isinstance(first, fx.Node):
            raise _UntranslatableError
    for name in _ROOT:
        last = name == _ROOT[-1]
        if first.target != name or len(first.args) != 1 or (not last and len(first.users) != 1):
            raise _UntranslatableError
        first = first if last else next(iter(first.users))
    return str(node.target)


def _word(value: Any, words: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return words[value]
    if isinstance(value, int | float):
        return f"(float)({float(value)!r})"
    raise _UntranslatableError
