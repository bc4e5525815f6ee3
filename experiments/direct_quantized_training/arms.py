# SPDX-License-Identifier: Apache-2.0
"""One switch for method x bits x scope x environment: what a run trains, and nothing else differs between two arms."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn

from lowbits import recipes
from lowbits.methods.dqt import Environment, Scope, quantize_
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
        return AdamW(groups, rounding=Rounding.STOCHASTIC, **hyper)


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
}
"""Every arm by name."""
