# SPDX-License-Identifier: Apache-2.0
"""What a network costs: multiply-accumulates times bits, and bytes, counted from its tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import GraphModule, Node

from lowbits.methods.geta._calls import Call
from lowbits.methods.geta._construct import PackedWeight, SubNetwork
from lowbits.methods.geta._graph import Graph
from lowbits.methods.geta._trace import values_of

FULL = 32


@dataclass(frozen=True)
class Work:
    """What one operator call multiplies.

    Args:
        name: the layer's weight, or the node if both operands are computed.
        macs: multiply-accumulates.
        weight_bits: of the weight, or of the second operand.
        input_bits: of the input.
        layer: whether one operand is a parameter.
    """

    name: str
    macs: int
    weight_bits: int
    input_bits: int
    layer: bool

    @property
    def bops(self) -> int:
        """Multiply-accumulates times the bits of both operands."""
        return self.macs * self.weight_bits * self.input_bits


@dataclass(frozen=True)
class Cost:
    """What a network costs for one input.

    Args:
        works: every product of tensors.
        parameters: elements of parameters and packed weights.
        stored_bytes: bytes of all tensors as they are stored.
        logical_bytes: the same with every quantized weight at its own bits, not at the bits of its container.
    """

    works: tuple[Work, ...]
    parameters: int
    stored_bytes: int
    logical_bytes: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the layers with weights."""
        return sum(work.macs for work in self.works if work.layer)

    @property
    def bops(self) -> int:
        """BOPs of the layers with weights, as the authors count; products of two activations are left out."""
        return sum(work.bops for work in self.works if work.layer)

    @property
    def complete_bops(self) -> int:
        """BOPs with the products of two activations (attention scores and mixtures)."""
        return sum(work.bops for work in self.works)

    def relative_bops(self, dense: Cost) -> float:
        """Return BOPs over those of the dense network in 32 bits, layers with weights alone."""
        return self.bops / dense.bops

    def relative_complete_bops(self, dense: Cost) -> float:
        """Return BOPs over those of the dense network in 32 bits, everything counted."""
        return self.complete_bops / dense.complete_bops


def dense_cost(graph: Graph) -> Cost:
    """Return what the traced network costs before anything is cut, for the traced example.

        BOPs = sum over layers of MACs * b_w * b_a,  32 bits for what is not quantized

    Args:
        graph: of the model.
    """
    tensors = {id(t): t for t in (*graph.module.parameters(), *graph.module.buffers())}.values()
    size = sum(t.nbytes for t in tensors)
    return Cost(_works(graph.module, graph.values), sum(p.numel() for p in graph.module.parameters()), size, size)


def cost(small: SubNetwork, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Cost:
    """Return what a sub-network costs, for an input.

    Args:
        small: the sub-network.
        args: an input; that of the graph if it shall be compared with `dense_cost`.
        kwargs: inputs by name.
    """
    works = _works(small.network, values_of(small.network, args, kwargs or {}))
    packed = [module for module in small.modules() if isinstance(module, PackedWeight)]
    plain = sum(p.numel() for p in small.parameters())
    counts = [(math.prod(module.shape), module) for module in packed]
    stored = sum(tensor.nbytes for tensor in small.state_dict().values())
    saved = sum(module.codes.nbytes - -(-count * module.bits // 8) for count, module in counts)
    return Cost(works, plain + sum(count for count, _ in counts), stored, stored - saved)


def _works(module: GraphModule, values: Mapping[Node, Any]) -> tuple[Work, ...]:
    found = []
    for node in module.graph.nodes:
        if node.op == "call_function" and isinstance(values[node], Tensor):
            found += _work(module, Call(node, {}, values))
    return tuple(found)


def _work(module: GraphModule, call: Call) -> list[Work]:
    """Return the products of a call; attention has two."""
    if call.name == "scaled_dot_product_attention":
        q, k, v = (call.values[call.arguments[name]].shape for name in ("query", "key", "value"))
        scores = math.prod(q[:-1]) * k[-2]
        return [Work(f"{call.node.name}.{part}", scores * size, FULL, FULL, False)
                for part, size in (("scores", q[-1]), ("mixture", v[-1]))]  # fmt: skip
    if call.name == "einsum" and len(call.arguments["tensors"]) == 2:
        return [_einsum(module, call)]
    names = _OPERANDS.get(call.name) or (("input", "weight") if "conv" in call.name and call.given("weight") else None)
    if names is None:
        return []
    x, w = (call.arguments[name] for name in names)
    return [Work(_weight_name(w) or call.node.name, _macs(call, call.values[x], call.values[w]), _bits(module, w),
                 _bits(module, x), _weight_name(w) is not None)]  # fmt: skip


_OPERANDS = {
    "linear": ("input", "weight"),
    "addmm": ("mat1", "mat2"),
    "matmul": ("self", "other"),
    "mm": ("self", "mat2"),
    "bmm": ("self", "mat2"),
}


def _einsum(module: GraphModule, call: Call) -> Work:
    """Every combination of its letters is one product."""
    nodes = call.arguments["tensors"]
    terms = call["equation"].replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, node in zip(terms, nodes, strict=True):
        for letter, size in zip(term, call.values[node].shape, strict=True):
            sizes[letter] = max(sizes.get(letter, 1), size)
    weight = _weight_name(nodes[1])
    name = weight or call.node.name
    return Work(name, math.prod(sizes.values()), _bits(module, nodes[1]), _bits(module, nodes[0]), weight is not None)


def _macs(call: Call, x: Tensor, w: Tensor) -> int:
    if "conv" in call.name:
        transposed = "transpose" in call.name or bool(call["transposed"])
        return (x.numel() if transposed else call.value.numel()) * w.shape[1] * math.prod(w.shape[2:])
    return call.value.numel() * x.shape[-1]


def _weight_name(node: Node) -> str | None:
    """Return the parameter that an operand is, packed or not."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    if node.op == "call_module" and "lowbits" in node.meta and not str(node.meta["lowbits"]).endswith(".input"):
        return str(node.meta["lowbits"])
    return str(node.target) if node.op == "get_attr" else None


def _bits(module: GraphModule, node: Node) -> int:
    if node.op != "call_module":
        return FULL
    return int(module.get_submodule(str(node.target)).bits)  # type: ignore[arg-type]
