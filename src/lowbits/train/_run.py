# SPDX-License-Identifier: Apache-2.0
"""Describe a run: the one source of the command line, its help, config.json and the arms of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TypeAlias

from torch import nn

from lowbits import models, recipes
from lowbits.errors import RunError
from lowbits.methods import Method
from lowbits.nn import Keep, Phase, Recipe, check_phases
from lowbits.train._schedule import Schedule

# A user's own architecture: (vocab_size, block) -> a transformers model. Called under the run's seed.
ModelFactory: TypeAlias = Callable[[int, int], nn.Module]
# Which recipe a layer gets; None leaves it in high precision.
LayerChoice: TypeAlias = Callable[[str, nn.Module], Recipe | None]


class Autocast(Enum):
    """In which precision the unquantized arithmetic of forward and backward runs."""

    BF16 = "bf16"
    NONE = "none"


class Device(Enum):
    """Where to train; `auto` is CUDA where there is one."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Sink(Enum):
    """Where the log goes besides log.jsonl."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Hold the hyper-parameters of AdamW.

    Args:
        lr: peak learning rate.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, of matrices only.
        clip: largest gradient norm, 0 for no clipping.
    """

    lr: float = 6e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Say how the arithmetic is run.

    Args:
        device: where to train; auto takes CUDA where there is one.
        autocast: precision of the unquantized arithmetic; weights and optimizer stay float32.
        compile: compile each block of the model with torch.compile.
        gradient_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        deterministic: let torch take those algorithms alone that give the same bits every time. A CPU does so anyway;
            on CUDA, sums in attention and embeddings are otherwise taken in the order in which they come, and two runs
            of one seed part after some steps.
    """

    device: Device = Device.AUTO
    autocast: Autocast = Autocast.BF16
    compile: bool = False
    gradient_checkpointing: bool = False
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Say when checkpoints are written; the last step always is one.

    Args:
        save_every: steps between checkpoints.
        keep: number of checkpoints that stay on disk.
    """

    save_every: int = 500
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class Watching:
    """Say what is measured and where it goes.

    Args:
        log_every: steps between lines of the log.
        eval_every: steps between evaluations, with the quantizers on and off.
        eval_batches: validation batches in an evaluation.
        errors_every: steps between measurements of the quantization error of every layer, 0 for none.
        max_nonfinite: the run stops after this many steps in a row with a non-finite loss or gradient.
        sinks: where the log goes besides log.jsonl.
    """

    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    errors_every: int = 100
    max_nonfinite: int = 5
    sinks: tuple[Sink, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Run:
    """Describe one training run; `train(run, out)` carries it out.

    Args:
        model: a Hugging Face folder, or a size: gpt2-pico, -nano, -small, -medium, -large, -xl, llama-15m, -42m, -110m,
            -134m, -small, -1b, -3b, -7b; in Python also a callable (vocab_size, block) -> model.
        data: a folder made by `lowbits data prepare`, or `stdlib`: the source code of Python's standard library.
        recipe: what to quantize, a name that `lowbits recipes` prints; in Python also a Recipe.
        method: what else a paper changes; on the command line the options of `--method`.
        quantize_head: quantize the output head too.
        split_qkv: give the gradients of q, k and v scales of their own where one layer computes all three (GPT-2).
        keep: which linear layers stay in high precision all the time.
        phases: when the forward or the backward pass leaves the recipe for high precision. Each is START:SWITCHES, from
            a step (200) or a share of the run (82%) until the next one: `82%:forward=off`; `0:off 10%:on` is a start in
            high precision.
        layers: in Python only: (name, module) -> Recipe or None, asked for every linear layer instead of `recipe`.
        steps: optimizer steps.
        batch_size: sequences in an optimizer step, over all micro-batches and processes.
        block: tokens in a sequence.
        accumulation: micro-batches in an optimizer step.
        dropout: probability of every dropout that the model has; 0 for comparisons.
        seed: of initial weights, data order, dropout and stochastic rounding.
        optimizer: hyper-parameters of AdamW.
        schedule: the learning rate over the run.
        compute: device and precision.
        saving: checkpoints.
        watching: log, evaluation, guards.
    Raises:
        RunError: a number is out of its range.
        UnknownNameError: no recipe, or no model, has this name.
    """

    model: str | ModelFactory = "gpt2-nano"
    data: str = "stdlib"
    recipe: str | Recipe = "bf16"
    method: Method = field(default_factory=Method)
    quantize_head: bool = False
    split_qkv: bool = False
    keep: Keep = field(default_factory=Keep)
    phases: tuple[Phase, ...] = ()
    layers: LayerChoice | None = None
    steps: int = 400
    batch_size: int = 16
    block: int = 128
    accumulation: int = 1
    dropout: float = 0.0
    seed: int = 0
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    compute: Compute = field(default_factory=Compute)
    saving: Saving = field(default_factory=Saving)
    watching: Watching = field(default_factory=Watching)

    def __post_init__(self) -> None:
        if isinstance(self.recipe, str):
            recipes.named(self.recipe)
        if isinstance(self.model, str) and not Path(self.model).is_dir():
            models.size(self.model)
        for name, value, least in (
            ("steps", self.steps, 1),
            ("batch-size", self.batch_size, 1),
            ("block", self.block, 2),
            ("accumulation", self.accumulation, 1),
            ("seed", self.seed, 0),
            ("save-every", self.saving.save_every, 1),
            ("keep", self.saving.keep, 1),
            ("log-every", self.watching.log_every, 1),
            ("eval-every", self.watching.eval_every, 1),
            ("eval-batches", self.watching.eval_batches, 1),
            ("errors-every", self.watching.errors_every, 0),
            ("max-nonfinite", self.watching.max_nonfinite, 1),
            ("clip", self.optimizer.clip, 0),
            ("lr", self.optimizer.lr, 0),
        ):
            if not value >= least:
                raise RunError(f"{name} is at least {least}, got {value}.")
        if not 0 <= self.dropout < 1:
            raise RunError(f"dropout is a probability below 1, got {self.dropout}.")
        check_phases(self.phases, self.steps)

    @property
    def rule(self) -> Recipe:
        """The recipe itself, looked up where a name was given."""
        return recipes.named(self.recipe) if isinstance(self.recipe, str) else self.recipe

    @property
    def recipe_name(self) -> str:
        """The recipe's name; `custom` for one that has none."""
        if isinstance(self.recipe, str):
            return self.recipe
        return next((name for name, recipe in recipes.NAMED.items() if recipe == self.recipe), "custom")

    @property
    def title(self) -> str:
        """The recipe's name, and the method's where there is one: `w8a8+gaussws`."""
        return self.recipe_name if type(self.method) is Method else f"{self.recipe_name}+{self.method.name}"

    @property
    def tokens_per_step(self) -> int:
        """Tokens in an optimizer step."""
        return self.batch_size * self.block

    def choose(self, head: nn.Module | None) -> Recipe | LayerChoice:
        """Return what `lowbits.nn.convert_` takes: the recipe, or a rule where not all layers are treated alike.

        Args:
            head: the model's output head, which stays in high precision unless `quantize_head`.
        """
        if self.layers is not None:
            return self.layers
        recipe = self.rule
        if not (self.quantize_head or self.split_qkv):
            return recipe

        def chosen(name: str, module: nn.Module) -> Recipe | None:
            if module is head and not self.quantize_head:
                return None
            fused = self.split_qkv and name.rpartition(".")[2] == "c_attn"
            return replace(recipe, grad_parts=3) if fused else recipe

        return chosen

    def resolved(self) -> dict[str, object]:
        """Return the run as plain JSON values: what config.json holds. Data out, never data in."""
        described = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {**described, "recipe": self.recipe_name, "rule": self.rule.to_dict()}


def _plain(value: object) -> object:
    """JSON values as they are; dataclasses by field, enums by value, code by its name."""
    if isinstance(value, Recipe):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        named = {"name": value.name} if isinstance(value, Method) else {}
        return named | {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if callable(value):
        return f"{value.__module__}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    return value
