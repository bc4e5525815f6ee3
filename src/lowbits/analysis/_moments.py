# SPDX-License-Identifier: Apache-2.0
"""See what a codec would do to the optimizer's moments as they are in the middle of a training."""

from __future__ import annotations

from torch import Tensor, nn

from lowbits.analysis._errors import TensorErrors, tensor_errors
from lowbits.analysis._linears import output_axes
from lowbits.optim import AdamW
from lowbits.quantizers import QuantSpec


def moment_errors(
    model: nn.Module, optimizer: AdamW, first: QuantSpec | None = None, second: QuantSpec | None = None
) -> dict[str, dict[str, TensorErrors]]:
    """Quantize the moments of every linear weight and measure what is lost.

    The share flushed to zero is the number to look at in the second moment: a v of 0 makes a step of m / eps.

    Args:
        model: the model that the optimizer trains.
        optimizer: after at least one step; whatever codecs it has, their decoded values are measured. Not changed.
        first: how the first moment would be quantized, as a weight `[out, in]`; None leaves it out.
        second: likewise the second moment.
    Returns:
        Parameter name -> `first`, `second` -> errors.
    """
    axes = output_axes(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    specs = {name: spec for name, spec in (("first", first), ("second", second)) if spec is not None}
    report: dict[str, dict[str, TensorErrors]] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name, state = names[id(parameter)], optimizer.state.get(parameter)
            if name in axes and state:
                moments: dict[str, Tensor] = {m: optimizer.moment(parameter, m) for m in specs}
                rows = {m: value if axes[name] == 0 else value.t() for m, value in moments.items()}
                report[name] = {m: tensor_errors(value, specs[m]) for m, value in rows.items()}
    return {name: report[name] for name in names.values() if name in report}
