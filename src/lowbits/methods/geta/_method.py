# SPDX-License-Identifier: Apache-2.0
"""GETA in `lowbits train`: the stages around the loop's optimizer, the state in the model's checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lowbits.errors import ConversionError, SpecError
from lowbits.methods._contract import Method, Position, Table
from lowbits.methods.geta._construct import SubNetwork, construct
from lowbits.methods.geta._cost import cost, dense_cost
from lowbits.methods.geta._drawing import svg
from lowbits.methods.geta._graph import Graph, trace
from lowbits.methods.geta._layers import quantize_, quantizers
from lowbits.methods.geta._qasso import Progress, Qasso
from lowbits.methods.geta._saliency import check_reachable
from lowbits.methods.geta._saving import save, save_pretrained
from lowbits.methods.geta._schedule import START_BITS, Schedule, Target
from lowbits.optim import param_groups

STATE = "geta"
PROGRAM, FOLDER = "sub-network", "sub-network-transformers"
"""What a finished run leaves: a program of packed integers, and a `transformers` folder where a config can say it."""
_BATCH, _LENGTH = 2, 7  # of the tokens that are traced with; two numbers that no axis of a model has


class State(nn.Module):
    """What a model in training carries: progress as buffers, the graph beside it.

    Args:
        progress: of the stages.
        graph: of the model; in no checkpoint, since it is traced anew.
    """

    def __init__(self, progress: Progress, graph: Graph) -> None:
        super().__init__()
        self.progress, self.graph = progress, graph
        self.qasso: Qasso | None = None
        self.small: SubNetwork | None = None
        self.unsaid = ""  # why no config can say what is left


@dataclass(frozen=True)
class GETA(Method):
    """Prune and quantize while training, with `--recipe bf16`.

    A tenth of the steps warms up, two tenths bring the bits down, three prune, four heal. The smaller network is left
    in the run's folder: `sub-network` runs with torch alone, `sub-network-transformers` is a `transformers` folder.

    Args:
        sparsity: share of the units to prune, 0 to 0.999; exactly floor(sparsity * units) are.
        lowest: fewest bits of a weight.
        highest: most bits of a weight.
        quantizer_lr: learning rate of step, range and exponent of the quantizers.
        stage_steps: steps that the four stages take; 0 for all of the run. A run of fewer ends within a stage.
    """

    sparsity: float = 0.5
    lowest: float = 4.0
    highest: float = 8.0
    quantizer_lr: float = 1e-3
    stage_steps: int = 0

    def __post_init__(self) -> None:
        self.target.ceilings()  # a Target says what is wrong with it

    @property
    def target(self) -> Target:
        """The constraints."""
        return Target(self.sparsity, self.lowest, self.highest)

    def prepare_(self, model: nn.Module, seed: int) -> None:
        """Trace the model, and give every layer but a tied head a quantizer."""
        vocabulary = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
        ids = torch.arange(_BATCH * _LENGTH).remainder(vocabulary).view(_BATCH, _LENGTH)
        graph = trace(model, (), {"input_ids": ids})
        check_reachable([dimension.size for dimension in graph.dimensions], self.target)
        quantize_(model, bits=START_BITS)
        layers = len(quantizers(model))
        setattr(model, STATE, State(Progress(graph.units, layers), graph))

    def param_groups(self, model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
        """Put the quantizers' scalars into a group that the optimizer leaves alone."""
        scalars = [p for quantizer in quantizers(model).values() for p in quantizer.parameters()]
        own = {id(p) for p in scalars}
        groups = param_groups(model, weight_decay)
        groups = [{**group, "params": [p for p in group["params"] if id(p) not in own]} for group in groups]
        return [group for group in groups if group["params"]] + [{"params": scalars, "weight_decay": 0.0, "lr": 0.0}]

    def before_forward_(self, model: nn.Module, at: Position) -> None:
        """Remember what the step that follows will change."""
        state = _state(model)
        if state.qasso is None:
            schedule = Schedule.of(self.stage_steps or at.steps)
            state.qasso = Qasso(model, state.graph, self.target, schedule, self.quantizer_lr, progress=state.progress)
        if model.training:
            state.qasso.remember_()

    def after_step_(self, model: nn.Module, at: Position) -> None:
        """Project the bits, forget the doomed units, hold the pruned ones at zero."""
        qasso = _state(model).qasso
        if qasso is None:
            raise SpecError("GETA: after_step_ without before_forward_; the loop calls it before every forward pass.")
        qasso.after_step_()

    def metrics(self, model: nn.Module) -> dict[str, float]:
        """Return mean, lowest and highest bits, and the share of units that are pruned."""
        widths = torch.stack([quantizer.bits for quantizer in quantizers(model).values()])
        pruned = _state(model).progress.pruned.float().mean()
        mean, low, high, share = torch.stack([widths.mean(), widths.min(), widths.max(), pruned]).tolist()
        return {"bits": mean, "bits_lowest": low, "bits_highest": high, "units_pruned": share}

    def write(self, model: nn.Module, folder: Path) -> None:
        """Build the sub-network, unless the run was shorter than the stages, and leave it in the run's folder."""
        state = _state(model)
        if state.qasso is None or not state.qasso.done:
            return
        for name in (PROGRAM, FOLDER):
            shutil.rmtree(folder / name, ignore_errors=True)  # of an attempt that was killed
        with _on_the_cpu(model):
            state.small = finished(model)
            save(state.small, folder / PROGRAM, *state.graph.example)
            try:
                save_pretrained(state.small, state.graph, model, state.qasso.keep, folder / FOLDER)
            except ConversionError as error:
                state.unsaid = f" No {FOLDER}: {error}"

    def tables(self, model: nn.Module) -> tuple[Table, ...]:
        """Return what the sub-network costs, the units left of every dimension, and the bits of every layer."""
        state = _state(model)
        keep = ~state.progress.pruned.cpu()
        kept = keep.split([d.size for d in state.graph.dimensions])
        rows = tuple((d.name, float(d.size), float(k.sum())) for d, k in zip(state.graph.dimensions, kept, strict=True))
        widths = tuple((name.rpartition(".")[0], float(q.bits)) for name, q in quantizers(model).items())
        return (
            *_costs(state),
            Table(
                "Units",
                ("dimension", "units", "left"),
                rows,
                "Slices that can be cut, and how many stay.",
                drawing=svg(state.graph, keep),
            ),
            Table("Bits", ("layer", "bits"), widths, "Bits of every quantized weight.", shaded=START_BITS),
        )


def _costs(state: State) -> tuple[Table, ...]:
    """Compare the sub-network with the dense one, both counted from their graphs for the traced example."""
    if state.small is None:
        return ()
    whole, small = dense_cost(state.graph), cost(state.small, *state.graph.example)
    rows = (
        ("parameters", whole.parameters, small.parameters, small.parameters / whole.parameters),
        ("multiplications, layers with weights", whole.macs, small.macs, small.macs / whole.macs),
        ("BOPs, layers with weights", whole.bops, small.bops, small.relative_bops(whole)),
        ("BOPs, with attention", whole.complete_bops, small.complete_bops, small.relative_complete_bops(whole)),
        ("bytes as stored", whole.stored_bytes, small.stored_bytes, small.stored_bytes / whole.stored_bytes),
    )
    note = f"Counted from the sub-network in {PROGRAM}, for {_BATCH} sequences of {_LENGTH} tokens; dense: 32 bits."
    note += state.unsaid
    return (Table("Size", ("what", "dense", "sub-network", "share"), rows, note),)


@contextmanager
def _on_the_cpu(model: nn.Module) -> Iterator[None]:
    """Bring a model to the device that it was traced on for a while: constants of the graph are there."""
    device = next(model.parameters()).device
    model.cpu()
    try:
        yield
    finally:
        model.to(device)


def finished(model: nn.Module) -> SubNetwork:
    """Return the sub-network of a model that was trained under `GETA`.

    Args:
        model: trained, on the CPU, in evaluation or training mode; left as it is.
    Raises:
        SpecError: it was not prepared by `GETA`, or training has not come to its end.
    """
    state = _state(model)
    return construct(state.graph, model, ~state.progress.pruned.cpu())


def _state(model: nn.Module) -> State:
    state = getattr(model, STATE, None)
    if not isinstance(state, State):
        raise SpecError(f"{type(model).__name__} was not prepared by GETA; call GETA().prepare_(model, seed) first.")
    return state


def example() -> GETA:
    """Return a method that trains a tiny GPT-2 within seconds."""
    return GETA(sparsity=0.3, highest=14.0, stage_steps=12)
