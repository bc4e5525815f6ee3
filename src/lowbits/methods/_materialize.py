# SPDX-License-Identifier: Apache-2.0
"""Make a model larger than any float copy of it: built on the meta device, drawn layer by layer where it trains."""

from __future__ import annotations

import torch
from torch import nn

from lowbits.errors import ConversionError
from lowbits.nn import (
    Execution,
    Grid,
    QParameter,
    StepInit,
    grid_linear_,
    normal_parameter,
    normal_values,
)
from lowbits.quantizers import Noise, QuantSpec


@torch.no_grad()
def materialize_(  # noqa: PLR0913  what there is to choose
    model: nn.Module,
    grid: Grid,
    device: torch.device | str,
    *,
    seed: int = 0,
    sigma: float = 0.02,
    init: StepInit | None = None,
    dtype: torch.dtype = torch.bfloat16,
    execution: Execution = Execution.SIMULATED,
    gradient: QuantSpec | None = None,
    head: str = "lm_head",
) -> list[str]:
    """Draw all parameters of a model on the meta device, one after the other, on the device where they stay.

    Weights of linear layers but the head become codes without ever having been floats; embedding and head are drawn in
    `dtype`, gains of norms are 1, biases 0. Buffers are made empty: a model that has any sets them afterwards.

    Args:
        model: built under `torch.device("meta")`; of nn.Linear, nn.Embedding and norms.
        grid: of the codes.
        device: where to.
        seed: of the draws, which go by name.
        sigma: of the Gaussian start of every matrix.
        init: how steps come about, from the distribution; None: the published rule.
        dtype: of gradients, and of what is no code.
        execution: of the layers of codes.
        gradient: how gradients of outputs are rounded in them.
        head: name of the layer that stays in `dtype`.
    Returns:
        Names of the parameters that are codes.
    Raises:
        ConversionError: a parameter has been made already.
    """
    device, found = torch.device(device), []
    for path, module in model.named_modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            key = f"{path}.{name}".lstrip(".")
            if not p.is_meta:
                raise ConversionError(
                    f"materialize_: {key} is on {p.device}; build the model under torch.device('meta')."
                )
            noise = Noise.of(seed, key, "start")
            if type(module) is nn.Linear and name == "weight" and path != head:
                made = normal_parameter(p.shape, grid, sigma, noise, init=init, dtype=dtype, device=device)
                made.stream = key
                found.append(key)
                module._parameters[name] = nn.Parameter(made)
            else:
                module._parameters[name] = nn.Parameter(_floats(name, p, sigma, noise, dtype, device))
        if isinstance(module._parameters.get("weight"), QParameter):
            grid_linear_(module, grid, execution=execution, gradient=gradient)
    return found


def _floats(
    name: str, p: torch.Tensor, sigma: float, noise: Noise, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    if p.ndim < 2:
        return torch.full(p.shape, 0.0 if name == "bias" else 1.0, dtype=dtype, device=device)
    made = torch.empty(p.shape, dtype=dtype, device=device)
    rows = max(1, (1 << 24) // max(1, p[0].numel()))
    for start in range(0, p.shape[0], rows):
        part = made[start : start + rows]
        part.copy_(normal_values(part.shape, sigma, noise, device, start * p[0].numel()))
    return made
