# SPDX-License-Identifier: Apache-2.0
"""Make operators of functions: what torch.compile, checkpointing and CUDA graphs see of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


def operator(function: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a pure function as the operator `lowbits::NAME`, NAME being the function's without underscores in front.

    Its schema comes from the annotations. `torch.library.custom_op` does the same and costs several times as much a
    call, since it looks for results that alias arguments.

    Args:
        function: on tensors, numbers, strings and dtypes; changes no argument and returns new tensors.
        fake: of the same arguments; returns empty tensors of the results' shapes.
    Returns:
        What calls the operator.
    """
    name = f"lowbits::{function.__name__.lstrip('_')}"
    torch.library.define(name, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(name, "CompositeExplicitAutograd")(function)
    torch.library.register_fake(name)(fake)
    return getattr(torch.ops.lowbits, function.__name__.lstrip("_")).default


def remembered(function: Callable[..., _T]) -> Callable[..., _T]:
    """Keep what a function returned; a compiler reads the function itself, as it reads through any cache.

    Args:
        function: of hashable arguments, by position.
    """
    kept = cache(function)

    def asked(*args: Hashable) -> _T:
        return function(*args) if torch.compiler.is_compiling() else kept(*args)

    return asked


def as_dtype(y: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast the result of an autograd function.

    Where such a function returns what `.to` gave back as it was, graphs of torch 2.11 lose its gradient.

    Args:
        y: any.
        dtype: wanted.
    """
    return y if y.dtype == dtype else y.to(dtype)
