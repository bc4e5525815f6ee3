# SPDX-License-Identifier: Apache-2.0
"""Count the bytes that training holds: weights, gradients, optimizer state, and what autograd keeps for backward.

`measure_memory` looks at a real model and hooks what autograd saves; `lowbits.analysis.predict_memory` computes the
same numbers from shapes alone. Beside what is held stands what it would be *in few bits*: every tensor that the recipe
quantizes stored as codes and float32 scales. Simulated training holds most of them in full.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch
from torch import Tensor, nn

from lowbits.analysis._stored import stored_bytes
from lowbits.nn import QuantizedLayer, Save, listening_to_saved, quantized_layers

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Bytes:
    """Bytes by category.

    Args:
        weights: parameters, each storage once.
        gradients: `.grad` of the trainable parameters, once backward has filled them.
        optimizer: state tensors.
        saved_activations: what autograd keeps between forward and backward, parameters and buffers excepted.
    """

    weights: int
    gradients: int
    optimizer: int
    saved_activations: int

    @property
    def total(self) -> int:
        """Sum of the categories. They are not all held at once: see the peak of `predict_memory`."""
        return self.weights + self.gradients + self.optimizer + self.saved_activations


@dataclass(frozen=True)
class Memory:
    """What is held, and what the recipe's tensors would take in few bits.

    Args:
        measured: as it is.
        stored_in_few_bits: with every quantized tensor as packed codes plus scales.
    """

    measured: Bytes
    stored_in_few_bits: Bytes

    def as_json(self) -> dict[str, dict[str, int]]:
        """Return the two as plain dictionaries, the form of `memory` in result.json."""
        return asdict(self)


def measure_memory(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    loss: Callable[[nn.Module, Batch], Tensor],
    batch: Batch,
) -> Memory:
    """Count the bytes of a model in training; works for any architecture.

    Args:
        model: converted or not, in the mode in which it is trained.
        optimizer: after its first step, or None to leave its state out.
        loss: `(model, batch) -> scalar`; runs forward once, under whatever autocast it brings.
        batch: a training batch.
    """
    saved, in_few_bits = _saved_bytes(model, loss, batch)
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    state = 0 if optimizer is None else _unique_bytes(_tensors(optimizer.state))
    return Memory(
        Bytes(_unique_bytes(model.parameters()), gradients, state, saved),
        Bytes(weights_in_few_bits(model), gradients, state, in_few_bits),
    )


def measure_saved_bytes(model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> int:
    """Return the bytes that autograd keeps for backward, each storage once, parameters and buffers excepted.

    Args:
        model: in the mode in which it is trained.
        loss: `(model, batch) -> scalar`.
        batch: a training batch.
    """
    return _saved_bytes(model, loss, batch)[0]


def weights_in_few_bits(model: nn.Module) -> int:
    """Return the bytes of all parameters with each converted layer's weight stored as its recipe quantizes it.

    A weight that a layer in high precision reads too (a tied embedding) has to stay as it is.

    Args:
        model: converted or not.
    """
    layers = quantized_layers(model)
    plain = {id(p) for n, m in model.named_modules() if n not in layers for p in m.parameters(recurse=False)}
    total = _unique_bytes(model.parameters())
    for layer in layers.values():
        spec = layer.active.fprop.rhs
        if spec is not None and id(layer.weight) not in plain:
            total += stored_bytes((layer.out_features, layer.in_features), spec) - layer.weight.nbytes
    return total


@dataclass
class _Storage:
    """One storage that autograd keeps, and who saved it: converted layers by name, anything else as ''."""

    nbytes: int
    savers: dict[str, tuple[int, ...]] = field(default_factory=dict)


def _saved_bytes(model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> tuple[int, int]:
    """Return the bytes saved for backward, as they are and in few bits."""
    layers = quantized_layers(model)
    own = (*model.parameters(), *model.buffers())
    known = {part.untyped_storage().data_ptr() for t in own for part in held(t)}
    storages: dict[int, _Storage] = {}
    running: list[str] = []

    def pack(tensor: Tensor) -> Tensor:
        for part in held(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in known:
                kept = storages.setdefault(storage.data_ptr(), _Storage(storage.nbytes()))
                kept.savers[running[-1] if running else ""] = tuple(tensor.shape)
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with _tracking(layers, running), hooks, listening_to_saved(pack):
        value = loss(model, batch)
    total = sum(kept.nbytes for kept in storages.values())
    few = sum(_in_few_bits(kept, layers) for kept in storages.values())
    del value  # the graph had to live until here: a freed storage's address may be given out again
    return total, few


def _in_few_bits(kept: _Storage, layers: dict[str, QuantizedLayer]) -> int:
    """Codes for every converted layer that saved it as its input, and the original if anything else needs it."""
    codes, others = 0, False
    for name, shape in kept.savers.items():
        recipe = layers[name].active if name else None
        in_codes = recipe is not None and (recipe.save is Save.QUANTIZED or recipe.saved_activations is not None)
        if recipe is None or recipe.fprop.lhs is None or in_codes:
            others = True
        else:
            codes += stored_bytes((math.prod(shape[:-1]), shape[-1]), recipe.fprop.lhs)
    return codes + (kept.nbytes if others else 0)


@contextmanager
def _tracking(layers: dict[str, QuantizedLayer], running: list[str]) -> Iterator[None]:
    """Keep on `running` the names of the converted layers whose forward is under way."""

    def enter(name: str) -> Callable[[nn.Module, object], None]:
        return lambda _module, _inputs: running.append(name)

    def leave(_module: nn.Module, _inputs: object, _output: object) -> None:
        running.pop()

    handles = [layer.register_forward_pre_hook(enter(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(leave) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(nested: object) -> Iterator[Tensor]:
    """Yield the tensors in nested dictionaries and sequences."""
    if isinstance(nested, Tensor):
        yield nested
    elif isinstance(nested, dict):
        for value in nested.values():
            yield from _tensors(value)
    elif isinstance(nested, list | tuple):
        for value in nested:
            yield from _tensors(value)


def _unique_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the storages, each once; tensors without data have no address and are told apart as objects."""
    storages = {}
    for tensor in tensors:
        for part in held(tensor):
            storage = part.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def held(tensor: Tensor) -> list[Tensor]:
    """Return the tensors whose storages hold a tensor: those within, of a subclass that only wraps others.

    Args:
        tensor: any.
    """
    inner = getattr(tensor, "__tensor_flatten__", None)
    if inner is None:
        return [tensor]
    return [part for name in inner()[0] for part in held(getattr(tensor, name))]
