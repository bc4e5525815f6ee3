# SPDX-License-Identifier: Apache-2.0
"""What an optimizer does with one element: a pure function of parameter, gradient, moments and a few scalars.

A rule knows nothing of storage, shapes, devices or launches. Its eager form here is the definition; a kernel that
computes it is held to the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Scalars = Mapping[str, Tensor]
"""Float32 scalar tensors by name: `lr`, the rule's constants, and `c_NAME` for each of its corrections."""

Update = Callable[[Tensor, Tensor, tuple[Tensor, ...], Scalars], tuple[Tensor, tuple[Tensor, ...]]]
"""`(p, g, moments, h) -> (new p, new moments)`, all float32."""


@dataclass(frozen=True)
class Rule:
    """An element-wise update rule.

    Args:
        name: in lower case, also the name of its kernel.
        moments: names of the moments, each with whether it takes both signs.
        update: the definition.
        constants: the scalars that the rule needs, from a parameter group and t, the number of this update counted
            from 1; in the order in which a kernel reads them.
        corrections: names of constants b for which the rule needs 1 - b^t; it finds them under `c_` + name.
    """

    name: str
    moments: Mapping[str, bool]
    update: Update
    constants: Callable[[Mapping[str, Any], int], dict[str, float]]
    corrections: tuple[str, ...] = field(default=())


def root(x: Tensor) -> Tensor:
    """Return the correctly rounded square root of a float32 tensor.

    torch's own float32 root on a CPU may be a unit off (MKL's vector library); a float64 root, rounded, is the right
    one. In compiled code the float32 root is the processor's, which is right.
    """
    return x.sqrt() if torch.compiler.is_compiling() else x.double().sqrt().float()


def power(base: float, exponent: int) -> float:
    """Return base^exponent by repeated squaring, so that a kernel comes to the same float64 bits.

    >>> power(0.5, 3)
    0.125
    """
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base *= base
        exponent >>= 1
    return result
