# SPDX-License-Identifier: Apache-2.0
"""torchao's quantized linear layers, put into a model as its documentation says. Its output head is left alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

Convert = Callable[[nn.Module], nn.Module]


def _linear(head: nn.Module | None) -> Callable[[nn.Module, str], bool]:
    return lambda module, name: isinstance(module, nn.Linear) and module is not head


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "lm_head", None)


def float8(recipe: str) -> Convert:
    """`convert_to_float8_training` by one of its recipes."""

    def convert(model: nn.Module) -> nn.Module:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig.from_recipe_name(recipe)
        return _checked(convert_to_float8_training(model, module_filter_fn=_linear(_head(model)), config=config))

    return convert


def float8_blocks(model: nn.Module) -> nn.Module:
    """The prototype with 1x128 and 128x128 blocks."""
    from torchao.prototype.blockwise_fp8_training.linear import Float8BlockwiseLinearConfig
    from torchao.quantization import quantize_

    quantize_(model, Float8BlockwiseLinearConfig(), filter_fn=_linear(_head(model)))
    return _checked(model)


def int8(*, module_swap: bool) -> Convert:
    """INT8 mixed precision: a tensor subclass as weight (the default), or another module."""

    def convert(model: nn.Module) -> nn.Module:
        from torchao.prototype.quantized_training import int8_mixed_precision_training
        from torchao.quantization import quantize_

        config = int8_mixed_precision_training(module_swap=module_swap)
        quantize_(model, config, filter_fn=_linear(_head(model)))
        return _checked(model)

    return convert


def _checked(model: nn.Module) -> nn.Module:
    """Refuse to call a model converted that is not."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__module__.startswith("torchao") or type(weight).__module__.startswith("torchao"):
            return model
        if weight is not None and type(weight.data).__module__.startswith("torchao"):
            return model
    raise ValueError("torchao converted none of the linear layers (it takes nn.Linear alone)")


TORCHAO: dict[str, Convert] = {
    "torchao fp8 tensorwise": float8("tensorwise"),
    "torchao fp8 rowwise": float8("rowwise"),
    "torchao fp8 rowwise, wgrad bf16": float8("rowwise_with_gw_hp"),
    "torchao fp8 blocks": float8_blocks,
    "torchao int8": int8(module_swap=False),
    "torchao int8, module swap": int8(module_swap=True),
}
