# SPDX-License-Identifier: Apache-2.0
"""Ways to train a Llama on one GPU: ours, and those of peers, by what they store and when they update."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from experiments.direct_quantized_training.device import DEVICE
from experiments.direct_quantized_training.model import Llama, Shape
from lowbits import recipes
from lowbits.methods.dqt import materialize_
from lowbits.nn import Execution, Grid, QParameter, convert_
from lowbits.optim import AdamW4bit, AdamW8bit, CodecOptimizer, Lion8bit, step_in_backward
from lowbits.quantizers import Rounding

LR = 1e-4


@dataclass
class Trained:
    """A model that takes steps.

    Args:
        step: runs forward, backward and update on ids, and returns the loss.
        parameters: how many.
        groups: of the optimizer, or of all optimizers; those of weights in codes say so.
        handles: of updates in the backward pass; they keep the model alive until they are removed.
    """

    step: Callable[[Tensor], Tensor]
    parameters: int
    groups: list[dict[str, Any]]
    handles: list[Any]

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


Build = Callable[[Shape, bool], Trained]
"""`(shape, every block is drawn) -> model and optimizer`; copies of one block do where memory alone is measured."""
Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def codes(bits: float, make: Callable[..., CodecOptimizer], native: bool = False) -> Build:
    """Weights as codes, updates in the backward pass, the rest bfloat16 and stochastically rounded."""

    def build(shape: Shape, drawn: bool) -> Trained:
        with torch.device("meta"):
            model = Llama(shape if drawn else replace(shape, layers=1))
        execution = Execution.NATIVE if native else Execution.SIMULATED
        materialize_(model, Grid.of(bits), DEVICE, execution=execution)
        if not drawn:
            model.blocks.extend(copy.deepcopy(model.blocks[0]) for _ in range(shape.layers - 1))
        every = list(model.parameters())
        groups = [
            {"params": [p for p in every if isinstance(p, QParameter) == ours], "codes": ours} for ours in (True, False)
        ]
        optimizer = make(groups, lr=LR, rounding=Rounding.STOCHASTIC)
        handle = step_in_backward(model, optimizer)
        return Trained(lambda ids: _backward(model, ids), _count(model), optimizer.param_groups, [handle])

    return build


def floats(dtype: torch.dtype, make: Make, *, bitnet: bool = False, in_backward: bool = False) -> Build:
    """Float weights and a peer's optimizer.

    Args:
        dtype: of weights, gradients, and of a peer's float moments.
        make: the optimizer.
        bitnet: ternary weights are made of the floats in every forward pass.
        in_backward: an optimizer for each parameter, stepped by its hook, as torch's tutorial does it; else all
            gradients exist together.
    """

    def build(shape: Shape, drawn: bool) -> Trained:
        torch.set_default_dtype(dtype)
        try:
            with DEVICE:
                model = Llama(shape)
        finally:
            torch.set_default_dtype(torch.float32)
        if bitnet:
            convert_(model, recipes.named("bitnet_b158"), verbose=False)
        return _trained(model, make, in_backward)

    return build


def torchao_int8(shape: Shape, drawn: bool, in_backward: bool = False) -> Trained:
    """torchao's int8 quantized training, in all linear layers but the head, with its 8-bit AdamW."""
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training  # type: ignore
    from torchao.quantization import quantize_  # type: ignore[import-not-found]

    torch.set_default_dtype(torch.bfloat16)
    try:
        with DEVICE:  # a block at a time, so that floats of the whole never exist
            model = Llama(replace(shape, layers=0))
            for _ in range(shape.layers):
                model.blocks.append(Llama(replace(shape, layers=1, vocab=1)).blocks[0])
                quantize_(model.blocks[-1], int8_weight_only_quantized_training())
    finally:
        torch.set_default_dtype(torch.float32)
    model.shape = shape
    return _trained(model, torchao_8bit, in_backward)


def _trained(model: nn.Module, make: Make, in_backward: bool) -> Trained:
    handles: list[Any] = []
    if in_backward:
        groups = []
        for p in model.parameters():
            own = make([p])
            groups += own.param_groups
            handles.append(p.register_post_accumulate_grad_hook(_updating(own)))
        return Trained(lambda ids: _backward(model, ids), _count(model), groups, handles)
    optimizer = make(model.parameters())

    def step(ids: Tensor) -> Tensor:
        loss = _backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return Trained(step, _count(model), optimizer.param_groups, handles)


def _updating(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    def update(_: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return update


def _backward(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
        loss = model(ids)
    loss.backward()
    return loss.detach()


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def torchao_8bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from torchao.optim import AdamW8bit as Theirs  # type: ignore[import-not-found]

    return Theirs(parameters, lr=LR, bf16_stochastic_round=True)


def bitsandbytes_8bit(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    from bitsandbytes.optim import AdamW8bit as Theirs  # type: ignore[import-not-found]

    return Theirs(parameters, lr=LR)


def fused(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=LR, fused=True)


HALF = torch.bfloat16
WAYS: dict[str, Build] = {
    "ternary AdamW4bit": codes(1.58, AdamW4bit),
    "ternary AdamW8bit": codes(1.58, AdamW8bit),
    "ternary Lion8bit": codes(1.58, Lion8bit),
    "int4 AdamW8bit": codes(4, AdamW8bit),
    "int8 AdamW8bit": codes(8, AdamW8bit),
    "int8 AdamW8bit, native": codes(8, AdamW8bit, native=True),
    "bf16, torch fused AdamW": floats(HALF, fused),
    "bf16, torch fused AdamW in backward": floats(HALF, fused, in_backward=True),
    "bf16, bitsandbytes AdamW8bit": floats(HALF, bitsandbytes_8bit),
    "bf16, bitsandbytes AdamW8bit in backward": floats(HALF, bitsandbytes_8bit, in_backward=True),
    "BitNet, float32 masters, torch fused AdamW": floats(torch.float32, fused, bitnet=True),
    "bf16, torchao AdamW8bit": floats(HALF, torchao_8bit),
    "torchao int8 quantized training, AdamW8bit": torchao_int8,
    "torchao int8 quantized training, AdamW8bit in backward": lambda s, d: torchao_int8(s, d, in_backward=True),
}
"""Ways to train; torchao's last, since it compiles for minutes."""
