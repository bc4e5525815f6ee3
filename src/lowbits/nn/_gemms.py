# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a linear layer under a recipe, as autograd functions.

Every tensor enters two GEMMs, which contract one axis of it each:

    X [tokens, in]     fprop.lhs contracts in,     wgrad.rhs contracts tokens
    W [out, in]        fprop.rhs contracts in,     dgrad.rhs contracts out
    G [tokens, out]    dgrad.lhs contracts out,    wgrad.lhs contracts tokens

So all quantization goes through `_both`: a tensor and two roles in, two operands out, which a kernel makes of one read.
Where GEMMs run natively, X and W leave the forward pass as the codes that backward multiplies; where they are
simulated they wait as the recipe's `save` says. The numbers are the same. Gradients pass every rounding unchanged
(straight-through estimator); with amax scales nothing saturates, so there is no mask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear

from lowbits.errors import ShapeError
from lowbits.kernels import (
    Coded,
    Decoded,
    Operand,
    decode_operand,
    pack_operand,
    quantize_both,
    quantize_operand,
    scaled_mm,
    unpack_operand,
)
from lowbits.nn._recipe import GEMMS, Recipe, Save
from lowbits.quantizers import Noise, PackedTensor, QTensor, QuantSpec, quantize

Observer: TypeAlias = Callable[[str, Tensor, QTensor], None]
ROLES = ("fprop.lhs", "fprop.rhs", "dgrad.lhs", "dgrad.rhs", "wgrad.lhs", "wgrad.rhs")
_SPECS = {role: (GEMMS.index(role[:5]), ("lhs", "rhs").index(role[6:])) for role in ROLES}


class Plan(NamedTuple):
    """What the autograd functions need beside their tensors.

    Args:
        recipe: of this forward pass and its backward.
        native: whether fprop, dgrad and wgrad run on codes.
        dtype: of the GEMMs' results, and of their operands where they are simulated.
        layer_name: for errors.
        observer: see `QuantizedLinear`.
        trains: whether a backward pass will follow.
    """

    recipe: Recipe
    native: tuple[bool, bool, bool]
    dtype: torch.dtype
    layer_name: str
    observer: Observer | None
    trains: bool

    def spec(self, role: str) -> QuantSpec | None:
        """Return how the operand of a role is quantized."""
        gemm, side = _SPECS[role]
        return (self.recipe.fprop, self.recipe.dgrad, self.recipe.wgrad)[gemm][side]

    def coded(self, role: str | None) -> bool:
        """Return whether the operand of a role is multiplied as codes."""
        return role is not None and self.native[_SPECS[role][0]]

    def multiply(self, gemm: str, lhs: Operand, rhs: Operand) -> Tensor:
        """Return lhs rhs^T, for one of the three GEMMs."""
        return scaled_mm(lhs, rhs, self.dtype, fast=gemm in self.recipe.fast_accumulation)


class QuantizedMatmul(torch.autograd.Function):
    """y[M, N] = x[M, K] w[N, K]^T and its two backward GEMMs, each operand quantized as the recipe says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, noise: Tensor, plan: Plan, *copies: Tensor) -> Tensor:  # type: ignore[override]
        keeps_codes = plan.recipe.save is Save.QUANTIZED
        early, ctx.nothing = plan.trains and not keeps_codes, (None,) * len(copies)
        late_x = "wgrad.rhs" if early and ctx.needs_input_grad[1] and plan.coded("wgrad.rhs") else None
        late_w = "dgrad.rhs" if early and ctx.needs_input_grad[0] and plan.coded("dgrad.rhs") else None
        x_k, x_r = _both(x, "fprop.lhs", late_x, plan, noise)
        w_k, w_r = _copied(copies, w, plan) if copies else _both(w, "fprop.rhs", late_w, plan, noise)
        assert x_k is not None and w_k is not None
        kept = (x_k, w_k) if keeps_codes else (x if x_r is None else x_r, w if w_r is None else w_r)
        _keep_for_backward(ctx, plan, noise, *kept, w.dtype)
        return plan.multiply("fprop", x_k, w_k)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *_backward(ctx, g), None, None, *ctx.nothing


def _copied(copies: tuple[Tensor, ...], w: Tensor, plan: Plan) -> tuple[Coded, Coded]:
    """The weight's operands of fprop and dgrad, made before."""
    along_in, along_out = plan.spec("fprop.rhs"), plan.spec("dgrad.rhs")
    assert along_in is not None and along_out is not None
    codes_in, scale_in, codes_out, scale_out = copies
    return Coded(codes_in, scale_in, along_in, w.shape[1]), Coded(codes_out, scale_out, along_out, w.shape[0])


class PlainForward(torch.autograd.Function):
    """The output of `nn.Linear` bit for bit, bias and all; dgrad and wgrad are quantized as the recipe says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, noise: Tensor, plan: Plan) -> Tensor:  # type: ignore[override]
        _keep_for_backward(ctx, plan, noise, x.reshape(-1, x.shape[-1]), w, w.dtype)
        ctx.shape, ctx.bias_dtype = x.shape, None if bias is None else bias.dtype
        return linear(x, w.to(plan.dtype), None if bias is None else bias.to(plan.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        g = g.reshape(-1, g.shape[-1])
        dx, dw = _backward(ctx, g)
        db = g.sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[2] else None
        return None if dx is None else dx.view(ctx.shape), dw, db, None, None


# --- what waits for backward ----------------------------------------------------------------------------------------


def _keep_for_backward(
    ctx: Any, plan: Plan, noise: Tensor, x: Operand | PackedTensor, w: Operand, weight_dtype: torch.dtype
) -> None:
    """Save X and W, packed where they are codes, and X as wgrad's operand where the recipe asks for it."""
    if not plan.trains:
        return
    ctx.plan, ctx.weight_dtype = plan, weight_dtype
    if plan.recipe.save is Save.OPERANDS and ctx.needs_input_grad[1] and isinstance(x, Tensor):
        assert plan.recipe.wgrad.rhs is not None
        known = _by_kernel(pack_operand, x.t(), plan.recipe.wgrad.rhs, plan, "wgrad.rhs", noise)
        x = known or _operand(x.t(), "wgrad.rhs", plan, noise)
    packed = [q.pack() if isinstance(q, QTensor) else q.packed if isinstance(q, Decoded) else q for q in (x, w)]
    ctx.kept, parts = [], []
    for p in packed:
        if isinstance(p, PackedTensor):
            ctx.kept.append((p.spec, p.shape))
            parts += p.tensors()
        elif isinstance(p, Coded):
            ctx.kept.append((p.spec, p.length))
            parts += [p.codes, p.scale]
        else:
            ctx.kept.append(None)
            parts.append(p)
    ctx.save_for_backward(noise, *parts)


def _kept(ctx: Any) -> tuple[Tensor, Operand, Operand]:
    """The noise buffer, and X and W as they were saved."""
    noise, *saved = ctx.saved_tensors
    parts = list(saved)  # torch 2.11 compiles the star to a tuple
    found: list[Operand] = []
    for role, packed in zip(("wgrad.rhs", "dgrad.rhs"), ctx.kept, strict=True):
        if packed is None:
            found.append(parts.pop(0))
        elif isinstance(packed[1], int):
            found.append(Coded(parts[0], parts[1], *packed))
            parts = parts[2:]
        else:
            (spec, shape), (codes, scale, zero_point, outer) = packed, parts[:4]
            stored = PackedTensor(codes, scale, spec, shape, zero_point, outer)
            found.append(_unpacked(stored, role, ctx.plan) or stored.unpack())
            parts = parts[4:]
    return noise, found[0], found[1]


def _unpacked(stored: PackedTensor, role: str, plan: Plan) -> Decoded | None:
    """Codes as the GEMM of a role multiplies them, or as what it quantizes anew; None where no kernel decodes them."""
    if plan.observer is not None:
        return None
    if plan.recipe.save is Save.OPERANDS:
        return unpack_operand(stored, plan.dtype)
    return decode_operand(stored, plan.dtype if plan.spec(role) is None else torch.float32, whole=True)


# --- backward -------------------------------------------------------------------------------------------------------


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """dX [M, K] and dW [N, K] where they are needed, from G [M, N]."""
    noise, x, w = _kept(ctx)
    plan, (needs_dx, needs_dw) = ctx.plan, ctx.needs_input_grad[:2]
    of_codes = plan.recipe.save is Save.QUANTIZED
    g_k, g_r = _both(g, "dgrad.lhs" if needs_dx else None, "wgrad.lhs" if needs_dw else None, plan, noise)
    dx = dw = None
    if g_k is not None:
        w_r = w if isinstance(w, Coded) and not of_codes else _both(_original(w), None, "dgrad.rhs", plan, noise)[1]
        dx = plan.multiply("dgrad", g_k, _there(w_r))
    if g_r is not None:
        ready = not isinstance(x, Tensor) and not of_codes
        x_r = x if ready else _both(_original(x), None, "wgrad.rhs", plan, noise)[1]
        dw = plan.multiply("wgrad", g_r, _there(x_r)).to(ctx.weight_dtype)
    return dx, dw


def _original(x: Operand) -> Tensor:
    """What was saved, as numbers; decoded ones are in the dtype that is wanted."""
    if isinstance(x, Decoded) and x.outer is None:
        return x.inner
    return x if isinstance(x, Tensor) else x.dequantize()


def _there(x: Operand | None) -> Operand:
    assert x is not None
    return x


# --- operands -------------------------------------------------------------------------------------------------------


def _both(
    x: Tensor, along_k: str | None, along_r: str | None, plan: Plan, noise: Tensor
) -> tuple[Operand | None, Operand | None]:
    """Make of x [R, K] the operand of a role that contracts K, and of x.T that of a role which contracts R.

    Args:
        x: a tensor in high precision.
        along_k: the role, or None where no GEMM wants it.
        along_r: likewise.
        plan: of the layer.
        noise: see `QuantizedLinear`.
    """
    spec_k = plan.spec(along_k) if along_k is not None and plan.coded(along_k) else None
    spec_r = plan.spec(along_r) if along_r is not None and plan.coded(along_r) else None
    coded: tuple[Coded | None, Coded | None] = (None, None)
    if spec_k is not None or spec_r is not None:
        drawn_k = None if spec_k is None or along_k is None else _draw(x.shape, spec_k, along_k, noise)
        drawn_r = None if spec_r is None or along_r is None else _draw(x.t().shape, spec_r, along_r, noise)
        coded = quantize_both(x, spec_k, spec_r, drawn_k, drawn_r)
        _observe_coded(plan, ((along_k, coded[0], x), (along_r, coded[1], x.t())))
    of_k = coded[0] if coded[0] is not None or along_k is None else _operand(x, along_k, plan, noise)
    of_r = coded[1] if coded[1] is not None or along_r is None else _operand(x.t(), along_r, plan, noise)
    return of_k, of_r


_Found = TypeVar("_Found")


def _by_kernel(
    kernel: Callable[..., _Found | None], x: Tensor, spec: QuantSpec, plan: Plan, role: str, noise: Tensor
) -> _Found | None:
    """What a kernel makes of an operand; None where it does not know how, or more than that is wanted."""
    if plan.observer is not None:
        return None
    options: dict[str, Any] = {}
    if kernel is quantize_operand:
        kept = {Save.QUANTIZED: ("fprop.lhs", "fprop.rhs"), Save.OPERANDS: ("wgrad.rhs",)}
        options = {"dtype": plan.dtype, "codes": plan.trains and role in kept.get(plan.recipe.save, ())}
    return kernel(x, spec, noise, 1 + 2 * ROLES.index(role), **options)


def _operand(x: Tensor, role: str, plan: Plan, noise: Tensor) -> Tensor | QTensor | Any:
    """What a simulated GEMM multiplies; G in `grad_parts` parts along `out` where the recipe asks for it."""
    spec = plan.spec(role)
    if spec is None:
        return x
    if plan.recipe.grad_parts > 1 and role in ("dgrad.lhs", "wgrad.lhs"):
        return _in_parts(x, spec, plan, role, noise)
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


def _in_parts(g: Tensor, spec: QuantSpec, plan: Plan, role: str, noise: Tensor) -> Tensor:
    parts, axis = plan.recipe.grad_parts, 1 if role == "dgrad.lhs" else 0  # where `out` is in G
    chunks = g.chunk(parts, axis)
    # Drawn for all parts at once, one below the other, so that no two share random bits.
    drawn = _draw(torch.Size((parts, *chunks[0].shape)), spec, role, noise)
    draws = [None] * parts if drawn is None else drawn.unbind(0)
    pieces = [_observed(plan, role, c, quantize(c, spec, u)) for c, u in zip(chunks, draws, strict=True)]
    return torch.cat([piece.dequantize() for piece in pieces], axis)


def _observed(plan: Plan, role: str, x: Tensor, q: QTensor) -> QTensor:
    if plan.observer is not None:
        plan.observer(role, x, q)
    return q


def _observe_coded(plan: Plan, of: tuple[tuple[str | None, Coded | None, Tensor], ...]) -> None:
    if plan.observer is None:
        return
    for role, coded, x in of:
        if role is not None and coded is not None:
            plan.observer(role, x, coded.quantized())


def _draw(shape: torch.Size, spec: QuantSpec, role: str, noise: Tensor) -> Tensor | None:
    """Draw what stochastic rounding needs; None for nearest."""
    index = 1 + 2 * ROLES.index(role)
    return spec.draw(Noise((noise[index], noise[index + 1])), shape, noise[0], device=noise.device)
