# SPDX-License-Identifier: Apache-2.0
"""The noisy weight as a module: what `layer.weight_fn` is.

Between forward and backward nothing is kept but D, one number a block: the noise is drawn again from its counter. Ran
as operators of torch, forward and backward have the same bits compiled and not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbits.errors import FormatError, ShapeError
from lowbits.methods._pseudo_noise import _launch, _numerics
from lowbits.methods._pseudo_noise._blocks import Block, counts, from_blocks, to_blocks
from lowbits.methods._pseudo_noise._draw import PseudoNoise, draw
from lowbits.methods._pseudo_noise._numerics import Plan
from lowbits.quantizers import Noise

ROLE = "weight noise"
_LARGEST_DRAW = 1 << 32


class NoisyWeight(nn.Module):
    """Return W^ = cast(W + R D) in training and cast(W) in evaluation.

    Attributes:
        b_i: float32 [down, across], one number a block of the stored weight; none where the plan has no noise.
        counter: int64 [3], the number of the draw and the key of the layer. A buffer that no checkpoint holds: the key
            is a function of seed and name, the draw one of the position.

    Args:
        shape: of the weight, as it is stored.
        plan: what is done to it.
        seed: of the run.
        name: of the layer; no two layers share one, so no two share random bits.
        origin: of this shard's first block in the whole weight, in blocks.
    Raises:
        ShapeError: the weight is no matrix.
    """

    counter: Tensor
    b_i: nn.Parameter | None

    def __init__(
        self, shape: torch.Size | tuple[int, int], plan: Plan, *, seed: int, name: str, origin: Block = (0, 0)
    ) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ShapeError(f"{name}: noise is added to matrices, the weight has the shape {tuple(shape)}.")
        self.plan, self._text, self.layer_name, self.origin = plan, plan.text, name, origin
        noisy = plan.noise is not PseudoNoise.NONE
        self.register_parameter("b_i", nn.Parameter(torch.ones(counts(shape, plan.block))) if noisy else None)
        key = Noise.of(seed, name, ROLE).key
        self.register_buffer("counter", torch.tensor([0, *key], dtype=torch.int64), persistent=False)

    def forward(self, w: Tensor) -> Tensor:
        """Return W^ in autocast's dtype if the plan's operator has it, else in w's.

        Args:
            w: float [rows, columns].
        Raises:
            FormatError: on a CPU, the weight is not finite; names layer and block.
        """
        dtype = self._dtype(w)
        if self.b_i is None or not self.training:
            return _Straight.apply(w, _numerics.without_noise(w.detach(), self.plan).to(dtype))
        arguments = w, self.b_i, self.counter, self._text, self.origin, dtype
        y: Tensor
        if self.plan.through_max:
            y = _NoisyThroughMax.apply(*arguments)
        elif torch.compiler.is_compiling():  # torch 2.11 makes nothing again of what is inside an autograd function
            y, _ = _add_noise_op(*arguments)
        else:
            y = _Noisy.apply(*arguments)
        if w.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_finite(w)  # on a GPU this would wait for it at every layer
        return y

    def _dtype(self, w: Tensor) -> torch.dtype:
        kind = w.device.type
        mixed = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == self.plan.operator.dtype
        return self.plan.operator.dtype if mixed else w.dtype

    def check_finite(self, w: Tensor) -> None:
        """Look at a weight and name its first block that is not finite.

        Raises:
            FormatError: there is one.
        """
        if bool(w.detach().abs().amax().isfinite()):
            return
        bad = ~to_blocks(w.detach(), self.plan.block).isfinite().all(-1)
        row, column = bad.nonzero()[0].tolist()
        raise FormatError(
            f"{self.layer_name}: block ({row}, {column}) of its weight is not finite, so it has no largest number to "
            "scale the noise by. Go on from an earlier checkpoint, with a smaller learning rate."
        )

    @torch.no_grad()
    def bits(self) -> Tensor:
        """Return b_t of every block within its bounds, float32 [down, across]."""
        assert self.b_i is not None
        return self.plan.kept_bits(self.b_i)

    @torch.no_grad()
    def noise(self, w: Tensor) -> Tensor:
        """Return R of the present draw, block by block: float32 [down, across, elements]."""
        plan = self.plan
        return draw(plan.noise, plan.fidelity, counts(w.shape, plan.block), plan.block, self.counter, self.origin)

    def extra_repr(self) -> str:
        """Show what is done."""
        plan = self.plan
        return f"{plan.noise.value}, {plan.block[0]} x {plan.block[1]}, {plan.b_init:g} -> {plan.b_target:g} bits"


class Counted(Protocol):
    """What has a counter of its draws."""

    counter: Tensor


def set_draw_(weights: Sequence[Counted], number: int) -> None:
    """Set the number of the draw of all weights, in two launches.

    Args:
        weights: on one device.
        number: below 2^32; it never repeats in a run.
    Raises:
        FormatError: the number is not in its range.
    """
    if not 0 <= number < _LARGEST_DRAW:
        raise FormatError(f"draws are numbered from 0 to 2^32 - 1, got {number}.")
    draws = [weight.counter[0] for weight in weights]
    if draws:
        torch._foreach_zero_(draws)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(draws, number)  # pyright: ignore[reportPrivateImportUsage]


class _Straight(torch.autograd.Function):
    """A value in place of a weight; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, value: Tensor) -> Tensor:  # type: ignore[override]
        ctx.dtype = w.dtype
        return value

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return g.to(ctx.dtype), None


class _Noisy(torch.autograd.Function):
    """W^ of W and b_i; dL/dW = G, whatever the cast does."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, b_i: Tensor, counter: Tensor, plan: str, origin: Block, dtype: torch.dtype
    ) -> Tensor:  # type: ignore[override]
        y, slopes = add_noise(w, b_i, counter, plan, origin, dtype)
        _keep(ctx, (w, b_i, counter, plan, origin, dtype), (y, slopes))
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _backward(ctx, g, gradients)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Keep what the backward pass needs."""
    w, b_i, counter, plan, origin, _ = inputs
    ctx.save_for_backward(output[1], counter)
    ctx.plan, ctx.origin, ctx.dtypes = plan, origin, (w.dtype, b_i.dtype)


def _backward(ctx: Any, g: Tensor, turn: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor | None, ...]:
    """Return the gradients of all that `add_noise` takes."""
    slopes, counter = ctx.saved_tensors
    dw, db = turn(g, counter, slopes, ctx.plan, ctx.origin, ctx.dtypes[0])
    dw = g if g.dtype == ctx.dtypes[0] else dw
    return dw, db.to(ctx.dtypes[1]), None, None, None, None


class _NoisyThroughMax(torch.autograd.Function):
    """The same with the path through M."""

    @staticmethod
    def forward(
        ctx: Any, w: Tensor, b_i: Tensor, counter: Tensor, plan: str, origin: Block, dtype: torch.dtype
    ) -> Tensor:  # type: ignore[override]
        y, slopes = _add_noise_op(w, b_i, counter, plan, origin, dtype)
        ctx.save_for_backward(slopes, counter, w, b_i)
        ctx.plan, ctx.origin, ctx.dtypes = plan, origin, (w.dtype, b_i.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        slopes, counter, w, b_i = ctx.saved_tensors
        dw, db = _gradients_op(g, counter, slopes, ctx.plan, ctx.origin, ctx.dtypes[0])
        dw = (g if g.dtype == ctx.dtypes[0] else dw) + _through_max_op(g, w, b_i, counter, ctx.plan, ctx.origin)
        return dw, db.to(ctx.dtypes[1]), None, None, None, None


def add_noise(
    w: Tensor, b_i: Tensor, counter: Tensor, plan: str, origin: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return W^ in `dtype` and the slope of every block: by the kernel where it can, else by the definition."""
    known, first = Plan.of_text(plan), (origin[0], origin[1])
    if _launch.launchable(w, known):
        return _launch.add_noise(w, b_i, counter, known, first, dtype)
    y, slopes = _numerics.forward(w, b_i, counter, known, first)
    return y.to(dtype), slopes


def numbers(counter: Tensor, plan: str, shape: Sequence[int]) -> Tensor:
    """Return R of a weight as a matrix of this shape, float32."""
    return (_numbers_op if torch.compiler.is_compiling() else _numbers)(counter, plan, shape)


def _numbers(counter: Tensor, plan: str, shape: Sequence[int]) -> Tensor:
    known, sides = Plan.of_text(plan), (shape[0], shape[1])
    if _launch.runs_on(counter.device, known):
        return _launch.draw(counter, known, sides)
    blocks = draw(known.noise, known.fidelity, counts(sides, known.block), known.block, counter)
    return from_blocks(blocks, sides, known.block)


def gradients(
    g: Tensor, counter: Tensor, slopes: Tensor, plan: str, origin: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return G in `dtype`, itself where it has it, and dL/db_i."""
    known, first, g = Plan.of_text(plan), (origin[0], origin[1]), g.contiguous()
    if _launch.launchable(g, known):
        return _launch.gradients(g, counter, slopes, known, first, dtype)
    return g.to(dtype), _numerics.backward(g, slopes, counter, known, first)


# To torch.compile they are opaque; called directly where nothing is traced, since the dispatcher costs a layer tens of
# microseconds.
_add_noise_op = torch.library.custom_op("lowbits::add_pseudo_noise", add_noise, mutates_args=())
_add_noise_op.register_autograd(lambda ctx, g, _: _backward(ctx, g, _gradients_op), setup_context=_keep)
_numbers_op = torch.library.custom_op("lowbits::pseudo_noise_numbers", _numbers, mutates_args=())


@torch.library.custom_op("lowbits::pseudo_noise_gradients", mutates_args=())
def _gradients_op(
    g: Tensor, counter: Tensor, slopes: Tensor, plan: str, origin: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    copied, bits = gradients(g, counter, slopes, plan, origin, dtype)
    return g.new_empty(0) if g.dtype == dtype else copied, bits  # a result is no alias of an argument


@torch.library.custom_op("lowbits::pseudo_noise_through_max", mutates_args=())
def _through_max_op(g: Tensor, w: Tensor, b_i: Tensor, counter: Tensor, plan: str, origin: Sequence[int]) -> Tensor:
    first = (origin[0], origin[1])
    return _numerics.gradient_through_max(g, w, b_i, counter, Plan.of_text(plan), first).to(w.dtype)


@_through_max_op.register_fake
def _(g: Tensor, w: Tensor, b_i: Tensor, counter: Tensor, plan: str, origin: Sequence[int]) -> Tensor:
    return torch.empty_like(w)


@_add_noise_op.register_fake
def _(
    w: Tensor, b_i: Tensor, counter: Tensor, plan: str, origin: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if w.dtype == torch.float64 else torch.float32
    return torch.empty_like(w, dtype=dtype), b_i.new_empty(b_i.shape, dtype=wide)


@_numbers_op.register_fake
def _(counter: Tensor, plan: str, shape: Sequence[int]) -> Tensor:
    return counter.new_empty(list(shape), dtype=torch.float32)


@_gradients_op.register_fake
def _(
    g: Tensor, counter: Tensor, slopes: Tensor, plan: str, origin: Sequence[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return g.new_empty(0 if g.dtype == dtype else g.shape, dtype=dtype), torch.empty_like(slopes)
