# SPDX-License-Identifier: Apache-2.0
"""Direct quantized training: weights that exist on an n-bit grid alone, from the first step to the last.

Zhao, Tabaru, Kobayashi, Honda, Yamazaki, Tsuruoka, "Direct Quantized Training of Language Models with Stochastic
Rounding", arXiv:2412.04787. No float master copy and no straight-through estimator for weights: the optimizer reads
codes, computes in float32, and rounds its update stochastically onto the grid.

    W = D q;   W' = rule(W, gradient, moments);   q <- clamp(q + SR((W' - W) / D), low, high)        (eq. 4)

The published code keeps every weight in float32; here the bytes are real. `quantize_` and any optimizer of
`lowbits.optim` do in a loop of one's own what `DQT` does in `lowbits train`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from lowbits.errors import ConversionError, SpecError
from lowbits.formats import DYNAMIC4, DYNAMIC8, E5M2, INT8, TERNARY, UDYNAMIC8, ULINEAR4
from lowbits.methods._code_meter import CodeMeter, Occupancy, alarms, mean_of, occupancy
from lowbits.methods._contract import Method, Position, Table
from lowbits.methods._materialize import materialize_
from lowbits.nn import (
    Execution,
    Grid,
    Packing,
    QParameter,
    Scaling,
    StepInit,
    StepRule,
    grid_linear_,
    quantize_parameter,
    rounded,
    store_parts_,
    sub_norm_,
)
from lowbits.optim import Blockwise, StateCodec, param_groups
from lowbits.quantizers import Noise, PerRow, QuantSpec, Rounding

__all__ = [
    "DQT",
    "Environment",
    "Occupancy",
    "Scope",
    "States",
    "alarms",
    "codes_of",
    "example",
    "materialize_",
    "occupancy",
    "quantize_",
    "rescale_",
    "ternary_",
    "ternary_weights",
]

WRITERS = ("o_proj", "down_proj", "c_proj")


class Scope(Enum):
    """Which weights are codes.

    - LINEAR: those of linear layers but the head; embeddings, head and norms stay floats, as the paper's text says;
    - ALL: every parameter, gains of norms too, as the published code does.
    """

    LINEAR = "linear"
    ALL = "all"


class Environment(Enum):
    """In what the gradients of codes are kept, and how the gradients of outputs enter the backward GEMMs.

    - FP32: float32;
    - BF16: bfloat16;
    - FP8: bfloat16; those of outputs are rounded to E5M2, one scale a tensor;
    - INT8: bfloat16; those of outputs are rounded to int8, one scale a token, so that dgrad may run on integer units.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    FP8 = "fp8"
    INT8 = "int8"

    @property
    def dtype(self) -> torch.dtype:
        """Of gradients of codes."""
        return torch.float32 if self is Environment.FP32 else torch.bfloat16

    @property
    def gradient(self) -> QuantSpec | None:
        """How gradients of outputs are rounded."""
        return {Environment.FP8: QuantSpec(E5M2), Environment.INT8: QuantSpec(INT8, PerRow())}.get(self)


class States(Enum):
    """In what the moments of codes are stored: float32, or block-wise codes of 8 or 4 bits."""

    FLOAT32 = "float32"
    EIGHT = "8bit"
    FOUR = "4bit"

    @property
    def codecs(self) -> dict[str, StateCodec]:
        """Of the first and the second moment, for a parameter group; empty for the optimizer's own."""
        return {
            States.FLOAT32: {},
            States.EIGHT: {"first": Blockwise(DYNAMIC8), "second": Blockwise(UDYNAMIC8)},
            States.FOUR: {"first": Blockwise(DYNAMIC4, 128), "second": Blockwise(ULINEAR4, 128)},
        }[self]


def quantize_(  # noqa: PLR0913  what there is to choose
    model: nn.Module,
    grid: Grid,
    init: StepInit | None = None,
    *,
    scope: Scope = Scope.LINEAR,
    environment: Environment = Environment.FP32,
    execution: Execution = Execution.SIMULATED,
) -> list[str]:
    """Make weights of a model codes, in place; their floats are gone.

    Call it before the optimizer is made, and before `fully_shard`, DDP and compilation. Parameters are keyed by name:
    whatever the order of optimizer and ranks, each draws the same random bits.

    Args:
        model: with linear layers, plain or converted by a recipe without GEMMs; the weights of transformers' `Conv1D`
            become [out, in].
        grid: of the codes.
        init: how steps come about; None: the published rule.
        scope: which weights.
        environment: of their gradients.
        execution: of GEMMs with codes, see `GridLinear`.
    Returns:
        Names of the parameters that are codes now.
    Raises:
        ConversionError: the model has no such layer.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    head = head if isinstance(head, nn.Module) else dict(model.named_modules()).get("lm_head")
    for name, module in model.named_modules():
        if _is_linear(module) and (scope is Scope.ALL or module is not head):
            _check_plain(name, module)
            _as_linear_(module)
            grid_linear_(
                module, grid, init, execution=execution, gradient=environment.gradient, dtype=environment.dtype
            )
            _name_(module.weight, f"{name}.weight")  # type: ignore[arg-type]
    if scope is Scope.ALL:
        _quantize_rest_(model, grid, init, environment)
    found = list(codes_of(model))
    if not found:
        raise ConversionError(f"quantize_: {type(model).__name__} has no linear layers but its head.")
    return found


def codes_of(model: nn.Module) -> dict[str, QParameter]:
    """Return the parameters that are codes, by name; of sharded ones this rank's part.

    Args:
        model: any.
    """
    parts = {name: getattr(p, "_local_tensor", p) for name, p in model.named_parameters()}
    return {name: p for name, p in parts.items() if isinstance(p, QParameter)}


def ternary_(model: nn.Module) -> list[str]:
    """Make the codes of a model ternary, in place, for inference (arXiv:2412.04787, sec. 5).

        g = max(mean |W|, 1e-5);   W_t = clamp(round(W / g), -1, 1) g,   per tensor

    Weights that are ternary already keep their step: a step recomputed from them would shrink by the share of zeros.

    Args:
        model: whose weights are codes.
    Returns:
        Names of the parameters that were converted.
    """
    grid, found = Grid(TERNARY), []
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if isinstance(p, QParameter) and p.grid.format != TERNARY:
                made = quantize_parameter(p.dequantize(), grid, StepInit(), p.dtype)
                made.stream = p.stream
                setattr(module, name, nn.Parameter(made, p.requires_grad))
                found.append(p.stream)
    return found


@contextmanager
def ternary_weights(model: nn.Module) -> Iterator[None]:
    """Run with ternary weights within the block, see `ternary_`; then with the trained ones again.

    Args:
        model: whose weights are codes.
    """
    kept = [(module, name, p) for module in model.modules() for name, p in module._parameters.items()]
    ternary_(model)
    try:
        yield
    finally:
        for module, name, p in kept:
            module._parameters[name] = p


@torch.no_grad()
def rescale_(p: QParameter, init: StepInit, noise: Noise, step: int) -> Tensor:
    """Give a parameter a new step and round its weights once onto the new grid, stochastically.

    Args:
        p: whole, on one device.
        init: the rule that gives the new step.
        noise: of this event.
        step: number of the event.
    Returns:
        The factor by which the step changed.
    """
    weight, before = p.dequantize(), p.step.clone()
    draw = noise.uniform(p.shape, step, device=p.device)
    p.step.copy_(init.step(weight, p.grid).view(p.step.shape))
    p.store_(rounded(weight / p.step, p.grid, draw))
    return p.step / before


@dataclass(frozen=True)
class DQT(Method):
    """Train weights as codes.

    Args:
        bits: 8 to 2, or 1.58 for ternary codes.
        codes_per_byte: 1, 2, 4, or 5 for ternary codes as base-3 digits; None: the densest of the first three.
        scope: which weights are codes.
        environment: dtype of their gradients, and how gradients of outputs are rounded.
        execution: native runs fprop (and dgrad in `int8`) on integer units, auto does so on a GPU.
        rounding: of updates; nearest is the control under which small steps vanish.
        init: the rule that gives the steps.
        sigmas: k of the rule `sigma`.
        per_channel: one step for each output channel.
        scaling: whether steps stay.
        rescale_every: updates between events that give new steps by `init`, 0 for none.
        states: how the moments of codes are stored.
        codes_lr: their peak learning rate; None: the run's.
        frozen: the codes stay as they were: the control of which layers the rest of the model can do without.
        sub_norms: one more RMSNorm before the layers that write into the residual stream, as in BitNet b1.58.
    """

    bits: float = 8
    codes_per_byte: int | None = None
    scope: Scope = Scope.LINEAR
    environment: Environment = Environment.FP32
    execution: Execution = Execution.SIMULATED
    rounding: Rounding = Rounding.STOCHASTIC
    init: StepRule = StepRule.ABSMEAN_TOP
    sigmas: float = 4.0
    per_channel: bool = False
    scaling: Scaling = Scaling.FIXED
    rescale_every: int = 0
    states: States = States.FLOAT32
    codes_lr: float | None = None
    frozen: bool = False
    sub_norms: bool = True

    def __post_init__(self) -> None:
        if self.rescale_every < 0 or (self.codes_lr is not None and self.codes_lr < 0):
            raise SpecError(
                f"DQT: rescale_every and codes_lr are at least 0, got {self.rescale_every}, {self.codes_lr}. Leave "
                "them out for steps that stay, and for the run's learning rate."
            )
        _ = self.grid, self._init

    @property
    def grid(self) -> Grid:
        """The codes, and how they are stored."""
        known = [packing.value for packing in Packing]
        if self.codes_per_byte not in (None, *known):
            raise SpecError(f"DQT: codes_per_byte is one of {known}, got {self.codes_per_byte}.")
        packing = None if self.codes_per_byte is None else Packing(self.codes_per_byte)
        plain = Grid.of(self.bits, packing, self.rounding)
        return Grid(plain.format, plain.packing, plain.rounding, self.scaling)

    @property
    def _init(self) -> StepInit:
        return StepInit(self.init, self.per_channel, self.sigmas)

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """See `Method.prepare_`."""
        if self.sub_norms:
            sub_norm_(model, WRITERS)
        quantize_(
            model, self.grid, self._init, scope=self.scope, environment=self.environment, execution=self.execution
        )
        for module in model.modules():
            for p in list(module._parameters.values()):
                if isinstance(p, QParameter):
                    p.requires_grad_(not self.frozen)
        meters = nn.ModuleDict({name.replace(".", "/"): CodeMeter(p) for name, p in codes_of(model).items()})
        meters.register_buffer("seed", torch.tensor(seed))
        meters.register_buffer("rate", torch.zeros((), dtype=torch.float64))
        model.add_module("code_meters", meters)

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """See `Method.param_groups`."""
        own: dict[str, Any] = dict(self.states.codecs) | ({} if self.codes_lr is None else {"lr": self.codes_lr})
        return param_groups(model, weight_decay, lambda _name, _module, p: own if isinstance(p, QParameter) else None)

    def after_step_(self, model: nn.Module, at: Position) -> None:
        """See `Method.after_step_`."""
        model.get_buffer("code_meters.rate").fill_(at.lr if self.codes_lr is None else self.codes_lr * at.share)
        for name, p, meter in _metered(model):
            if self.rescale_every and (at.step + 1) % self.rescale_every == 0:
                seed: Any = model.get_buffer("code_meters.seed")
                rescale_(p, self._init, Noise.of(int(seed), name, "rescale"), at.step)
            meter.update_(p)

    def forms(self, model: nn.Module) -> dict[str, AbstractContextManager[object]]:
        """See `Method.forms`: `ternary`, as for inference; weights that are ternary already have no other form."""
        return {} if self.grid.format == TERNARY else {"ternary": ternary_weights(model)}

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return `changed`, `jumped`, `drift`, `top`, ... of all codes since the last line; see `CodeMeter.read_`.

        `lr_in_codes` is the learning rate of the last update over D, in the mean: the size of a normalized update in
        codes. `alarms` counts layers with emptied top codes, codes that gather at the ends, or none that learns;
        `tables` names them.
        """
        metered = list(_metered(model))
        readings = [(p.numel(), meter.read_(p)) for _, p, meter in metered]
        warned = [name for (name, p, _), (_, read) in zip(metered, readings, strict=True) if alarms(name, read)]
        rate = float(model.get_buffer("code_meters.rate"))
        rates = [(p.numel(), {"lr_in_codes": rate * float((1 / p.step).mean())}) for _, p, _ in metered]
        return {**mean_of(readings), **mean_of(rates), "alarms": float(len(warned))}

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return where the codes of every layer lie."""
        rows = []
        for name, p, meter in _metered(model):
            found, read = occupancy(p), meter.read_(p)
            told = "; ".join(alarm.partition(": ")[2] for alarm in alarms(name, read))
            step = float(p.step.mean())
            rows.append((name, found.bottom, found.zero, found.top, read["saturated"], step, 1 / step, told))
        columns = ("weight", "lowest code", "zero", "highest code", "more at the ends", "step", "codes a unit", "alarm")
        note = (
            "Shares of codes at the end of training; codes a unit, times a learning rate, is the rate in codes a step. "
            f"Products of codes: {self.execution.value}; {self.environment.value} gradients."
        )
        return (Table(f"Codes of {self.grid}", columns, tuple(rows), note),)


def example() -> DQT:
    """Return a method that trains a tiny GPT-2 within seconds."""
    return DQT(bits=4, codes_lr=3e-3)


def _metered(model: nn.Module) -> Iterator[tuple[str, QParameter, CodeMeter]]:
    found: Any = model.get_submodule("code_meters")
    for name, p in codes_of(model).items():
        yield name, p, found[name.replace(".", "/")]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: nn.Module) -> bool:
    return type(module).__name__ in ("Conv1D", "QuantizedConv1D")


def _check_plain(name: str, module: nn.Module) -> None:
    recipe: Any = getattr(module, "recipe", None)
    if recipe is not None and not recipe.plain:
        raise ConversionError(
            f"quantize_: {name} follows [{recipe}], whose weights are floats that are quantized in every GEMM; codes "
            "take layers in high precision. Use a recipe without GEMMs, such as bf16."
        )


def _as_linear_(module: nn.Module) -> None:
    """Make transformers' `Conv1D` a linear layer: its weight is stored as [in, out]."""
    if not _is_conv1d(module):
        return
    weight: Any = module.weight
    module.__class__ = nn.Linear
    module.in_features, module.out_features = weight.shape
    module.weight = nn.Parameter(weight.detach().t().contiguous())


def _quantize_rest_(model: nn.Module, grid: Grid, init: StepInit | None, environment: Environment) -> None:
    made: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules():
        for name, p in list(module._parameters.items()):
            if p is None or isinstance(p, QParameter) or p.ndim == 0:
                continue
            if id(p) not in made:
                made[id(p)] = nn.Parameter(quantize_parameter(p, grid, init, environment.dtype))
                _name_(made[id(p)], f"{path}.{name}".lstrip("."))
            setattr(module, name, made[id(p)])
            store_parts_(module)


def _name_(p: object, name: str) -> None:
    assert isinstance(p, QParameter)
    p.stream = name
