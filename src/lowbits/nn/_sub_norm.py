# SPDX-License-Identifier: Apache-2.0
"""The norms of BitNet: one more RMSNorm before the layers that write into the residual stream.

`inner_attn_ln` before o_proj and `ffn_layernorm` before down_proj (BitNet b1.58, `modeling_bitllama.py`): what a linear
layer in few bits reads has unit variance, whatever the layers before it do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import rms_norm

from lowbits.errors import ConversionError

WRITERS = ("o_proj", "down_proj")
"""What transformers calls the layers that write into the residual stream of a Llama."""


class SubNorm(nn.RMSNorm):
    """An RMSNorm whose gains are cast to the dtype of what it normalizes, as autocast does in linear layers.

    With two dtypes torch would run it as five kernels, and warn.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return x / rms(x) times the gains, in the dtype of x."""
        return rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def sub_norm_(model: nn.Module, writers: Sequence[str] = WRITERS, eps: float = 1e-5) -> list[str]:
    """Put an RMSNorm with gains of 1 before the chosen linear layers, in place; they own it as `sub_norm`.

    Args:
        model: whose linear layers have `in_features`; before or after their conversion.
        writers: last parts of the layers' names.
        eps: added to the mean square.
    Returns:
        Names of the layers that were given one.
    Raises:
        ConversionError: no layer has such a name.
    """
    found = [(n, m) for n, m in model.named_modules() if n.rpartition(".")[2] in writers and hasattr(m, "in_features")]
    if not found:
        raise ConversionError(
            f"sub_norm_: {type(model).__name__} has no linear layers named {', '.join(writers)}. Name its own."
        )
    for name, layer in found:
        if hasattr(layer, "sub_norm"):
            raise ConversionError(f"sub_norm_: {name} has a norm before it already.")
        weight: Any = layer.weight
        width: Any = layer.in_features
        layer.sub_norm = SubNorm(width, eps, device=weight.device, dtype=weight.dtype)
        layer.register_forward_pre_hook(_normalize)
    return [name for name, _ in found]


def _normalize(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    norm: Any = layer.sub_norm
    return (norm(inputs[0]), *inputs[1:])
