# SPDX-License-Identifier: Apache-2.0
"""Find the linear layers of a model and know which way their weights lie."""

from __future__ import annotations

from torch import nn

from lowbits.nn import QuantizedConv1D


def is_conv1d(module: nn.Module) -> bool:
    """Tell whether a module is GPT-2's `Conv1D`, converted or not: a linear layer whose weight is `[in, out]`.

    Args:
        module: any module. Recognised by its class name, so that transformers need not be installed.
    """
    return isinstance(module, QuantizedConv1D) or type(module).__name__ == "Conv1D"


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every `nn.Linear` and GPT-2 `Conv1D` by name, converted or not, the head included.

    Args:
        model: any module.
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) or is_conv1d(m)}


def output_axes(model: nn.Module) -> dict[str, int]:
    """Return, for every linear weight's parameter name, the dimension that counts outputs.

    Args:
        model: any module.
    Returns:
        0 for `nn.Linear` (`[out, in]`), 1 for `Conv1D` (`[in, out]`).
    """
    return {f"{name}.weight": int(is_conv1d(m)) for name, m in linear_layers(model).items()}
