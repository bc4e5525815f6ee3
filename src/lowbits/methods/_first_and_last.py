# SPDX-License-Identifier: Apache-2.0
"""Find the first and the last layer of a network in its graph, not in the order of its parameters.

First are the contractions (linear, convolution, matrix product with a weight) and embeddings that the inputs reach with
none of them before; last are those with none behind. A tied weight that is both is both.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.fx import Node

from lowbits.errors import ConversionError

_ATEN = torch.ops.aten
_CONTRACTIONS: dict[Any, tuple[int, ...]] = {  # operator -> where its weights stand among the arguments
    _ATEN.linear.default: (1,),
    _ATEN.addmm.default: (1, 2),
    _ATEN.mm.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    _ATEN.matmul.default: (0, 1),
    _ATEN.embedding.default: (0,),
    _ATEN.conv1d.default: (1,),
    _ATEN.conv2d.default: (1,),
    _ATEN.conv2d.padding: (1,),
    _ATEN.conv3d.default: (1,),
    _ATEN.conv_transpose2d.input: (1,),
    _ATEN.convolution.default: (1,),
    _ATEN.lstm.input: (2,),
    _ATEN.gru.input: (2,),
}


class FirstAndLast(NamedTuple):
    """Names of parameters.

    Args:
        first: of the layers that the inputs reach first.
        last: of the layers behind which there is none.
    """

    first: frozenset[str]
    last: frozenset[str]


def first_and_last(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> FirstAndLast:
    """Return the weights of a network's first and last layers.

    A tied weight goes by its first name, the one that `named_parameters` uses.

    Args:
        model: any module that `torch.export` can trace; before `quantize_weights_`.
        args: of its forward, an example; values do not matter.
        kwargs: likewise; transformers' decoders need `use_cache=False`.
    Raises:
        ConversionError: the graph cannot be traced, or holds no such layer.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*assigned during export")  # what tracing leaves in an LSTM
            program = torch.export.export(_shell(model), args, dict(kwargs or {}), strict=False)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise ConversionError(
            f"{type(model).__name__} cannot be traced by torch.export ({str(error).splitlines()[0]}); name its first "
            "and last layers in `levels=` yourself."
        ) from error
    inputs = program.graph_signature.inputs_to_parameters
    weight_of = {
        node: names[id(_parameter(model, inputs[node.name]))] for node in program.graph.nodes if node.name in inputs
    }
    layers = {node: found for node in program.graph.nodes if (found := _weights(node, weight_of))}
    if not layers:
        raise ConversionError(f"{type(model).__name__}: its graph holds no linear, convolution or embedding layer.")
    before = _reached(program.graph.nodes, layers, forwards=True)
    behind = _reached(reversed(program.graph.nodes), layers, forwards=False)
    first = [weights for node, weights in layers.items() if node not in before]
    last = [weights for node, weights in layers.items() if node not in behind]
    return FirstAndLast(frozenset().union(*first), frozenset().union(*last))


def _shell(model: nn.Module) -> nn.Module:
    """A copy of the modules around the same tensors: tracing changes attributes of recurrent layers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})


def _parameter(model: nn.Module, path: str) -> nn.Parameter:
    owner, _, key = path.rpartition(".")
    parameter = model.get_submodule(owner)._parameters[key]
    assert parameter is not None
    return parameter


def _weights(node: Node, weight_of: Mapping[Node, str]) -> set[str]:
    """The weights that a node contracts or looks up, behind transpositions and casts; matrices alone."""
    found: set[str] = set()
    for position in _CONTRACTIONS.get(node.target, ()):
        if position < len(node.args):
            arguments = node.args[position]
            for argument in arguments if isinstance(arguments, list | tuple) else [arguments]:
                source = _source(argument)
                if source in weight_of and source.meta["val"].ndim >= 2:
                    found.add(weight_of[source])
    return found


def _source(argument: Any) -> Any:
    """Follow an argument through operators of one input."""
    while isinstance(argument, Node) and argument.op == "call_function" and len(argument.all_input_nodes) == 1:
        argument = argument.all_input_nodes[0]
    return argument


def _reached(nodes: Any, layers: Mapping[Node, set[str]], forwards: bool) -> set[Node]:
    """All nodes that have a layer somewhere before them, or behind them."""
    found: set[Node] = set()
    for node in nodes:
        for other in node.all_input_nodes if forwards else node.users:
            if other in found or other in layers:
                found.add(node)
    return found
