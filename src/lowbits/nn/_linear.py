# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose three GEMMs follow a recipe.

All numerics sit in one autograd function. Gradients pass every rounding unchanged (straight-through estimator); with
amax scales nothing saturates, so there is no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from lowbits.errors import ShapeError
from lowbits.kernels import Execution, Operand, pack_operand, quantize_operand, scaled_mm, unpack_operand
from lowbits.nn._phase import during
from lowbits.nn._recipe import Recipe, Save
from lowbits.quantizers import Noise, PackedTensor, QTensor, QuantSpec, quantize

Observer: TypeAlias = Callable[[str, Tensor, QTensor], None]
ROLES = ("fprop.lhs", "fprop.rhs", "dgrad.lhs", "dgrad.rhs", "wgrad.lhs", "wgrad.rhs")


class _Plan(NamedTuple):
    """What the autograd function needs beside its tensors."""

    recipe: Recipe
    dtype: torch.dtype
    layer_name: str
    observer: Observer | None


def _own(layer: QuantizedLayer) -> Recipe:
    """The layer's recipe; assign `Recipe()` to switch the quantizers off."""
    return layer.own_recipe


def _assign(layer: QuantizedLayer, recipe: Recipe) -> None:
    layer.own_recipe, layer.active = recipe, during(recipe, *layer.passes)


def switch_(layer: QuantizedLayer, passes: tuple[bool, bool]) -> None:
    """Quantize the forward and the backward pass of a layer, or not; its recipe stays."""
    layer.passes, layer.active = passes, during(layer.own_recipe, *passes)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` under a recipe; made from one by `convert_`, which keeps its parameters and `state_dict` keys.

    Attributes:
        recipe: the layer's own; assign `Recipe()` to switch the quantizers off.
        passes: whether the forward and the backward pass follow the recipe; `set_phase_` sets it.
        active: what the layer computes: the recipe without the operands of a pass that is off.
        layer_name: the module's path, which names it in errors and keys its random bits.
        observer: called with role (`fprop.lhs`, ...), operand and its quantized form, whenever the forward pass or its
            backward quantizes one: telemetry, in eager mode. Whoever sets it takes it away after the forward pass.
        noise: int64 [1 + 2 roles], the step and the Philox keys of `ROLES`. A buffer that no checkpoint holds; as
            plain numbers the keys would be constants of a compiled graph, another graph for every layer.
        weight_fn: None, or a module whose result stands for the weight in all three GEMMs: learned or noisy quantizers.
            It is differentiated as usual, and takes the weight as it is stored.
        keep_weight: False where the backward pass shall make the result of `weight_fn` again instead of keeping it.
    """

    recipe = property(_own, _assign)
    own_recipe: Recipe
    active: Recipe
    passes: tuple[bool, bool] = (True, True)
    layer_name: str
    noise: Tensor
    observer: Observer | None = None
    weight_fn: nn.Module | None
    keep_weight: bool = True

    def forward(self, input: Tensor) -> Tensor:
        """Return input W^T + b in the compute dtype, [..., in] -> [..., out]."""
        return _through_weight_fn(self, input)

    def extra_repr(self) -> str:
        """Show the recipe beside the sizes."""
        return f"{super().extra_repr()}, recipe=[{self.recipe}]"


class QuantizedConv1D(nn.Module):
    """transformers' `Conv1D` (GPT-2), a linear layer that stores its weight as [in, out], under a recipe."""

    recipe = property(_own, _assign)
    own_recipe: Recipe
    active: Recipe
    passes: tuple[bool, bool] = (True, True)
    layer_name: str
    noise: Tensor
    observer: Observer | None = None
    weight_fn: nn.Module | None
    keep_weight: bool = True
    weight: nn.Parameter
    bias: nn.Parameter

    @property
    def in_features(self) -> int:
        """Size of the contraction of fprop."""
        return self.weight.shape[0]

    @property
    def out_features(self) -> int:
        """Size of the result."""
        return self.weight.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        """Return x W + b in the compute dtype, [..., in] -> [..., out]."""
        return _through_weight_fn(self, x)

    def extra_repr(self) -> str:
        """Show sizes and recipe."""
        return f"in_features={self.in_features}, out_features={self.out_features}, recipe=[{self.recipe}]"


QuantizedLayer = QuantizedLinear | QuantizedConv1D


def _through_weight_fn(layer: QuantizedLayer, x: Tensor) -> Tensor:
    if layer.keep_weight or layer.weight_fn is None:
        return _with_weight(layer, x)
    # The backward pass runs it again up to the GEMM, whose operands are all that it needs: one pass over the weight.
    y: Any = checkpoint(_with_weight, layer, x, use_reentrant=False, preserve_rng_state=False)
    return y


def _with_weight(layer: QuantizedLayer, x: Tensor) -> Tensor:
    weight = layer.weight if layer.weight_fn is None else layer.weight_fn(layer.weight)
    return quantized_linear(layer, x, weight if isinstance(layer, QuantizedLinear) else weight.t())


def quantized_linear(layer: QuantizedLayer, x: Tensor, weight: Tensor) -> Tensor:
    """Run `layer`'s three GEMMs on x [..., in] and weight [out, in].

    The compute dtype is autocast's, or x's. X is cast to it first, as `nn.Linear` does under autocast, so that what
    waits for backward is no larger; the weight is quantized from its own, wider dtype.
    """
    recipe = layer.active
    if recipe.plain:
        return linear(x, weight, layer.bias)
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    # A name inside a graph is one of its constants: torch 2.11 would compile every layer anew.
    name = "a compiled layer" if torch.compiler.is_compiling() else layer.layer_name
    plan = _Plan(recipe, dtype, name, layer.observer)
    if not any(recipe.fprop):
        return _PlainForward.apply(x.to(dtype), weight, layer.bias, layer.noise, plan)
    y = _QuantizedMatmul.apply(x.reshape(-1, x.shape[-1]).to(dtype), weight, layer.noise, plan)
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if layer.bias is None else y + layer.bias.to(dtype)


class _QuantizedMatmul(torch.autograd.Function):
    """y[M, N] = x[M, K] w[N, K]^T and its two backward GEMMs, each operand quantized as the recipe says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, noise: Tensor, plan: _Plan) -> Tensor:  # type: ignore[override]
        recipe = plan.recipe
        qx = _operand(x, recipe.fprop.lhs, plan, "fprop.lhs", noise)
        qw = _operand(w, recipe.fprop.rhs, plan, "fprop.rhs", noise)
        _keep_for_backward(ctx, plan, noise, *((qx, qw) if recipe.save is Save.QUANTIZED else (x, w)), w.dtype)
        return scaled_mm(qx, qw, plan.dtype, recipe.execution if any(recipe.fprop) else Execution.SIMULATED)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        return *_backward(ctx, g), None, None


class _PlainForward(torch.autograd.Function):
    """The output of `nn.Linear` bit for bit, bias and all; dgrad and wgrad are quantized as the recipe says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, noise: Tensor, plan: _Plan) -> Tensor:  # type: ignore[override]
        _keep_for_backward(ctx, plan, noise, x.reshape(-1, x.shape[-1]), w, w.dtype)
        ctx.shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
        return linear(x, w.to(plan.dtype), None if bias is None else bias.to(plan.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g = g.reshape(-1, g.shape[-1])
        dx, dw = _backward(ctx, g)
        db = g.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return None if dx is None else dx.view(ctx.shape), dw, db, None, None


def _keep_for_backward(
    ctx: Any, plan: _Plan, noise: Tensor, x: Operand | PackedTensor, w: Operand, weight_dtype: torch.dtype
) -> None:
    """Save X and W, packed where they are codes, and X as wgrad's operand where the recipe asks for it."""
    ctx.plan, ctx.weight_dtype = plan, weight_dtype
    if plan.recipe.save is Save.OPERANDS and ctx.needs_input_grad[1]:
        assert isinstance(x, Tensor) and plan.recipe.wgrad.rhs is not None
        known = _by_kernel(pack_operand, x.t(), plan.recipe.wgrad.rhs, plan, "wgrad.rhs", noise)
        x = known or _operand(x.t(), plan.recipe.wgrad.rhs, plan, "wgrad.rhs", noise)
    packed = [q.pack() if isinstance(q, QTensor) else q for q in (x, w)]
    ctx.packed = [(p.spec, p.shape) if isinstance(p, PackedTensor) else None for p in packed]
    parts = [p.tensors() if isinstance(p, PackedTensor) else (p,) for p in packed]
    ctx.save_for_backward(noise, *[t for part in parts for t in part])


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dX [M, K] and dW [N, K] where they are needed, from G [M, N]."""
    noise, x, w = _saved(ctx)
    plan, dx, dw = ctx.plan, None, None
    if ctx.needs_input_grad[0]:
        dx = _backward_mm(plan, "dgrad", g, _turned(w), noise).to(plan.dtype)
    if ctx.needs_input_grad[1]:
        dw = _backward_mm(plan, "wgrad", g.t(), x if plan.recipe.save is Save.OPERANDS else _turned(x), noise)
        dw = dw.to(ctx.weight_dtype)
    return dx, dw


def _saved(ctx: Any) -> tuple[Tensor, Operand, Operand]:
    """The noise buffer, and X and W as they were saved."""
    noise, *parts = ctx.saved_tensors
    found: list[Operand] = []
    for packed in ctx.packed:
        if packed is None:
            found.append(parts.pop(0))
        else:
            (spec, shape), (codes, scale, zero_point, outer) = packed, parts[:4]
            stored = PackedTensor(codes, scale, spec, shape, zero_point, outer)
            fast = ctx.plan.recipe.save is Save.OPERANDS and ctx.plan.observer is None
            found.append((unpack_operand(stored, ctx.plan.dtype) if fast else None) or stored.unpack())
            parts = parts[4:]
    return noise, found[0], found[1]


def _turned(x: Operand) -> Tensor:
    """The transpose of what was saved, as a backward GEMM that quantizes it itself wants it."""
    return (x if isinstance(x, Tensor) else x.dequantize()).t()


def _backward_mm(plan: _Plan, name: str, lhs: Tensor, rhs: Operand, noise: Tensor) -> Tensor:
    gemm = plan.recipe.gemms[name]
    gradient_axis = 1 if name == "dgrad" else 0  # where `out` is in G
    q_lhs = _gradient(lhs, gemm.lhs, plan, f"{name}.lhs", noise, gradient_axis)
    q_rhs = _operand(rhs, gemm.rhs, plan, f"{name}.rhs", noise) if isinstance(rhs, Tensor) else rhs
    return scaled_mm(q_lhs, q_rhs, plan.dtype, plan.recipe.execution if any(gemm) else Execution.SIMULATED)


_Found = TypeVar("_Found")


def _by_kernel(
    kernel: Callable[..., _Found | None], x: Tensor, spec: QuantSpec, plan: _Plan, role: str, noise: Tensor
) -> _Found | None:
    """What a kernel makes of an operand; None where it does not know how, or more than that is wanted."""
    if plan.observer is not None or plan.recipe.save is Save.QUANTIZED:
        return None
    arguments = (plan.dtype,) if kernel is quantize_operand else ()
    return kernel(x, spec, noise, 1 + 2 * ROLES.index(role), *arguments)


def _operand(x: Tensor, spec: QuantSpec | None, plan: _Plan, role: str, noise: Tensor) -> Operand:
    if spec is None:
        return x
    decoded = _by_kernel(quantize_operand, x, spec, plan, role, noise)
    if decoded is not None:
        return decoded
    try:
        q = quantize(x, spec, _draw(x.shape, spec, role, noise))
    except ShapeError as error:  # what was known at conversion was checked there; the number of tokens was not
        told = f"{plan.layer_name}, {role}: {error}"
    else:
        return _observed(plan, role, x, q)
    raise ShapeError(told)  # here, since torch 2.11 cannot trace `from None`


def _gradient(g: Tensor, spec: QuantSpec | None, plan: _Plan, role: str, noise: Tensor, axis: int) -> Operand:
    """Quantize G, in `grad_parts` parts along `out` where the recipe asks for it."""
    parts = plan.recipe.grad_parts
    if spec is None or parts == 1:
        return _operand(g, spec, plan, role, noise)
    chunks = g.chunk(parts, axis)
    # Drawn for all parts at once, one below the other, so that no two share random bits.
    drawn = _draw(torch.Size((parts, *chunks[0].shape)), spec, role, noise)
    draws = [None] * parts if drawn is None else drawn.unbind(0)
    pieces = [_observed(plan, role, c, quantize(c, spec, u)) for c, u in zip(chunks, draws, strict=True)]
    return torch.cat([piece.dequantize() for piece in pieces], axis)


def _observed(plan: _Plan, role: str, x: Tensor, q: QTensor) -> QTensor:
    if plan.observer is not None:
        plan.observer(role, x, q)
    return q


def _draw(shape: torch.Size, spec: QuantSpec, role: str, noise: Tensor) -> Tensor | None:
    """Draw what stochastic rounding needs; None for nearest."""
    index = 1 + 2 * ROLES.index(role)
    return spec.draw(Noise((noise[index], noise[index + 1])), shape, noise[0], device=noise.device)
