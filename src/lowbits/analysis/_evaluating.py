# SPDX-License-Identifier: Apache-2.0
"""Look at a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """Put every module in `eval` mode inside the block and back in the mode that each had before.

    Args:
        model: the model; its submodules may be in different modes.
    Returns:
        A context manager that yields `model`.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield model
    finally:
        for module in training:
            module.training = True
