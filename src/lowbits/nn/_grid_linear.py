# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose weight is codes: fprop and dgrad multiply the codes themselves.

    sx = 127 / max(max |x|, 1e-5) of a token;   x^ = round(x sx) / sx                        (arXiv:2412.04787, sec. 3)
    Y = (x^ sx) q^T (1 / sx) D;   dX = G q D;   dW = G^T x^

Gradients pass the rounding of X unchanged; the weight is not rounded here, so there is nothing to pass. M tokens, N
out_features, K in_features. No float tensor of the weight's size outlives a GEMM: in bfloat16, which holds every code
exactly, dgrad casts the codes for its duration; on integer units fprop casts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lowbits.errors import CheckpointError, ConversionError, NativeError
from lowbits.formats import INT8
from lowbits.kernels import (
    INT32_TERMS,
    Coded,
    Execution,
    as_dtype,
    decode_operand,
    illegal_on_hardware,
    missing_unit,
    quantize_both,
    scaled_mm,
)
from lowbits.nn._grid import Grid
from lowbits.nn._linear import QuantizedLinear
from lowbits.nn._qparameter import QParameter
from lowbits.nn._steps_of_weights import StepInit, quantize_parameter
from lowbits.quantizers import PackedTensor, PerRow, PerTensor, QuantSpec, ReciprocalAmax, Rounding, quantize

TOKENS = QuantSpec(INT8, PerRow(), ReciprocalAmax(1e-5))
"""Activations, as in the paper's `activation_quant`."""


class GridLinear(nn.Linear):
    """A linear layer with a `QParameter`; `grid_linear_` makes one of an `nn.Linear`.

    Attributes:
        execution: NATIVE multiplies int8 by int8 in fprop, and in dgrad where `gradient` is int8; AUTO does so on a
            GPU; else codes are cast to the compute dtype, the numbers are the same up to the order of float32 sums.
        gradient: how G is rounded before both backward GEMMs, per tensor or per token; None is high precision.
    """

    weight: QParameter  # type: ignore[assignment]
    execution: Execution = Execution.SIMULATED
    gradient: QuantSpec | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Return X^ W^T + b in the compute dtype (autocast's, or X's), [..., in] -> [..., out]."""
        device = input.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
        with torch.autocast(device, enabled=False):  # it would cast the float32 sums' operands too
            y = _GridMatmul.apply(input.to(dtype), self.weight, _Plan(dtype, self.execution, self.gradient))
        return y if self.bias is None else y + self.bias.to(dtype)

    def extra_repr(self) -> str:
        """Show the grid beside the sizes."""
        return f"{super().extra_repr()}, {self.weight.grid}, {self.execution.value}"


class _Plan(NamedTuple):
    dtype: torch.dtype
    execution: Execution
    gradient: QuantSpec | None

    def native(self, device: torch.device, terms: int) -> bool:
        """Whether integers are multiplied as such, in sums of so many terms."""
        if self.execution is Execution.AUTO:
            return device.type == "cuda" and terms <= INT32_TERMS and missing_unit(TOKENS, device) is None
        return self.execution is Execution.NATIVE


class _GridMatmul(torch.autograd.Function):
    """y[..., N] = x^[..., K] W[N, K]^T; what waits for backward is a byte an activation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QParameter, plan: _Plan) -> Tensor:  # type: ignore[override]
        tokens = _coded(x.reshape(-1, x.shape[-1]))
        ctx.plan, ctx.dtype, ctx.shape = plan, x.dtype, x.shape
        ctx.save_for_backward(tokens.codes[:, : x.shape[-1]], tokens.scale, weight)
        q = weight.unpacked()
        if plan.native(x.device, q.shape[1]):
            y = _on_units(tokens, q, _steps(weight), plan.dtype)
        else:
            sums = _sums(tokens.codes[:, : q.shape[1]], q.t(), plan.dtype)
            y = as_dtype(sums.mul_(tokens.scale) * _steps(weight).t(), plan.dtype)
        # A view could not be written into behind `fully_shard`'s hooks.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], q.shape[0]))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # type: ignore[override]
        codes, scale, weight = ctx.saved_tensors
        plan, dx, dw, g = ctx.plan, None, None, g.reshape(-1, g.shape[-1])
        if plan.gradient is not None and g.shape[0]:
            rounded = quantize(g.float(), plan.gradient, None)
            if ctx.needs_input_grad[0] and _on_integers(plan, weight):
                dx = _on_units(Coded.of(rounded), weight.unpacked().t(), _steps(weight), ctx.dtype)
            g = rounded.dequantize().to(plan.dtype)
        if ctx.needs_input_grad[0] and dx is None:
            dx = _input_gradient(g, weight, plan.dtype).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            dw = (g.t() @ _decoded(codes, scale, plan.dtype)).to(weight.dtype)
        return dx if dx is None else dx.view(ctx.shape), dw, None


def _coded(x: Tensor) -> Coded:
    """Round tokens; there may be none, for an expert that nobody chose."""
    if not x.shape[0]:
        return Coded(x.to(torch.int8), x.new_empty(0, 1, dtype=torch.float32), TOKENS, x.shape[1])
    coded, _ = quantize_both(x, TOKENS, None, None, None)
    assert coded is not None
    return coded


def _on_units(a: Coded, q: Tensor, step: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a q^T with both scales, on integer units. A sum that is too long is refused."""
    if not a.codes.shape[0]:
        return step.new_empty(0, q.shape[0], dtype=dtype)
    filled = pad(q, (0, a.codes.shape[1] - q.shape[1])) if a.codes.shape[1] > q.shape[1] else q
    return scaled_mm(a, Coded(filled.contiguous(), step, TOKENS, a.length), dtype)


def _decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x^ as wgrad multiplies it."""
    packed = PackedTensor(codes.contiguous().view(torch.uint8), scale, TOKENS, tuple(codes.shape))
    known = decode_operand(packed, dtype, whole=True)
    return as_dtype(codes * scale, dtype) if known is None else known.inner


def _on_integers(plan: _Plan, weight: QParameter) -> bool:
    """Whether dgrad multiplies integers: then steps are constant along the contraction, and there is no zero point."""
    known = plan.gradient is not None and illegal_on_hardware(plan.gradient, TOKENS) is None
    return known and not weight.per_channel and plan.native(weight.device, weight.shape[0])


def _input_gradient(g: Tensor, weight: QParameter, dtype: torch.dtype) -> Tensor:
    q = weight.unpacked()
    if weight.per_channel:
        return _sums(g.float() * _steps(weight).t(), q, dtype)
    return _sums(g, q, dtype) * weight.step


def _steps(weight: QParameter) -> Tensor:
    """[N, 1], or [1, 1]."""
    return weight.step.view(-1, 1)


def _sums(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b of operands cast to `dtype`, float32; CPUs have no bfloat16 GEMM with float32 results."""
    if dtype == torch.bfloat16 and a.device.type == "cuda":
        return torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32)
    return a.to(dtype).float() @ b.to(dtype).float()


def grid_linear_(
    module: nn.Module,
    grid: Grid,
    init: StepInit | None = None,
    *,
    execution: Execution = Execution.SIMULATED,
    gradient: QuantSpec | None = None,
    dtype: torch.dtype | None = None,
) -> GridLinear:
    """Make an `nn.Linear` a `GridLinear` in place; its float weight is gone.

    Args:
        module: with a finite weight, or one on the meta device.
        grid: of the codes.
        init: how the step comes about; None: the published rule.
        execution: see `GridLinear`.
        gradient: see `GridLinear`.
        dtype: of the weight's gradient; None: the weight's.
    Raises:
        ConversionError: it is no plain linear layer.
        NativeError: the rounding of gradients is not one that both backward GEMMs take.
    """
    if type(module) not in (nn.Linear, GridLinear, QuantizedLinear):
        raise ConversionError(f"grid_linear_: an nn.Linear is needed, got {type(module).__name__}.")
    if isinstance(module, QuantizedLinear) and not module.recipe.plain:
        raise ConversionError(f"grid_linear_: the layer follows [{module.recipe}] already. Use a recipe without GEMMs.")
    if gradient is not None:
        legal = isinstance(gradient.granularity, PerTensor | PerRow) and gradient.rounding is Rounding.NEAREST
        if not legal or gradient.transform is not None:
            raise NativeError(
                f"grid_linear_: gradients are rounded to nearest per tensor or per token, got {gradient}."
            )
    weight = module.weight
    if not isinstance(weight, QParameter):
        module.weight = nn.Parameter(quantize_parameter(weight, grid, init, dtype))  # type: ignore[assignment, arg-type]
    # The class is exchanged rather than the module, so that hooks and references survive.
    module.__class__ = GridLinear  # type: ignore[assignment]
    assert isinstance(module, GridLinear)
    module.execution, module.gradient = execution, gradient
    store_parts_(module)
    return module


def store_parts_(module: nn.Module) -> None:
    """Make a module with parameters of `QParameter` write and read them as plain tensors in its `state_dict`.

    Under `weight.codes`, `weight.step` and `weight.grid`, which safetensors and every other format take.

    Args:
        module: any; once is enough.
    """
    if _write_parts not in module._state_dict_hooks.values():
        module._register_state_dict_hook(_write_parts)
        module.register_load_state_dict_pre_hook(_read_parts)


def _local(p: object) -> object:
    return getattr(p, "_local_tensor", p)


def _write_parts(module: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for name, p in module._parameters.items():
        local = _local(p)
        if not isinstance(local, QParameter) or prefix + name not in state:
            continue
        del state[prefix + name]
        for part, tensor in local.parts().items():
            sharded = p is not local and (part == "codes" or (part == "step" and local.per_channel))
            state[f"{prefix}{name}.{part}"] = _as_shard(tensor, p) if sharded else tensor


def _as_shard(tensor: Tensor, p: Any) -> Tensor:
    from torch.distributed.tensor import DTensor

    shape = torch.Size((p.shape[0], *tensor.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(tensor, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def _read_parts(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, p in module._parameters.items():
        key, local = prefix + name, _local(p)
        if not isinstance(local, QParameter):
            continue
        if isinstance(_local(state.get(key)), Tensor) and not isinstance(_local(state[key]), QParameter):
            raise CheckpointError(
                f"{key}: the checkpoint has a float tensor, the model has {local.grid}. Load it before the model is "
                "converted to codes."
            )
        parts = {part: state[f"{key}.{part}"] for part in local.parts() if f"{key}.{part}" in state}
        if len(parts) == len(local.parts()):
            local.load_(key, _of_this_rank(parts, p))
            for part in parts:
                del state[f"{key}.{part}"]
            state[key] = p


def _of_this_rank(parts: Mapping[str, Tensor], p: Any) -> dict[str, Tensor]:
    """Cut whole parts to this rank's rows."""
    found = {}
    for part, tensor in parts.items():
        whole = p is not _local(p) and not hasattr(tensor, "_local_tensor") and part != "grid" and tensor.ndim > 0
        if whole:
            from torch.distributed.tensor import distribute_tensor

            tensor = distribute_tensor(tensor, p.device_mesh, p.placements, src_data_rank=None)
        found[part] = _local(tensor)
    return found
