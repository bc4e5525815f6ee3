# SPDX-License-Identifier: Apache-2.0
"""Build the sub-network: smaller tensors, integer weights, the same function."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lowbits.errors import ConversionError, SpecError
from lowbits.formats import pack, unpack
from lowbits.methods.geta._calls import Call
from lowbits.methods.geta._graph import Graph
from lowbits.methods.geta._layers import inputs_as_they_are, quantized_layers, weight_quantizers
from lowbits.methods.geta._quantizer import Quantizer, quantize
from lowbits.methods.geta._rewrite import Sizes, rewrite_
from lowbits.methods.geta._trace import attribute, evaluating

_CONTAINERS = (2, 4, 8, 16)


class PackedWeight(nn.Module):
    """A weight as integers: two to the byte at 4 bits, four at 2, one at 8, two bytes each above.

    Args:
        codes: int32, the integers k of w = d k.
        step: d, scalar.
        bits: width; codes are within 2^(bits-1) - 1 of 0.
        dtype: of the weight that it gives; the step's if None.
    """

    codes: Tensor
    step: Tensor

    def __init__(self, codes: Tensor, step: Tensor, bits: int, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.bits, self.shape, self.dtype = bits, tuple(codes.shape), dtype or step.dtype
        self.container = next(width for width in _CONTAINERS if width >= bits)
        most = (1 << bits - 1) - 1
        if codes.numel() and int(codes.abs().max()) > most:
            raise SpecError(
                f"PackedWeight: codes up to {int(codes.abs().max())} do not fit {bits} bits (at most {most})."
            )
        self.register_buffer("codes", self._stored(codes))
        self.register_buffer("step", step.detach().clone())

    def _stored(self, codes: Tensor) -> Tensor:
        if self.container >= 8:
            return codes.to(torch.int8 if self.container == 8 else torch.int16)
        return pack((codes + (1 << self.container - 1)).to(torch.uint8), self.container)

    def integers(self) -> Tensor:
        """Return the codes in the weight's shape, int16."""
        if self.container >= 8:
            return self.codes.to(torch.int16)
        count = 1
        for size in self.shape:
            count *= size
        codes = unpack(self.codes, self.container, count).to(torch.int16) - (1 << self.container - 1)
        return codes.view(self.shape)

    def forward(self) -> Tensor:
        """Return the weight."""
        return (self.integers().to(self.step.dtype) * self.step).to(self.dtype)


class InputQuantizer(nn.Module):
    """Quantize a layer's input with scalars that are trained no more.

    Args:
        quantizer: the trained one.
        bits: its final width.

    Attributes:
        passing: True lets inputs pass as they are.
    """

    def __init__(self, quantizer: Quantizer, bits: int) -> None:
        super().__init__()
        self.bits, self.passing = bits, False
        for name in ("step", "limit", "exponent"):
            self.register_buffer(name, getattr(quantizer, name).detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Return x on the grid."""
        return x if self.passing else quantize(x, self.step, self.limit, self.exponent)  # type: ignore[arg-type]


class SubNetwork(nn.Module):
    """The result: called as the model was, smaller, with its weights in integers.

    Args:
        network: the rewritten graph with its tensors.
        kept: indices of the units that are left, by dimension.
        full: number of units that there were, by dimension.
    """

    def __init__(self, network: GraphModule, kept: Mapping[str, list[int]], full: Mapping[str, int]) -> None:
        super().__init__()
        self.network, self.kept, self.full = network, dict(kept), dict(full)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute what the masked model computes."""
        return self.network(*args, **kwargs)

    @property
    def bits(self) -> dict[str, int]:
        """Width of every quantized weight, by parameter; inputs as `<layer>.input`."""
        found = {}
        for node in self.network.graph.nodes:
            if node.op == "call_module":
                module = self.network.get_submodule(str(node.target))
                found[node.meta["lowbits"]] = module.bits
        return found  # type: ignore[return-value]

    @property
    def sparsity(self) -> float:
        """Share of the units that are gone."""
        return 1 - sum(len(indices) for indices in self.kept.values()) / max(sum(self.full.values()), 1)


def construct(graph: Graph, model: nn.Module, keep: Tensor, tolerance: float = 1e-4) -> SubNetwork:
    """Cut the units that do not stay, store quantized weights as integers, and prove the result on the traced example.

    Args:
        graph: of the model, traced before quantizers were inserted.
        model: trained; left as it is.
        keep: bool `[units]`, which units stay.
        tolerance: largest difference to the masked model, relative to its largest output, for float32 outputs; 256
            times that for bfloat16, 90 times for float16.
    Returns:
        The sub-network, in evaluation mode.
    Raises:
        ConversionError: it does not compute what the masked model computes, or a dimension has no unit left.
        SpecError: a quantizer's width is not an integer.
    """
    _check_keep(graph, keep)
    network = _rewritten(graph, Sizes(graph.masks(keep)))
    slices = graph.kept_slices(keep)
    weights = weight_quantizers(model)
    inputs = {name: layer.input_quantizer for name, layer in quantized_layers(model).items()}
    trained = dict(model.named_parameters(remove_duplicate=False))
    state = trained | dict(model.named_buffers(remove_duplicate=False))
    root = nn.Module()
    for node in list(network.nodes):
        if node.op == "get_attr":
            name = str(node.target)
            value = state.get(name, attribute(graph.module, name))
            value = _sliced(value, slices.get(name))
            value = nn.Parameter(value, requires_grad=False) if name in trained else value
            _store_(node, root, value, weights.get(name))
    for node in list(network.nodes):
        if node.op == "call_function":
            _quantize_input_(node, root, inputs)
    network.lint()
    parts = keep.cpu().split([dimension.size for dimension in graph.dimensions])
    kept = {d.name: part.nonzero().squeeze(1).tolist() for d, part in zip(graph.dimensions, parts, strict=True)}
    module = GraphModule(root, network, "SubNetwork")
    result = SubNetwork(module, kept, {d.name: d.size for d in graph.dimensions}).eval()
    _prove(graph, model, keep, result, tolerance)
    return result


def _check_keep(graph: Graph, keep: Tensor) -> None:
    if keep.shape != (graph.units,) or keep.dtype != torch.bool:
        raise SpecError(
            f"construct: keep must be bool [{graph.units}], one for every unit; got {keep.dtype} {list(keep.shape)}."
        )
    for dimension, part in zip(graph.dimensions, keep.split([d.size for d in graph.dimensions]), strict=True):
        if not part.any():
            raise ConversionError(f"{dimension.name}: none of its {dimension.size} units is left; keep one at least.")


def _rewritten(graph: Graph, sizes: Sizes) -> FxGraph:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)  # of torch 2.13's own pytree
        new = copy.deepcopy(graph.module.graph)
    pairs = dict(zip(graph.module.graph.nodes, new.nodes, strict=True))
    axes = {pairs[node]: found for node, found in graph.axes.items()}
    values = {pairs[node]: value for node, value in graph.values.items()}
    for node in list(new.nodes):
        if node.op == "call_function" and node in axes:
            rewrite_(Call(node, axes, values), axes[node], sizes)
    return new


def _sliced(value: Any, slices: list[Tensor] | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    for axis, mask in enumerate(slices or []):
        if not mask.all():
            value = value.index_select(axis, mask.nonzero().squeeze(1).to(value.device))
    return value.clone()


def _store_(node: Node, root: nn.Module, value: Any, quantizer: Quantizer | None) -> None:
    """Put a tensor where its node finds it: a quantized weight as integers, others as they are."""
    path, _, name = str(node.target).rpartition(".")
    place = _place(root, path)
    if quantizer is not None:
        packed = PackedWeight(quantizer.codes(value), quantizer.step, whole_bits(quantizer), value.dtype)
        place.add_module("packed", packed)
        with node.graph.inserting_before(node):
            new = node.graph.call_module(f"{path}.packed" if path else "packed")
        new.meta = {"lowbits": str(node.target), "nn_module_stack": node.meta.get("nn_module_stack")}
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
    elif isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        place.register_buffer(name, value)
    else:
        setattr(place, name, value)


def _place(root: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def whole_bits(quantizer: Quantizer) -> int:
    """Return the width of a quantizer that has finished training.

    Raises:
        SpecError: it is no integer.
    """
    bits = float(quantizer.bits)
    if abs(bits - round(bits)) > 1e-3:
        raise SpecError(
            f"a quantizer has {bits:.3f} bits, which is no integer: training has not come to the cool-down. Go on to "
            "the end of the schedule, or choose the width with quantizer.set_bits_(...)."
        )
    return round(bits)


def _quantize_input_(node: Node, root: nn.Module, inputs: Mapping[str, Quantizer | None]) -> None:
    """Put a layer's input quantizer before the call that reads its packed weight."""
    packed = [x for x in node.all_input_nodes if x.op == "call_module" and str(x.target).endswith("packed")]
    for weight in packed:
        path = str(weight.target).removesuffix("packed").removesuffix(".")
        quantizer = inputs.get(path)
        arguments = Call(node, {}, {}).arguments
        x = arguments.get("input", arguments.get("mat1"))
        if quantizer is None or not isinstance(x, Node):
            continue
        _place(root, path).add_module("input_quantizer", InputQuantizer(quantizer, whole_bits(quantizer)))
        with node.graph.inserting_before(node):
            new = node.graph.call_module(f"{path}.input_quantizer" if path else "input_quantizer", (x,))
        new.meta = {"lowbits": f"{path}.input", "nn_module_stack": node.meta.get("nn_module_stack")}
        node.replace_input_with(x, new)


@torch.no_grad()
def _prove(graph: Graph, model: nn.Module, keep: Tensor, result: SubNetwork, tolerance: float) -> None:
    """Compare with the masked model on the traced example."""
    if any(p.device.type == "meta" for p in model.parameters()):
        return
    args, kwargs = graph.example
    # A sum in another order may round an input to the other neighbour: inputs pass as they are, on both sides.
    inputs = [module for module in result.modules() if isinstance(module, InputQuantizer)]
    with inputs_as_they_are(quantized_layers(model).values()), _exact_products():
        for module in inputs:
            module.passing = True
        want, got = masked_outputs(graph, model, keep), _flat(result(*args, **kwargs))
        for module in inputs:
            module.passing = False
    for a, b in zip(want, got, strict=True):
        scale = float(a.float().abs().max()) or 1.0
        apart = float((a.float() - b.float()).abs().max())
        # Roundings add up like a walk: by the root of how much coarser the outputs are.
        coarser = (torch.finfo(a.dtype).eps / torch.finfo(torch.float32).eps) ** 0.5 if a.is_floating_point() else 1.0
        if not apart <= tolerance * max(coarser, 1.0) * scale:
            raise ConversionError(
                f"{type(model).__name__}: the sub-network differs from the masked model by {apart:.3g} on outputs up "
                f"to {scale:.3g}. An operator does something that its rule does not say; name it in rules=... of "
                "trace() as Treat.WHOLE, and report it."
            )


@contextmanager
def _exact_products() -> Iterator[None]:
    """Switch off TF32, which cuDNN uses by default and GEMMs on request: sums would differ by a thousandth."""
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])


@torch.no_grad()
def masked_outputs(graph: Graph, model: nn.Module, keep: Tensor) -> list[Tensor]:
    """Return all output tensors of the model for the traced example with the units zeroed that do not stay.

    Args:
        graph: of the model.
        model: left as it is.
        keep: bool `[units]`.
    """
    args, kwargs = graph.example
    parameters = {name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)}
    holder = _Holder(parameters)
    graph.zero_(holder, keep)
    with evaluating(model):
        return _flat(torch.func.functional_call(model, parameters, args, kwargs, tie_weights=False))


class _Holder(nn.Module):
    """Parameters by their dotted names, for `Graph.zero_`."""

    def __init__(self, parameters: dict[str, Tensor]) -> None:
        super().__init__()
        self.held = parameters

    def named_parameters(self, *_: Any, **__: Any) -> Any:
        return iter(self.held.items())


def _flat(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
