# SPDX-License-Identifier: Apache-2.0
"""Keep what autograd saves in a stack of blocks in few bits: `Recipe.saved_activations`.

Autograd keeps the inputs of norms, of attention, of activation functions and of linear layers for the backward pass.
Hooks of `torch.autograd.graph.saved_tensors_hooks` get each such tensor when it is saved and when it is wanted, of
compiled blocks too, outside of their graphs. Here a large one is kept as codes of its memory and comes back with its
dtype, shape and strides. They are in force while the module runs that holds the blocks, until the output head begins:
gradients of the loss are those of exact logits.

Kept as they are: parameters, buffers, weights that autocast has cast or that a method shows the layer; what is no
float, sparse or nested; and what has less than an eighth of the elements of the residual stream, as attention's
log-sum-exps and most tables of rotary embeddings have.

Autograd does not watch saved tensors that go through hooks. Codes hold what was saved, whatever becomes of the tensor;
one kept as it is and changed in place is refused in the backward pass, as it would be without hooks.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from lowbits.kernels import pack_memory, unpack_memory
from lowbits.nn._blocks import holders
from lowbits.nn._linear import QuantizedConv1D, QuantizedLinear
from lowbits.quantizers import PackedTensor, QuantSpec

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_SHARE = 8  # a tensor with fewer elements than the residual stream over this is kept as it is
_NODES = 24  # of a graph, at most, between a parameter and a weight that is seen through something


class _Whole(NamedTuple):
    """A tensor as it is, and how often it had been changed in place."""

    tensor: Tensor
    version: int

    def restored(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"a {self.tensor.dtype} of shape {list(self.tensor.shape)}, saved at version {self.version}, is at "
                f"version {self.tensor._version}. Compute a new tensor instead."
            )
        return self.tensor


class _Codes(NamedTuple):
    """A tensor as codes of its elements in the order of memory.

    Args:
        packed: the codes.
        dtype: of the tensor.
        shape: its axes in the order in which memory has them, the longest stride first.
        back: which of these each of its own axes is.
        strides: its own.
        dense: whether its elements lie together; else they leave gaps.
    """

    packed: PackedTensor
    dtype: torch.dtype
    shape: tuple[int, ...]
    back: tuple[int, ...]
    strides: tuple[int, ...]
    dense: bool

    def restored(self) -> Tensor:
        together = unpack_memory(self.packed, self.dtype).view(self.shape).permute(self.back)
        if self.dense:
            # Strides of axes of one element are any.
            return together.as_strided(together.shape, self.strides)
        apart = torch.empty_strided(together.shape, self.strides, dtype=self.dtype, device=together.device)
        return apart.copy_(together)


class _Running(threading.local):
    """The passes under way in a thread, the innermost last, and who listens to what they keep."""

    def __init__(self) -> None:
        self.passes: list[_Pass] = []
        self.listeners: list[Callable[[Tensor], object]] = []


_running = _Running()


class _Pass:
    """One forward pass of the module that holds the blocks."""

    def __init__(self, holder: nn.Module, spec: QuantSpec, width: int, frame: FrameType) -> None:
        self.holder, self.spec, self.width, self.on = holder, spec, width, True
        self.frame: FrameType | None = frame  # None once it has ended
        layers, parameters = _layers(holder), list(holder.parameters())
        own = (*parameters, *holder.buffers())
        self.known = {t.untyped_storage().data_ptr() for t in own if type(t) in (Tensor, nn.Parameter)}
        self.sizes = {p.numel() for p in parameters} | {layer.weight.numel() for layer in layers}
        # Where no graph says it (frozen weights, compiled blocks), a weight has only its shape to be known by.
        seen = [layer.weight for layer in layers if layer.weight_fn is not None or hasattr(layer, "_viewed")]
        frozen = [p for p in parameters if p.ndim == 2 and not p.requires_grad]
        self.weights = {p.shape for p in (*seen, *frozen)}
        self.residual = 0  # elements of the residual stream, once it has been seen
        # The codes of a stretch of memory. A storage to which there is a weak reference has an address of its own.
        self.found: dict[tuple[Any, ...], tuple[StorageWeakRef, PackedTensor]] = {}
        self.hooks = saved_tensors_hooks(self.pack, _unpack)

    @torch.no_grad()
    def pack(self, x: Tensor) -> _Whole | _Codes:
        kept = self._codes(x) if self._wanted(x) else None
        found = _Whole(x.detach(), x._version) if kept is None else kept
        for listener in _running.listeners:
            for part in (found.tensor,) if isinstance(found, _Whole) else found.packed.tensors():
                if part is not None:
                    listener(part)
        return found

    def _wanted(self, x: Tensor) -> bool:
        strided = type(x) is Tensor and x.layout is torch.strided and not x.is_nested
        if not self.on or not strided or x.dtype not in _DTYPES or x.ndim == 0:
            return False
        shaped = x.grad_fn is None and x.ndim == 2 and not self.weights.isdisjoint((x.shape, x.shape[::-1]))
        of_weight = shaped or (x.numel() in self.sizes and _of_weight(x))
        if of_weight or x.untyped_storage().data_ptr() in self.known:
            return False
        if x.shape[-1] == self.width:
            self.residual = max(self.residual, x.numel())
        # An interrupt may have left the hooks behind in a thread that goes on.
        return 0 < self.residual <= x.numel() * _SHARE and self._runs()

    def _runs(self) -> bool:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame is not self.frame:
            frame = frame.f_back
        return frame is not None

    def _codes(self, x: Tensor) -> _Codes | None:
        """None where elements overlap."""
        order = sorted(range(x.ndim), key=lambda axis: (-x.stride(axis), axis))
        ordered = x.permute(order)
        dense = ordered.is_contiguous()
        if not dense and _overlaps(ordered):
            return None
        storage = x.untyped_storage()
        ends = x.storage_offset(), x.numel(), *(() if dense else (*ordered.shape, *ordered.stride()))
        key = storage._cdata, storage.data_ptr(), x._version, x.dtype, ends
        earlier = self.found.get(key)
        if earlier is None or earlier[0].expired():
            earlier = StorageWeakRef(storage), pack_memory(ordered.reshape(-1), self.spec)
            self.found[key] = earlier
        back = tuple(order.index(axis) for axis in range(x.ndim))
        return _Codes(earlier[1], x.dtype, tuple(ordered.shape), back, x.stride(), dense)


def _unpack(kept: _Whole | _Codes) -> Tensor:
    return kept.restored()


def _overlaps(ordered: Tensor) -> bool:
    """Whether axes, the longest stride first, reach into each other; as expanded ones do."""
    reach = 1
    for size, stride in zip(reversed(ordered.shape), reversed(ordered.stride()), strict=True):
        if size > 1:
            if stride < reach:
                return True
            reach = stride * (size - 1) + reach
    return False


def _of_weight(x: Tensor) -> bool:
    """Whether a tensor is a parameter or made of parameters alone: cast, turned, rounded, with noise."""
    if x.grad_fn is None:
        return x.is_leaf and x.requires_grad
    above = [x.grad_fn]
    for count, node in enumerate(above):
        if count == _NODES or node.name() == "EmbeddingBackward0":
            return False
        above += [found for found, _ in node.next_functions if found is not None]
    return True


# --- which module, and when -----------------------------------------------------------------------------------------


def keep_in_few_bits_(model: nn.Module, head: nn.Module | None) -> None:
    """Have every module that holds blocks keep what their layers' recipes say; where none says it, nothing changes.

    Args:
        model: converted.
        head: the output head, if the model has one.
    """
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_enter, _leave, _stop)]:
                del hooks[key]
        for key in [key for key in module._forward_hooks_always_called if key not in module._forward_hooks]:
            del module._forward_hooks_always_called[key]
    asking = [holder for holder in holders(model) if _asked(holder) is not None]
    for holder in asking:
        holder.register_forward_pre_hook(_enter)
        holder.register_forward_hook(_leave, always_call=True)
    if head is not None and asking:
        head.register_forward_pre_hook(_stop)


def _asked(holder: nn.Module) -> tuple[QuantSpec, int] | None:
    """What the layers' recipes ask for, and the residual stream's width: what most layers read."""
    layers = _layers(holder)
    spec = next((s for layer in layers if (s := layer.active.saved_activations) is not None), None)
    if spec is None:
        return None
    return spec, Counter(layer.in_features for layer in layers).most_common(1)[0][0]


def _layers(holder: nn.Module) -> list[QuantizedLinear | QuantizedConv1D]:
    return [module for module in holder.modules() if isinstance(module, QuantizedLinear | QuantizedConv1D)]


@torch.compiler.disable(reason="hooks on saved tensors belong around compiled blocks: use block.compile()")
def _enter(holder: nn.Module, _args: object) -> None:
    while _running.passes and not _running.passes[-1]._runs():  # left behind by an interrupt
        _end()
    asked = _asked(holder) if torch.is_grad_enabled() else None
    if asked is not None:
        one = _Pass(holder, *asked, _calling())
        one.hooks.__enter__()
        _running.passes.append(one)


@torch.compiler.disable(reason="hooks on saved tensors belong around compiled blocks: use block.compile()")
def _leave(holder: nn.Module, _args: object, _output: object) -> None:
    # Where another hook fails before ours has begun, this one is called all the same.
    if _running.passes and _running.passes[-1].holder is holder:
        _end()


@torch.compiler.disable(reason="hooks on saved tensors belong around compiled blocks: use block.compile()")
def _stop(_head: nn.Module, _args: object) -> None:
    for one in _running.passes:
        one.on = False


def _calling() -> FrameType:
    """The frame in which `nn.Module` calls hooks and forward."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__") != nn.Module.__module__ and frame.f_back is not None:
        frame = frame.f_back
    return frame


def _end() -> None:
    one = _running.passes.pop()
    one.hooks.__exit__()
    # Graphs keep the hook of this pass, and so all that it holds: codes would outlive their use in the backward pass,
    # and the frame holds the output, hence the graph itself, until Python looks for such rings.
    one.found.clear()
    one.frame = None
    del one.hooks


@contextmanager
def listening_to_saved(listener: Callable[[Tensor], object]) -> Iterator[None]:
    """Call something with every tensor that is kept for backward where `saved_activations` says how.

    Other hooks on saved tensors do not see them.

    Args:
        listener: gets codes and scales, or the tensor where it is kept as it is.
    """
    _running.listeners.append(listener)
    try:
        yield
    finally:
        _running.listeners.remove(listener)
