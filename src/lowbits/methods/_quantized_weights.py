# SPDX-License-Identifier: Apache-2.0
"""Let layers run on quantized weights while the optimizer moves the master copy.

forward and backward see Q(w);   dL/dw := dL/dQ(w);   the optimizer steps on w      (arXiv:1802.05668, alg. 1)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from lowbits.export import PointTensor
from lowbits.methods._levels import Backward, Levels, encode, round_to_levels
from lowbits.methods._weight_views import Place, View, install_, is_conv1d
from lowbits.quantizers import Noise, Rounding

Choose = Callable[[str, nn.Module, nn.Parameter], Levels | None]
"""`(name of the parameter, module that owns it, parameter) -> its levels, or None to leave it alone`."""


class LevelView(View):
    """A weight rounded to levels; stochastic rounding in training alone, the nearest level in evaluation.

    Args:
        levels: where to.
        backward: the gradient.
        noise: random bits, for stochastic rounding.
        transposed: whether the weight is [in, out], so that its rows are columns.
    """

    draw: Tensor

    def __init__(self, levels: Levels, backward: Backward, noise: Noise, transposed: bool = False) -> None:
        super().__init__()
        self.levels, self.rounding, self.transposed = levels, backward, transposed
        # A tensor, so that a compiled graph does not hold the counter as a constant; no checkpoint needs it.
        self.register_buffer("draw", torch.tensor([0, *noise.key], dtype=torch.int64), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Return Q(w).

        Args:
            weight: the parameter.
        """
        w = weight.t() if self.transposed else weight
        levels, noise = self.levels, None
        if levels.rounding is Rounding.STOCHASTIC:
            if self.training:
                noise = self.draw
            else:
                levels = Levels(levels.count, levels.buckets)
        q = round_to_levels(w, levels, noise, self.rounding)
        return q.t() if self.transposed else q

    def coded(self, weight: Tensor) -> PointTensor:
        """Return w on its nearest levels, as codes."""
        w = weight.detach()
        if self.rounding is Backward.TRUNCATED:
            w = w.clamp(-1, 1)
        return encode(w.t(), self.levels).t() if self.transposed else encode(w, self.levels)

    def set_draw_(self, draw: int) -> None:
        """Set the counter of the random bits."""
        self.draw[0] = draw

    def extra_repr(self) -> str:
        """Show the levels."""
        return f"{self.levels}, {self.rounding.value}"


def quantize_weights_(
    model: nn.Module,
    levels: Levels | Choose,
    *,
    backward: Backward = Backward.STRAIGHT_THROUGH,
    seed: int = 0,
) -> list[str]:
    """Let the layers of a model run on quantized weights, in place.

    Parameters and `state_dict` stay as they are: they are the master copy. `settle_(model)` ends it. Call it after
    `convert_`, before `torch.compile`, DDP and FSDP.

    Args:
        model: any module.
        levels: for all weights of two or more dimensions of linear, convolution, recurrent and embedding layers; or a
            callable that is asked for each. A tied weight is asked for once.
        backward: the gradient of the rounding.
        seed: of stochastic rounding.
    Returns:
        The names of the quantized weights.
    Raises:
        ConversionError: no weight was chosen.
    """
    return install_(model, partial(_view, levels=levels, backward=backward, seed=seed))


def _view(place: Place, *, levels: Levels | Choose, backward: Backward, seed: int) -> LevelView | None:
    own = levels if isinstance(levels, Levels) else levels(place.name, place.module, place.parameter)
    if own is None:
        return None
    noise = Noise.of(seed, place.name, "levels")
    return LevelView(own, backward, noise, is_conv1d(place.module))
