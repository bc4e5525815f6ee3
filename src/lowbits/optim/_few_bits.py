# SPDX-License-Identifier: Apache-2.0
"""The optimizers with their moments in 8 or 4 bits: `torch.optim.AdamW(` becomes `lowbits.optim.AdamW8bit(`.

Each function takes the arguments of the class that it returns, with its defaults, `block_size`, how many elements share
a scale (64 to 4096), and `Options`, of which `min_8bit_size` is 4096 here: smaller tensors keep float32 moments.

    8bit    dynamic codes of 8 bits (Dettmers et al. 2022, arXiv:2110.02861)
    4bit    dynamic codes of 4 bits, second moments linear and without 0 (Li et al. 2023, arXiv:2309.01507)
    Fp8     E4M3; a positive second moment never becomes 0, which would be a step without bound

Other codecs, or another one for each moment: the class, with `first=` and `second=`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, Unpack

from torch import Tensor

from lowbits.formats import DYNAMIC4, DYNAMIC8, E4M3, E4M3_NO_UNDERFLOW, UDYNAMIC8, ULINEAR4, Format
from lowbits.optim._adafactor import Adafactor
from lowbits.optim._adagrad import Adagrad
from lowbits.optim._adamw import Adam, AdamW
from lowbits.optim._ademamix import AdEMAMix
from lowbits.optim._blockwise import Blockwise
from lowbits.optim._factored import Factored
from lowbits.optim._lamb import LAMB
from lowbits.optim._lars import LARS
from lowbits.optim._lion import Lion
from lowbits.optim._optimizer import CodecOptimizer, Options
from lowbits.optim._rmsprop import RMSprop
from lowbits.optim._sgd import SGD

MIN_8BIT_SIZE = 4096
"""Tensors of fewer elements keep float32 moments: together they are small, and norms and biases are among them."""

Pair = tuple[Format, Format]
"""Formats of moments of both signs and of those that are never negative."""

BITS8: Pair = (DYNAMIC8, UDYNAMIC8)
BITS4: Pair = (DYNAMIC4, ULINEAR4)
FP8: Pair = (E4M3, E4M3_NO_UNDERFLOW)

T = TypeVar("T", bound=CodecOptimizer)


def _stored(optimizer: type[T], pair: Pair, block_size: int, options: Options, *hyper: Any, **more: Any) -> T:
    """Return the optimizer with block-wise codecs for all moments but those given in `more`."""
    codecs = {
        moment: Blockwise(pair[0] if signed else pair[1], block_size)
        for moment, signed in optimizer.rule.moments.items()
    }
    return optimizer(*hyper, **{**codecs, "min_8bit_size": MIN_8BIT_SIZE, **options, **more})


def AdamW8bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> AdamW:
    """Return `AdamW` with the moments in 8 bits."""
    return _stored(AdamW, BITS8, block_size, options, params, lr, betas, eps, weight_decay)


def Adam8bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> Adam:
    """Return `Adam` with the moments in 8 bits."""
    return _stored(Adam, BITS8, block_size, options, params, lr, betas, eps, weight_decay)


def SGD8bit(  # noqa: PLR0913  the class's own signature
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    *,
    maximize: bool = False,
    block_size: int = 256,
    **options: Unpack[Options],
) -> SGD:
    """Return `SGD` with the momentum in 8 bits; without momentum there is nothing to store."""
    return _stored(
        SGD, BITS8, block_size, options, params, lr, momentum, dampening, weight_decay, nesterov, maximize=maximize
    )


def RMSprop8bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> RMSprop:
    """Return `RMSprop` with the mean squares in 8 bits."""
    return _stored(RMSprop, BITS8, block_size, options, params, lr, alpha, eps, weight_decay)


def Adagrad8bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> Adagrad:
    """Return `Adagrad` with the sums of squares in 8 bits."""
    return _stored(
        Adagrad, BITS8, block_size, options, params, lr, lr_decay, weight_decay, initial_accumulator_value, eps
    )


def Lion8bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> Lion:
    """Return `Lion` with the momentum in 8 bits."""
    return _stored(Lion, BITS8, block_size, options, params, lr, betas, weight_decay)


def AdEMAMix8bit(  # noqa: PLR0913  the class's own signature
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
    alpha: float = 5.0,
    t_alpha: int | None = None,
    t_beta3: int | None = None,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> AdEMAMix:
    """Return `AdEMAMix` with the moments in 8 bits."""
    return _stored(AdEMAMix, BITS8, block_size, options, params, lr, betas, alpha, t_alpha, t_beta3, eps, weight_decay)


def LAMB8bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 1e-2,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> LAMB:
    """Return `LAMB` with the moments in 8 bits."""
    return _stored(LAMB, BITS8, block_size, options, params, lr, betas, eps, weight_decay)


def LARS8bit(
    params: Iterable[Any],
    lr: float | Tensor,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> LARS:
    """Return `LARS` with the momentum in 8 bits."""
    return _stored(LARS, BITS8, block_size, options, params, lr, momentum, weight_decay, trust_coefficient)


def Adafactor8bit(  # noqa: PLR0913  the class's own signature
    params: Iterable[Any],
    lr: float | Tensor = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (None, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    *,
    beta1: float = 0.0,
    block_size: int = 256,
    **options: Unpack[Options],
) -> Adafactor:
    """Return `Adafactor` with the momentum, if any, and the second moments of vectors in 8 bits."""
    second = Factored(Blockwise(UDYNAMIC8, block_size))
    return _stored(
        Adafactor, BITS8, block_size, options, params, lr, beta2_decay, eps, d, weight_decay, beta1=beta1, second=second
    )


def AdamW4bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    block_size: int = 128,
    **options: Unpack[Options],
) -> AdamW:
    """Return `AdamW` with the moments in 4 bits."""
    return _stored(AdamW, BITS4, block_size, options, params, lr, betas, eps, weight_decay)


def Adam4bit(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    block_size: int = 128,
    **options: Unpack[Options],
) -> Adam:
    """Return `Adam` with the moments in 4 bits."""
    return _stored(Adam, BITS4, block_size, options, params, lr, betas, eps, weight_decay)


def AdamWFp8(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> AdamW:
    """Return `AdamW` with the moments in FP8, E4M3."""
    return _stored(AdamW, FP8, block_size, options, params, lr, betas, eps, weight_decay)


def AdamFp8(
    params: Iterable[Any],
    lr: float | Tensor = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    block_size: int = 256,
    **options: Unpack[Options],
) -> Adam:
    """Return `Adam` with the moments in FP8, E4M3."""
    return _stored(Adam, FP8, block_size, options, params, lr, betas, eps, weight_decay)
