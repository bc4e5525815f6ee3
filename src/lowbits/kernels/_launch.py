# SPDX-License-Identifier: Apache-2.0
"""Launch Triton's kernels with little work on the host.

A step of training launches thousands. Triton looks at every argument and option each time, to find what it compiled;
here a short key finds it, and the driver is called at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from lowbits.kernels._units import on_device

_FOUND: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    arguments: tuple[Any, ...],
    constants: Callable[[], dict[str, Any]],
    key: Hashable,
    device: torch.device,
) -> None:
    """Launch a kernel on the current stream of a device.

    Args:
        kernel: a function in Triton's language, whose constants come last.
        grid: programs along three axes.
        arguments: tensors, integers, and descriptors, the shapes of whose tiles are part of the key.
        constants: makes those by name, and how to compile; asked when something is compiled.
        key: says which constants; equal keys have equal ones.
        device: of the tensors.
    """
    # What Triton compiles differently: dtypes, whether addresses are multiples of 16, and of sizes these three.
    kinds = (id(kernel), key, device, *[
        (a == 1, a & 15 == 0, -(2**31) <= a < 2**31) if type(a) is int
        else (a.dtype, a.data_ptr() & 15 == 0) if isinstance(a, Tensor) else a.base.dtype
        for a in arguments
    ])  # fmt: skip
    # AMD's compiler looks at the sizes of tensors, too.
    found = None if torch.version.hip else _FOUND.get(kinds)
    with on_device(device):
        if found is not None:
            found[0][grid](*arguments, *found[1])
            return
        named = constants()
        compiled = kernel[grid](*arguments, **named)
    if compiled is not None:  # the interpreter compiles nothing
        _FOUND[kinds] = compiled, tuple(named[name] for name in kernel.arg_names[len(arguments) :])
