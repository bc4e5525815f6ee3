# SPDX-License-Identifier: Apache-2.0
"""One switch for method x bits x scope x environment: what a run trains, and nothing else differs between two arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lowbits import recipes
from lowbits.methods.bitnet import HYPER
from lowbits.methods.dqt import Environment, Scope, States, quantize_
from lowbits.nn import Execution, Grid, QParameter, Scaling, StepInit, StepRule, convert_, sub_norm_
from lowbits.optim import AdamW, CodecOptimizer
from lowbits.quantizers import Rounding


class Kind(Enum):
    """How the weights of the linear layers are kept."""

    FP = "fp"
    BITNET = "bitnet"
    DQT = "dqt"
    BF16_SR = "bf16_sr"


@dataclass(frozen=True)
class Arm:
    """One way to train.

    Args:
        kind: of weights: float32, float32 masters of ternary ones, codes, or bfloat16 rounded stochastically.
        bits: of codes.
        scope: which weights are codes.
        environment: of gradients; all but fp32 compute in bfloat16.
        rounding: of updates of codes.
        init: of their steps.
        scaling: of their steps.
        frozen: the linear layers are not trained.
        sub_norms: with the norms of BitNet.
        execution: of the layers of codes.
        states: of the moments of codes.
        dropped: the smallest fifth of each tensor's updates is left out.
        hyper: name of a published set of hyper-parameters, for all parameters; the run's warm-up and decay stay.
    """

    kind: Kind = Kind.DQT
    bits: float = 8
    scope: Scope = Scope.LINEAR
    environment: Environment = Environment.FP32
    rounding: Rounding = Rounding.STOCHASTIC
    init: StepInit = StepInit()  # noqa: RUF009  frozen
    scaling: Scaling = Scaling.FIXED
    frozen: bool = False
    sub_norms: bool = True
    execution: Execution = Execution.SIMULATED
    states: States = States.FLOAT32
    dropped: bool = False
    hyper: str | None = None

    def prepare_(self, model: nn.Module) -> None:
        """Change a model that was drawn: norms first, so that every arm starts from the same numbers."""
        if self.sub_norms:
            sub_norm_(model)
        if self.kind is Kind.BITNET:
            convert_(model, recipes.named("bitnet_b158"), verbose=False)
        if self.kind is Kind.DQT:
            plain = Grid.of(self.bits, rounding=self.rounding)
            grid = Grid(plain.format, plain.packing, plain.rounding, self.scaling)
            quantize_(model, grid, self.init, scope=self.scope, environment=self.environment, execution=self.execution)
        if self.kind is Kind.BF16_SR:
            convert_(model, recipes.named("bitnet_a8"), verbose=False)
            for layer in linears(model).values():
                layer.weight = nn.Parameter(layer.weight.detach().bfloat16())
        for layer in linears(model).values():
            layer.weight.requires_grad_(not self.frozen)

    def optimizer(self, model: nn.Module, lr: float, other_lr: float, **hyper: Any) -> CodecOptimizer:
        """AdamW for the weights of linear layers (and all other codes), and at its own rate for the rest."""
        mine = {id(layer.weight) for layer in linears(model).values()}
        ours = [p for p in model.parameters() if p.requires_grad and (id(p) in mine or isinstance(p, QParameter))]
        rest = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in ours)]
        groups = [{"params": ps, "lr": rate} for ps, rate in ((ours, lr), (rest, other_lr)) if ps]
        groups[0].update(self.states.codecs if ours else {})
        if self.hyper is not None:
            hyper |= {"betas": HYPER[self.hyper].betas, "eps": HYPER[self.hyper].eps}
        return (WithoutSmallest if self.dropped else AdamW)(groups, rounding=Rounding.STOCHASTIC, **hyper)

    def schedule_(
        self, groups: Sequence[dict[str, Any]], peaks: Sequence[float], step: int, steps: int, share: float
    ) -> None:
        """Set learning rates to a share of their peaks; a published set says peaks and decay of all groups itself."""
        for group, peak in zip(groups, peaks, strict=True):
            decay = group["weight_decay"]
            if self.hyper is not None:
                peak, decay = HYPER[self.hyper].at(step, steps)
            group["lr"], group["weight_decay"] = peak * share, decay


class WithoutSmallest(AdamW):
    """AdamW that leaves out the smallest fifth of the updates of each tensor of codes (arXiv:2412.04787, sec. 5.3)."""

    def _new(self, target: Any, p: Tensor, g: Tensor, moments: Any, h: Any) -> Any:
        new, moments = super()._new(target, p, g, moments, h)
        if isinstance(target.parameter, QParameter):
            size = (new - p).abs()
            least = size.flatten().kthvalue(max(1, size.numel() // 5)).values
            new = torch.where(size <= least, p, new)
        return new, moments


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers of any kind, but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}


NEAREST, WIDE = Rounding.NEAREST, StepInit(StepRule.SIGMA, sigmas=4.0)

ARMS: dict[str, Arm] = {
    "fp": Arm(Kind.FP),
    "fp_plain": Arm(Kind.FP, sub_norms=False),
    "bitnet": Arm(Kind.BITNET),
    "dqt_ternary": Arm(bits=1.58),
    **{f"dqt_{bits}": Arm(bits=bits) for bits in (2, 3, 4, 8)},
    "frozen_ternary": Arm(bits=1.58, frozen=True),
    "frozen_8": Arm(bits=8, frozen=True),
    "rtn_ternary": Arm(bits=1.58, rounding=NEAREST),
    "rtn_8": Arm(bits=8, rounding=NEAREST),
    "bf16_sr": Arm(Kind.BF16_SR),
    "dqt_8_wide": Arm(bits=8, init=WIDE),
    "dqt_8_absmax": Arm(bits=8, init=StepInit(StepRule.ABSMAX)),
    "dqt_8_channel": Arm(bits=8, init=StepInit(per_channel=True)),
    "dqt_8_recomputed": Arm(bits=8, scaling=Scaling.RECOMPUTED),
    "dqt_8_all": Arm(bits=8, scope=Scope.ALL),
    "dqt_8_bf16": Arm(bits=8, environment=Environment.BF16),
    "dqt_ternary_bf16": Arm(bits=1.58, environment=Environment.BF16),
    "dqt_8_fp8": Arm(bits=8, environment=Environment.FP8),
    "dqt_8_int8": Arm(bits=8, environment=Environment.INT8),
    "dqt_ternary_channel": Arm(bits=1.58, init=StepInit(per_channel=True)),
    "dqt_8_states8": Arm(bits=8, states=States.EIGHT),
    "dqt_8_states4": Arm(bits=8, states=States.FOUR),
    "dqt_ternary_states4": Arm(bits=1.58, states=States.FOUR),
    "dqt_8_dropped": Arm(bits=8, dropped=True),
    "dqt_ternary_dropped": Arm(bits=1.58, dropped=True),
    "bitnet_official": Arm(Kind.BITNET, hyper="official-700m"),
}
"""Every arm by name."""
